"""This module joins texts of similar lengths into batches, by a budget of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import sub

import numpy as np
import torch
from torch import Tensor

from fastbert.ops import packing
from fastbert.text.encoding import PackedEncoding

# Tokens in a batch. On a CPU, activations of more than a few MB do not fit its caches, and each op maps new memory.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}


def default_token_budget(device: torch.device) -> int:
    """Returns the default number of tokens in a batch on that device."""
    return TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])


def in_batches(
    tokens: PackedEncoding, token_budget: int, batch_size: int | None, device: torch.device
) -> Iterator[tuple[list[int], packing.PackedBatch, Tensor, Tensor]]:
    """Yields the batches of `batches`: places of the texts, the batch, input_ids (T,) and token_type_ids (T,).

    The ids stay on the host. The model takes them from there, together with all other data of a batch on a GPU.

    The lengths are lists: for one text, NumPy's functions would take longer than the rest of this function.
    """
    offsets = tokens.cu_seqlens.tolist()
    lengths = list(map(sub, offsets[1:], offsets))
    # Longest first, so that too little memory shows at once.
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    input_ids, token_type_ids = tokens.input_ids, tokens.token_type_ids
    if device.type != "cpu" or order != list(range(len(order))):
        lengths = [lengths[i] for i in order]
        starts = [offsets[i] for i in order]
        input_ids, token_type_ids = _reordered((input_ids, token_type_ids), starts, lengths, device)
    ends = list(accumulate(lengths))
    for first, last in batches(ends, token_budget, batch_size):
        start, end = ends[first] - lengths[first], ends[last - 1]
        batch = packing.from_lengths(lengths[first:last], device)
        whole = last - first == len(order)
        batch_ids = input_ids if whole else input_ids[start:end]
        batch_type_ids = token_type_ids if whole else token_type_ids[start:end]
        yield order[first:last], batch, batch_ids, batch_type_ids


def _reordered(
    tensors: tuple[Tensor, ...], starts: list[int], lengths: list[int], device: torch.device
) -> Iterator[Tensor]:
    """Yields tensors (T,) with their texts in another order, in memory that a GPU can copy from by itself.

    starts, lengths: of the texts in that order; starts are the positions of the texts in the tensors.
    """
    ends = np.cumsum(lengths)
    rows = torch.from_numpy(np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1]))
    for tensor in tensors:
        out = torch.empty(len(rows), dtype=tensor.dtype, device="cpu", pin_memory=device.type == "cuda")
        yield torch.index_select(tensor, 0, rows, out=out)


def batches(ends: Sequence[int], token_budget: int, batch_size: int | None) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of runs of texts with at most that many tokens and texts, or of a single text.

    ends: (n,) the number of tokens up to the end of each text.
    """
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(bisect_right(ends, before + token_budget), first + 1)
        last = last if batch_size is None else min(last, first + batch_size)
        yield first, last
        first = last
