"""This module reads SentencePiece's model files without the packages sentencepiece and protobuf.

A file is one message of protocol buffers (sentencepiece_model.proto of https://github.com/google/sentencepiece):
consecutive pairs of a key and a value. The module reads the fields that a tokenizer needs, and skips the others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Types of models.
UNIGRAM, BPE = 1, 2
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}

_FLOAT = struct.Struct("<f")
_LAST_TYPE = BYTE


class Piece(NamedTuple):
    """A Piece is an entry of the vocabulary; its index in the list is SentencePiece's id."""

    text: str
    score: float  # the logarithm of a probability in a unigram model, the negated rank in a BPE model
    type: int  # one of the types above


class PieceModel(NamedTuple):
    """A PieceModel holds the parts of a SentencePiece file that a tokenizer needs."""

    pieces: list[Piece]
    model_type: int
    unknown_id: int
    charsmap: bytes  # the compiled rules of the normalizer, empty for none


def read_pieces(path: Path) -> PieceModel:
    """Reads a SentencePiece file.

    Raises ValueError for other content, such as a Git LFS pointer or a truncated file.
    """
    data = path.read_bytes()
    model_type, unknown_id, charsmap = UNIGRAM, 0, b""
    try:
        pieces, place = _usual_pieces(data)
        for field, value in _fields(data, place):
            if field == 1:
                pieces.append(_piece(value))
            elif field == 2:
                trainer = dict(_fields(value))
                model_type, unknown_id = trainer.get(3, UNIGRAM), trainer.get(40, 0)
            elif field == 3:
                charsmap = dict(_fields(value)).get(2, b"")
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    if not pieces:
        raise ValueError(f"{path} is no SentencePiece model: it holds no pieces")
    return PieceModel(pieces, model_type, unknown_id, charsmap)


def _usual_pieces(data: bytes) -> tuple[list[Piece], int]:
    """Returns the pieces at the start of a file, up to the first with an unusual form, and their end.

    The usual form is a text, a score and optionally a type, in this order and short. `_fields` reads any form, but
    takes seconds for the 250,000 pieces of XLM-RoBERTa.
    """
    texts: list[bytes] = []
    scores: list[bytes] = []
    types: list[int] = []
    place, end = 0, len(data)
    while place + 4 < end and data[place] == 0x0A and data[place + 2] == 0x0A:
        size, n = data[place + 1], data[place + 3]
        start = place + 4
        stop = start + n
        rest = size - n - 2  # five bytes of a score, and two of a type
        if size > 127 or rest not in (5, 7) or n == 0 or place + 2 + size > end or data[stop] != 0x15:
            break
        if rest == 7 and (data[stop + 5] != 0x18 or not NORMAL <= data[stop + 6] <= _LAST_TYPE):
            break
        texts.append(data[start:stop])
        scores.append(data[stop + 1 : stop + 5])
        types.append(data[stop + 6] if rest == 7 else NORMAL)
        place += 2 + size
    numbers = struct.unpack(f"<{len(scores)}f", b"".join(scores))
    return list(map(Piece, map(bytes.decode, texts), numbers, types)), place


def _piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = value
        elif field == 2:
            (score,) = _FLOAT.unpack(value)
        elif field == 3:
            kind = value
    if not text or not NORMAL <= kind <= _LAST_TYPE:
        raise ValueError(f"a piece {text!r} of type {kind}")
    return Piece(text.decode(), score, kind)


def _fields(data: bytes, place: int = 0) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a message from a position on: an int, or the bytes of a text, a message or a float."""
    end = len(data)
    while place < end:
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {place}")
        if place + size > end:
            raise ValueError(f"{size} bytes expected at byte {place} of {end}")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns the number at a position, seven bits per byte, and the position after it."""
    value = data[place]
    place += 1
    if value < 128:
        return value, place
    value, shift = value & 127, 7
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Returns the merges of a BPE model, in the order in which they are applied.

    SentencePiece merges the two neighbours whose piece has the highest score. Pairs that make the same piece are in the
    order of their ids.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        text = piece.text
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(text)):
            first, second = text[:cut], text[cut:]
            if first in ids and second in ids:
                merges.append((-piece.score, ids[first], ids[second], first, second))
    return [(first, second) for *_, first, second in sorted(merges)]
