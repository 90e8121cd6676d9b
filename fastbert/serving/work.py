"""This module holds the data types of the queue. Texts of many callers share a batch if their lanes are equal."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.text.encoding import PackedEncoding


class Lane(NamedTuple):
    """A Lane describes the computation for a text. Texts of equal lanes may share a batch.

    task: one of the model's tasks. prompt: the prefix of the text. normalize: whether vectors get length 1. dimensions:
    the number of kept elements of a vector. raw: whether scores are logits. side: the side on which longer texts are
    truncated, "" for the tokenizer's choice, and after truncation.
    """

    task: str
    prompt: str = ""
    normalize: bool = False
    dimensions: int | None = None
    raw: bool = False
    side: str = ""


class Item(NamedTuple):
    """An Item is a tokenized text: one row, or several rows if it is read in windows.

    input_ids, token_type_ids: (T,) int64 on the host. lengths: the lengths of the rows, whose sum is T.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: list[int]

    @property
    def n_tokens(self) -> int:
        return int(self.input_ids.shape[0])


def split(tokens: PackedEncoding) -> list[Item]:
    """Returns an item for each row of an encoding."""
    if tokens.cu_seqlens.shape[0] == 2:
        return [Item(tokens.input_ids, tokens.token_type_ids, [tokens.input_ids.shape[0]])]
    lengths = tokens.cu_seqlens.diff().tolist()
    pieces = zip(tokens.input_ids.split(lengths), tokens.token_type_ids.split(lengths), lengths, strict=True)
    return [Item(input_ids, token_type_ids, [length]) for input_ids, token_type_ids, length in pieces]


def join(items: Sequence[Item]) -> PackedEncoding:
    """Returns all rows of the items as one encoding."""
    lengths = [length for item in items for length in item.lengths]
    return PackedEncoding(
        torch.cat([item.input_ids for item in items]),
        torch.cat([item.token_type_ids for item in items]),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        n_truncated=0,
        n_truncated_tokens=0,
    )


@dataclass(eq=False)
class Work:
    """A Work holds the items of one request. They may be computed in different batches.

    n_tokens: its reserved room in the queue; an upper bound until the items are known. future: resolves to the results
    in the order of the items, with an exception in the place of a failed item. Cancelling it removes the work from the
    queue.
    """

    n_tokens: int
    lane: Lane = Lane("")
    items: list[Item] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    n_started: int = 0
    n_finished: int = 0
    future: Future[list[Any]] = field(default_factory=Future)
