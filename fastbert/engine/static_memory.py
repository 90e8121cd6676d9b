"""This module holds the static memory that CUDA graphs read, and fills it for a batch; README.md has the reasons."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbert.engine.interface import PackedInputs
from fastbert.ops import Policy, attention_plan, masked, packing, silent_writes
from fastbert.ops.packing import PackedBatch
from fastbert_kernels import cpu

REMEMBERED = 16  # forms of batches in a bucket
COLUMNS = -1  # in the place of a row of ids
_HOST = torch.device("cpu")
FARTHEST = 1 << 20  # beyond any column


@dataclass(frozen=True)
class Shape:
    """A `Shape` holds the properties that all graphs of a model share.

    notes: whether kernels check ids. distances: whether layers read the columns of rows.
    """

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    head_size: int
    policy: Policy
    notes: bool = False
    distances: bool = False

    @functools.cached_property
    def device_type(self) -> str:
        """Returns the type of the device, faster than PyTorch does."""
        return self.device.type

    @functools.cached_property
    def waits(self) -> bool:
        """Tells whether a check of the weights' numbers would wait for the device."""
        return silent_writes.waits(self.device)


class Buffers:
    """A `Buffers` is the static memory of the buckets of one octave, up to `capacity` rows."""

    def __init__(self, capacity: int, n_words: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.words = torch.zeros(n_words, dtype=torch.int64, device=device)  # as Layout says
        self.out = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)


class Lengths(NamedTuple):
    """A `Lengths` holds the words that follow from a batch's lengths, after the token types, and their address."""

    words: np.ndarray
    address: int


class Layout:
    """A `Layout` is the layout of a bucket's inputs in the static memory, in words of 8 bytes.

    The inputs are input_ids, token_type_ids and position_ids, (T',) each; the number and the rows of the batch
    (`embedding.Notes`); and the integers of attention (StaticPlan). The host's data are at the end, so that one copy
    transfers them. n_tiles: the length of the work lists, if it differs from a graph's.
    """

    def __init__(
        self,
        bucket: int,
        shape: Shape,
        kind: attention_plan.Kind = attention_plan.ANY_BATCH,
        n_tiles: tuple[int, int | None] | None = None,
    ) -> None:
        self.bucket, self.shape = bucket, shape
        sizes = shape.dtype, shape.head_size, shape.device, shape.policy
        self.plan = attention_plan.StaticPlan(bucket, *sizes, kind, n_tiles)
        self.short_tile = masked.short_tile(*sizes)
        self.pinned = packing.pins(shape.device)
        self.start_of_plan = 3 * bucket + 2
        self.n_words = self.start_of_plan + -(-self.plan.n_integers // 2)
        self._remembered: OrderedDict[bytes, Lengths] = OrderedDict()

    def of_lengths(self, batch: PackedBatch) -> Lengths | None:
        """Returns the words that follow from a batch's lengths; None if they do not fit.

        They are kept for the last lengths, because many programs run batches of a few forms.
        """
        key = batch.form[0]
        lengths = self._remembered.get(key)
        if lengths is None:
            words = np.zeros(self.n_words - 2 * self.bucket, np.int64)
            if not self.plan.write(batch, words[self.bucket + 2 :].view(np.int32)):
                return None
            words[: batch.n_tokens] = packing.count_positions(batch.cu_seqlens_cpu.numpy())
            if len(self._remembered) >= REMEMBERED:
                self._remembered.popitem(last=False)
            lengths = self._remembered[key] = Lengths(words, words.ctypes.data)
        return lengths

    def ids(self, words: Tensor) -> Tensor:
        """Returns (3, T'), a view of the static memory or of a copy of it."""
        return words[: 3 * self.bucket].view(3, self.bucket)

    def batch(self, words: Tensor) -> Tensor:
        """Returns (2,)."""
        return words[3 * self.bucket : self.start_of_plan]

    def integers(self, words: Tensor) -> Tensor:
        """Returns (n_integers,) int32."""
        return words[self.start_of_plan : self.n_words].view(torch.int32)

    def static_batch(self, words: Tensor) -> tuple[PackedInputs, PackedBatch]:
        """Returns the inputs and the batch on these words."""
        ids, shape, bucket = self.ids(words), self.shape, self.bucket
        cu_seqlens, plan = self.plan.split(integers := self.integers(words))
        batch = PackedBatch(
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=torch.tensor([0, bucket], dtype=torch.int32, device="cpu"),  # the longest text that fits
            position_ids=ids[2],
            batch_size=bucket,
            padded_length=FARTHEST if self.plan.kind.holes else bucket,
        )
        batch = attention_plan.with_plan(batch, shape.dtype, shape.head_size, shape.policy, plan)
        batch.plan(attention_plan.LONGEST_IS_BOUND, lambda: True)
        of_rows = self.plan.split_columns(integers)
        if of_rows is not None:
            batch.columns, seq_ids = of_rows
            batch.plan("seq_ids", lambda: seq_ids)
        return PackedInputs(*ids), batch

    def unpack(self, words: Tensor, batch: PackedBatch, inputs: PackedInputs, number: int) -> None:
        """Fills words, (n_words,), on the device with a batch whose lengths are there. inputs: ids, (B * S,) each."""
        from fastbert_kernels.unpack import Static

        cu_seqlens, plan = self.plan.split(integers := self.integers(words))
        columns, seq_ids = self.plan.split_columns(integers) or (None, None)
        static = Static(
            words[: self.start_of_plan], cu_seqlens, plan.tiles, plan.row_spans, plan.short_tiles, columns, seq_ids
        )
        masked.unpack(batch, inputs[:3], static, number, self.plan.block_q, self.short_tile)


def fill_on_host(layout: Layout, batch: PackedBatch, inputs: PackedInputs, number: int) -> Filled | None:
    """Returns the host's words of the static memory, and the ids that are already on the device.

    Returns None if the batch does not fit.
    """
    n_tokens, bucket = batch.n_tokens, layout.bucket
    lengths = layout.of_lengths(batch)
    if lengths is None:
        return None
    words = torch.empty(layout.n_words, dtype=torch.int64, device=_HOST, pin_memory=layout.pinned)
    if batch.columns is None and cpu.obstacle() is None:
        rows = _addresses(batch, inputs)
        if rows is not None:
            cpu.fill_words(words, bucket, lengths.address, number, n_tokens, rows)
            return words, 0, []
    numbers = words.numpy()
    numbers[2 * bucket :] = lengths.words
    numbers[3 * bucket], numbers[3 * bucket + 1] = number, n_tokens
    input_ids, token_type_ids, position_ids, _ = inputs
    left: list[tuple[int, Tensor]] = []
    if batch.columns is not None:
        columns = layout.integers(words)[layout.plan.columns]
        if batch.host_columns is None:
            left.append((COLUMNS, batch.columns))
        else:
            columns[:n_tokens] = torch.from_numpy(batch.host_columns)
    position_ids = _positions(batch, position_ids)
    if position_ids is not None:
        _put(numbers, left, bucket, 2, position_ids)
    if token_type_ids is None:
        numbers[bucket : 2 * bucket] = 0
    else:
        _put(numbers, left, bucket, 1, token_type_ids)
    if input_ids is not None:
        _put(numbers, left, bucket, 0, input_ids)
    # Where ids are on the device, the copy from the host begins after them.
    first = 0
    for row, _ in reversed(left):  # in which ids begin with the last row
        first += row == first
    return words, first * bucket, left


# The memory on the host, its first word that is copied, and (row, ids) on the device.
Filled = tuple[Tensor, int, "list[tuple[int, Tensor]]"]


def _positions(batch: PackedBatch, position_ids: Tensor | None) -> Tensor | None:
    """Returns the positions of a batch; None if they follow from its lengths."""
    if position_ids is not None and position_ids is not batch.__dict__.get("position_ids"):
        return position_ids
    if batch.counted:
        return None
    columns = batch.host_columns
    return batch.position_ids if columns is None else torch.from_numpy(columns)


def _addresses(batch: PackedBatch, inputs: PackedInputs) -> tuple[int, int, int] | None:
    """Returns the addresses of all ids, 0 for missing ones; None unless they are int64 on the host."""
    input_ids, token_type_ids, position_ids, _ = inputs
    rows = [input_ids, token_type_ids, _positions(batch, position_ids)]
    addresses = [0, 0, 0]
    for i, ids in enumerate(rows):
        if ids is not None:
            if not packing.on_host(ids.device) or ids.dtype is not torch.int64 or not ids.is_contiguous():
                return None
            addresses[i] = ids.data_ptr()
    return addresses[0], addresses[1], addresses[2]


def _put(numbers: np.ndarray, left: list[tuple[int, Tensor]], bucket: int, row: int, ids: Tensor) -> None:
    """Copies ids on the host into their row, and puts ids on the device on the list."""
    if packing.on_host(ids.device):
        n_tokens = ids.shape[0]
        numbers[row * bucket : row * bucket + n_tokens] = ids.numpy()
        numbers[row * bucket + n_tokens : (row + 1) * bucket] = 0
    else:
        left.append((row, ids))
