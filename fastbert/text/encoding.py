"""Encodings are rows of token ids. They are assembled from pieces, truncated, padded or packed, all on arrays.

``B`` is the number of sequences, ``S`` the longest sequence, ``T`` the number of packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from fastbert.checks import one_of


class Encoding(dict[str, Any]):
    """An Encoding has ``input_ids``, ``token_type_ids`` and ``attention_mask``, by key or attribute.

    The values are lists of int (lists of these for a batch), int64 arrays (B, S) or int64 tensors (B, S).
    ``model(**encoding)`` works.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"Encoding has no {name!r}, only {', '.join(self)}")
        return self[name]

    def to(self, device: str | int | torch.device) -> Encoding:
        """Moves the tensors to ``device``, in place, and returns self.

        Raises TypeError if the values are no tensors.
        """
        for name, value in self.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"to: {name} is a {type(value).__name__}; encode with return_tensors='pt'")
            self[name] = value.to(device)
        return self


@dataclass
class PackedEncoding:
    """A PackedEncoding holds B consecutive sequences, without padding, on the CPU."""

    input_ids: torch.Tensor  # (T,) int64
    token_type_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32, starts at 0, ends at T
    n_truncated: int  # sequences that lost tokens to truncation
    n_truncated_tokens: int  # number of cut tokens


class Rows(NamedTuple):
    """Rows are B consecutive sequences, as arrays, with the limit of their truncation."""

    input_ids: np.ndarray  # (T,)
    token_type_ids: np.ndarray  # (T,)
    lengths: list[int]  # (B,)
    n_truncated: int
    n_truncated_tokens: int
    limit: int | None


class Piece(NamedTuple):
    """A Piece is a part of a sequence. [CLS] A [SEP] has three pieces."""

    source: int  # 0: first text, 1: second text, -1: one special token
    ids: list[int]  # the special token, or an empty list
    token_type_id: int


class LongText:
    """A LongText has the number of tokens of a text, and the ids at the end that truncation keeps."""

    def __init__(self, ids: list[int], n_tokens: int) -> None:
        self.ids, self.n_tokens = ids, n_tokens

    def __len__(self) -> int:
        return self.n_tokens


def template_of(probe: Any, has_token_types: bool) -> tuple[Piece, ...]:
    """Returns the template of an encoding of one-token texts, for any kind of post-processor.

    has_token_types: whether to use the token type ids of the probe; without them all are 0.
    """
    pieces: list[Piece] = []
    for source, token, token_type_id in zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True):
        if source is None:
            pieces.append(Piece(-1, [token], token_type_id * has_token_types))
        elif not pieces or pieces[-1].source != source:  # the first token of a text
            pieces.append(Piece(source, [], token_type_id * has_token_types))
    return tuple(pieces)


def assemble(
    template: tuple[Piece, ...], encoded: list[Any], kept: list[list[int]], n_tokens: int, from_left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the input_ids and the token_type_ids of consecutive rows, (n_tokens,) each.

    ``encoded`` holds all first texts, then all second texts; ``kept`` has the number of tokens of each to keep.
    """
    n_rows = len(kept[0])

    def pieces() -> Iterator[list[int]]:
        for row in range(n_rows):
            for source, ids, _ in template:
                if source >= 0:
                    ids, n = encoded[source * n_rows + row].ids, kept[source][row]
                    ids = ids[len(ids) - n :] if from_left else ids[:n]
                yield ids

    def token_type_ids() -> Iterator[Iterator[int]]:
        for row in range(n_rows):
            for source, _, token_type_id in template:
                yield repeat(token_type_id, 1 if source < 0 else kept[source][row])

    input_ids = np.fromiter(chain.from_iterable(pieces()), np.int64, n_tokens)
    if not any(piece.token_type_id for piece in template):
        return input_ids, np.zeros(n_tokens, np.int64)
    return input_ids, np.fromiter(chain.from_iterable(token_type_ids()), np.int64, n_tokens)


def join_rows(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the concatenated input_ids and token_type_ids of all parts."""
    empty = np.empty(0, np.int64)
    input_ids, token_type_ids = (np.concatenate(arrays) for arrays in zip(*parts, (empty, empty), strict=True))
    return input_ids, token_type_ids


def kept_counts(counts: np.ndarray, limit: int, n_special: int, truncation: bool | str, start: int) -> np.ndarray:
    """Returns the number of tokens of each text to keep, (1 or 2, rows), by the rules of ``tokenizers``.

    counts: the numbers of all tokens, in the same shape. start: the index of the first row, for errors.
    """
    budget = limit - n_special
    excess = np.maximum(counts.sum(0) - budget, 0)
    if not truncation:
        row = int(excess.argmax())
        raise ValueError(
            f"texts[{start + row}] has {excess[row] + limit} tokens, expected at most {limit}, as truncation is False"
        )
    if budget == 0:
        return np.zeros_like(counts)
    if truncation in ("only_first", "only_second"):
        kept = counts.copy()
        side = kept[int(truncation == "only_second")]
        if (failing := (excess > 0) & (excess >= side)).any():
            row = int(failing.argmax())
            raise ValueError(
                f"truncation: {truncation!r} cannot bring texts[{start + row}] and its pair to {limit} tokens: "
                f"{excess[row]} must go, of the {side[row]} it may cut; use 'longest_first'"
            )
        side -= excess
        return kept
    if len(counts) == 1:
        return counts - excess
    # The longer text gets the budget that the shorter leaves. If that is less than the shorter text's length, each gets
    # half; an odd token goes to the longer text, or to the second if they are equal.
    short = counts.min(0)
    half = 2 * short > budget
    short, long = np.where(half, budget // 2, short), np.where(half, budget - budget // 2, budget - short)
    kept = np.where(counts[0] > counts[1], [long, short], [short, long])
    return np.where(excess > 0, kept, counts)


def pad_rows(rows: Rows, padding: bool | str, pad_token_id: int | None, padding_side: str) -> dict[str, np.ndarray]:
    """Returns the rows as arrays (B, S): input_ids, token_type_ids and attention_mask."""
    lengths = np.array(rows.lengths, np.int64)
    width = int(lengths.max(initial=0))
    if padding == "max_length":
        if rows.limit is None:
            raise ValueError("padding: got 'max_length', but neither max_length nor model_max_length is set")
        width = rows.limit
    elif not padding and (lengths != width).any():
        raise ValueError(f"return_tensors: rows have {lengths.min()} to {width} tokens; pass padding=True")
    if padding and pad_token_id is None:
        raise ValueError(f"padding: got {padding!r}, but this tokenizer has no pad_token")
    mask = np.arange(width) < lengths[:, None]
    mask = mask if one_of("padding_side", padding_side, "right", "left") == "right" else mask[:, ::-1]
    input_ids, token_type_ids = np.full(mask.shape, pad_token_id or 0, np.int64), np.zeros(mask.shape, np.int64)
    input_ids[mask], token_type_ids[mask] = rows.input_ids, rows.token_type_ids
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": mask.astype(np.int64)}
