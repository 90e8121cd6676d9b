"""This module converts texts to tokens with positions in the text, and tokens to rows with special tokens.

Both work on a tokenizer of the library ``tokenizers``, so that a transformers model is trained on the tokens of
``fastbert.Tokenizer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from fastbert.text import windows
from fastbert.text.encoding import PackedEncoding, Piece, assemble


class TokenizedText(NamedTuple):
    """A TokenizedText holds the n tokens of a text, without special tokens and not truncated.

    ids: token ids. offsets: (n, 2) int64, the start and end of each token in the text, in characters. words: (n,)
    int64, the number of each token's word, by the pre-tokenizer's split; -1 for a token outside of words.
    """

    ids: list[int]
    offsets: np.ndarray
    words: np.ndarray

    def starts_of_words(self) -> np.ndarray:
        """Returns (n,) bool: whether a token is the first of its word. A token outside of words counts as a word."""
        starts = np.ones(len(self.ids), bool)
        starts[1:] = (self.words[1:] != self.words[:-1]) | (self.words[1:] < 0)
        return starts


class _Ids(NamedTuple):
    ids: Sequence[int]


def tokenize(rust: Any, texts: Sequence[str]) -> list[TokenizedText]:
    """Returns the tokens of each text. rust: a tokenizer of ``tokenizers`` that neither truncates nor pads."""
    may_split = any(len(text) > windows.CHARACTERS for text in texts) and windows.splits(rust)
    result: list[TokenizedText] = []
    for first, last in windows.spans(texts, windows.TEXTS, windows.CHARACTERS):
        if last - first == 1 and may_split:
            parts = list(windows.pieces(texts[first], windows.CHARACTERS))
            result.append(_joined([_one(rust.encode(part, add_special_tokens=False)) for part in parts], parts))
        else:
            chunk = list(texts[first:last])
            result += [_one(encoding) for encoding in rust.encode_batch(chunk, add_special_tokens=False)]
    return result


def _one(encoding: Any) -> TokenizedText:
    words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
    return TokenizedText(encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2), words)


def _joined(parts: list[TokenizedText], texts: list[str]) -> TokenizedText:
    """Returns the tokens of a text from those of its pieces `texts`. Each piece ends at the end of a word."""
    ids: list[int] = []
    offsets, words = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    n_characters = n_words = 0
    for part, text in zip(parts, texts, strict=True):
        ids += part.ids
        offsets.append(part.offsets + n_characters)
        words.append(np.where(part.words < 0, -1, part.words + n_words))
        n_characters += len(text)
        n_words += int(part.words.max(initial=-1)) + 1
    return TokenizedText(ids, np.concatenate(offsets), np.concatenate(words))


def pack(
    template: tuple[Piece, ...], firsts: Sequence[Sequence[int]], seconds: Sequence[Sequence[int]] | None = None
) -> PackedEncoding:
    """Packs ids into consecutive rows with special tokens. Nothing is truncated.

    template: that of a text, or with `seconds` of a pair. firsts, seconds: B lists of ids without special tokens.
    """
    sides = [firsts] if seconds is None else [firsts, seconds]
    kept = [[len(ids) for ids in side] for side in sides]
    n_special = n_special_tokens(template)
    lengths = [n_special + sum(counts) for counts in zip(*kept, strict=True)]
    rows: list[Any] = [_Ids(ids) for side in sides for ids in side]
    input_ids, token_type_ids = assemble(template, rows, kept, sum(lengths), False)
    cu_seqlens = np.array([0, *accumulate(lengths)], np.int32)
    arrays = torch.from_numpy(input_ids), torch.from_numpy(token_type_ids), torch.from_numpy(cu_seqlens)
    return PackedEncoding(*arrays, n_truncated=0, n_truncated_tokens=0)


def n_special_tokens(template: tuple[Piece, ...], before: int | None = None) -> int:
    """Returns the number of special tokens in a row; with `before`, only those in front of the text of that number."""
    n = 0
    for piece in template:
        if piece.source == before:
            break
        n += piece.source < 0
    return n
