"""This module holds the static memory that CUDA graphs read, and fills it for a batch; README.md has the reasons."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastbert.engine.interface import PackedInputs
from fastbert.ops import Policy, attention_plan, masked, packing, silent_writes, static_plan
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
        kind: static_plan.Kind = static_plan.ANY_BATCH,
        n_tiles: tuple[int, int | None] | None = None,
    ) -> None:
        self.bucket, self.shape = bucket, shape
        sizes = shape.dtype, shape.head_size, shape.device, shape.policy
        self.plan = static_plan.StaticPlan(bucket, *sizes, kind, n_tiles)
        self.short_tile = masked.short_tile(*sizes)
        self.pinned = packing.pins(shape.device)
        self.start_of_plan = 3 * bucket + 2
        self.n_words = self.start_of_plan + -(-self.plan.n_integers // 2)
        self._remembered: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def of_lengths(self, batch: PackedBatch) -> np.ndarray | None:
        """Returns the words after the token types, which follow from a batch's lengths; None if they do not fit.

        They are kept for the last lengths, because many programs run batches of a few forms.
        """
        key = batch.form[0]
        words = self._remembered.get(key)
        if words is None:
            words = np.zeros(self.n_words - 2 * self.bucket, np.int64)
            if not self.plan.write(batch, words[self.bucket + 2 :].view(np.int32)):
                return None
            words[: batch.n_tokens] = packing.count_positions(batch.cu_seqlens_cpu.numpy())
            if len(self._remembered) >= REMEMBERED:
                self._remembered.popitem(last=False)
            self._remembered[key] = words
        return words

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
    words = torch.empty(layout.n_words, dtype=torch.int64, device=_HOST, pin_memory=layout.pinned)
    rows = inputs.input_ids, inputs.token_type_ids, _positions(batch, inputs.position_ids)
    on_device: list[tuple[int, Tensor]] = []
    on_host: list[Tensor | None] = [None, None, None]
    addresses = [0, 0, 0]
    for row in 2, 1, 0:
        ids = rows[row]
        if ids is None:
            continue
        if not packing.on_host(ids.device):
            on_device.append((row, ids))
            continue
        if ids.dtype is not torch.int64 or not ids.is_contiguous():
            ids = ids.long().contiguous()
        on_host[row] = ids
        addresses[row] = ids.data_ptr()
    if cpu.obstacle() is not None:
        fits = _fill_in_numpy(layout, batch, words, on_host, number)
    else:
        fits = cpu.fill_words(words, layout.bucket, layout.plan.integers, batch.cu_seqlens_cpu, number, addresses)
    if not fits:
        return None
    # Where ids are on the device, the copy from the host begins after them.
    first = 0
    for row, _ in reversed(on_device):  # in which ids begin with the last row
        first += row == first
    if batch.columns is not None:
        if batch.host_columns is None:
            on_device.insert(0, (COLUMNS, batch.columns))
        else:
            columns = layout.integers(words)[layout.plan.columns]
            columns[: batch.n_tokens] = torch.from_numpy(batch.host_columns)
    return words, first * layout.bucket, on_device


def _fill_in_numpy(layout: Layout, batch: PackedBatch, words: Tensor, rows: list[Tensor | None], number: int) -> bool:
    """Does what `cpu.fill_words` does, where there are no C++ kernels. rows: three of ids, (T,) int64 each."""
    lengths = layout.of_lengths(batch)
    if lengths is None:
        return False
    numbers, bucket, n_tokens = words.numpy(), layout.bucket, batch.n_tokens
    numbers[: 2 * bucket] = 0
    numbers[2 * bucket :] = lengths
    numbers[3 * bucket], numbers[3 * bucket + 1] = number, n_tokens
    for row, ids in enumerate(rows):
        if ids is not None:
            numbers[row * bucket : row * bucket + n_tokens] = ids.numpy()
    return True


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
