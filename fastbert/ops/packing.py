"""Packing: from padded (B, S, ...) batches to the T tokens that are there, and back.

A batch is unpadded once, at the edge of the model; every layer runs on (T, H); outputs are padded once, if at all.
Position is the column index, as in transformers: left-padded rows and masks with holes keep their column positions.
RoBERTa's family counts otherwise: `positions_after_padding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import sub
from typing import Any

import numpy as np
import torch

from fastbert.ops import tracing
from fastbert.ops.tracing import untraced


@dataclass(eq=False)
class PackedBatch:
    """A packed batch says how B sequences of different lengths lie in T packed tokens.

    cu_seqlens: (B + 1,) int32 on the tensors' device, starts at 0, ends at T; sequence b is rows cu_seqlens[b] to
    cu_seqlens[b + 1]. cu_seqlens_cpu: the same on the host. position_ids: (T,) int64, the column each token came from.
    indices: (T,) int64, where each token stands in the flattened (B * S) batch, None if it never was padded.
    valid: (B, S) bool, where tokens are, in a batch that keeps the rows of its padding (`in_place`); None in any other.
    first_column: whether each sequence has a token in the first column, as it has without padding on the left.
    columns: (T,) int32, the column of each token, where a mask has holes; None where the tokens of each sequence are
    neighbours, or nobody has asked (`find_holes`).
    """

    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    position_ids: torch.Tensor
    batch_size: int
    padded_length: int
    indices: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    first_column: bool = True
    columns: torch.Tensor | None = None
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def n_tokens(self) -> int:
        """Returns T."""
        return self.position_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def seq_ids(self) -> torch.Tensor:
        """(T,) int32: the sequence of each token."""
        return self.plan("seq_ids", lambda: sequence_ids(self.cu_seqlens, self.n_tokens))

    def plan(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what is made from the lengths once a batch, for all layers: work lists, groups of equal length."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def has_plan(self, key: Any) -> bool:
        """Tells whether `plan` has made this one."""
        return key in self._plans


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor of the host to the device without waiting for it, unless it is there already.

    A GPU copies by itself only from pinned memory. For other memory the driver waits until the stream is idle, unless
    it is at most 64 kB.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sequence_ids(cu_seqlens: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """(T,) int32: the sequence of each token, from (B + 1,) offsets on the same device."""
    sequences = torch.arange(cu_seqlens.shape[0] - 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=n_tokens)


def within_sequences(rows: torch.Tensor, cu_seqlens: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """(T,) the place in its sequence of each of the packed rows, in their dtype; all on one device."""
    return rows - cu_seqlens.index_select(0, seq_ids)


@untraced
def unpad(attention_mask: torch.Tensor) -> PackedBatch:
    """Returns the packing of a padded batch. attention_mask: (B, S), any numeric dtype, nonzero where a token is.

    Holes and left padding are fine. A row without any token becomes a sequence of length 0.
    """
    _refuse_recording("attention_mask", attention_mask)
    batch_size, padded_length = attention_mask.shape
    valid = attention_mask != 0
    indices = valid.flatten().nonzero().flatten()
    # The offsets and, to wait for the device once, how many sequences begin in the first column.
    counted = torch.zeros(batch_size + 2, dtype=torch.int32, device=valid.device)
    torch.cumsum(valid.sum(1), 0, dtype=torch.int32, out=counted[1:-1])
    counted[-1] = valid[:, :1].sum()
    counted_cpu = counted.cpu()
    return PackedBatch(
        cu_seqlens=counted[:-1],
        cu_seqlens_cpu=counted_cpu[:-1],
        position_ids=indices % max(padded_length, 1),
        batch_size=batch_size,
        padded_length=padded_length,
        indices=indices,
        first_column=torch.compiler.is_exporting() or padded_length == 0 or int(counted_cpu[-1]) == batch_size,
    )


@untraced
def without_padding(batch_size: int, length: int, device: torch.device) -> PackedBatch:
    """Returns the packing of a (B, S) batch in which every position holds a token; needs no look at a mask."""
    return PackedBatch(
        cu_seqlens=torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length,
        cu_seqlens_cpu=torch.arange(batch_size + 1, dtype=torch.int32, device="cpu") * length,
        position_ids=torch.arange(length, device=device).repeat(batch_size),
        batch_size=batch_size,
        padded_length=length,
    )


def in_place(like: torch.Tensor, attention_mask: torch.Tensor | None) -> PackedBatch:
    """Returns the packing that packs nothing: T = B * S rows, those of padding among them. like: (B, S, ...).

    For tracers and transforms, which have no values to pack by. Its shapes may be those of a tracer, and stay open;
    no value is read. Attention masks the padding, `pack` fills it and `pad` clears it.
    """
    batch_size, padded_length = like.shape[:2]
    device = like.device
    if attention_mask is None:
        valid = torch.ones(batch_size, padded_length, dtype=torch.bool, device=device)
    else:
        valid = attention_mask != 0
    offsets = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * padded_length
    positions = torch.arange(padded_length, device=device)
    return PackedBatch(
        cu_seqlens=offsets,
        cu_seqlens_cpu=offsets,  # which nothing reads
        position_ids=positions.expand(batch_size, padded_length).reshape(-1),
        batch_size=batch_size,
        padded_length=padded_length,
        valid=valid,
    )


@untraced
def from_cu_seqlens(cu_seqlens: torch.Tensor, n_tokens: int, device: torch.device) -> PackedBatch:
    """Returns the packing that cu_seqlens, (B + 1,) int32 on any device, describes; positions start at 0 in each.

    Raises ValueError if cu_seqlens does not start at 0, decreases or does not end at n_tokens; TypeError for its dtype.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    _refuse_recording("cu_seqlens", cu_seqlens)
    offsets = cu_seqlens.tolist()
    lengths = list(map(sub, offsets[1:], offsets))
    if offsets[0] != 0 or offsets[-1] != n_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens: expected offsets that start at 0, never decrease and end at T = {n_tokens}, "
            f"got {offsets if len(offsets) <= 9 else f'{offsets[:4]} ...'}"
        )
    return from_lengths(lengths, device)


@untraced
def find_holes(batch: PackedBatch) -> None:
    """Sets the batch's `columns` if its mask has holes, for operations that depend on how far two tokens are apart.

    On a GPU it waits for it, where the batch was padded.
    """
    if batch.indices is None or batch.columns is not None or batch.valid is not None:
        return

    indices = batch.indices

    def make() -> torch.Tensor | None:
        columns = indices % max(batch.padded_length, 1)
        rows = torch.arange(batch.n_tokens, device=batch.device)
        starts = within_sequences(columns - rows, -batch.cu_seqlens.long(), batch.seq_ids)
        first = starts.index_select(0, batch.cu_seqlens.long().index_select(0, batch.seq_ids))
        some = torch.compiler.is_exporting() or bool((starts != first).any())  # an exporter has no values to look at
        return columns.int() if some else None

    batch.columns = batch.plan("holes", make)


def _refuse_recording(name: str, values: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and tracing.recorded(values):
        raise RuntimeError(
            f"{name}: a batch is packed by its values, which a tracer would keep for every later batch; give a model "
            "the padded batch (forward), which it traces without packing, or use torch.export or torch.compile"
        )


def from_lengths(lengths: Sequence[int], device: torch.device) -> PackedBatch:
    """Returns the packing of sequences of these lengths, none of them negative; positions count from 0 in each."""
    offsets = np.array([0, *accumulate(lengths)], np.int32)
    cu_seqlens_cpu, n_tokens = torch.from_numpy(offsets), int(offsets[-1])
    plans: dict[Any, Any] = {}
    if torch.device(device).type == "cpu":
        positions = np.arange(n_tokens, dtype=np.int64)
        if len(lengths) > 1:
            positions -= np.repeat(offsets[:-1], lengths)
        cu_seqlens, position_ids = cu_seqlens_cpu, torch.from_numpy(positions)
    else:
        cu_seqlens = to_device(cu_seqlens_cpu, device)
        position_ids = torch.arange(n_tokens, device=device)
        if len(lengths) > 1:
            plans["seq_ids"] = sequence_ids(cu_seqlens, n_tokens)
            position_ids = within_sequences(position_ids, cu_seqlens, plans["seq_ids"])
    return PackedBatch(
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        position_ids=position_ids,
        batch_size=len(lengths),
        padded_length=max(lengths, default=0),
        _plans=plans,
    )


def positions_after_padding(input_ids: torch.Tensor, pad_id: int, batch: PackedBatch | None = None) -> torch.Tensor:
    """RoBERTa's positions of ids, padded (B, S) or packed (T,) with their batch, in int64.

    In each sequence the ids that are not pad_id count from pad_id + 1 on; one that is has pad_id as its position.
    """
    counted = input_ids != pad_id
    numbers = counted.cumsum(-1)
    if batch is not None and batch.batch_size != 1:  # of one long row: what the sequences before have counted goes
        before = torch.nn.functional.pad(numbers, (1, 0)).index_select(0, batch.cu_seqlens[:-1])  # (B,)
        numbers = numbers - before.index_select(0, batch.seq_ids)
    return numbers * counted + pad_id


def pad_rows(x: Any, n_rows: int) -> Any:
    """Pads a tensor (T, ...) to (n_rows, ...) with zeros; returns the same one, or None, where nothing is to do."""
    if x is None or x.shape[0] == n_rows:
        return x
    out = x.new_zeros(n_rows, *x.shape[1:])
    out[: x.shape[0]] = x
    return out


def pack(x: torch.Tensor, batch: PackedBatch, fill: int = 0) -> torch.Tensor:
    """(B, S, ...) -> (T, ...): the rows where tokens are. fill: what rows of padding hold, in a batch that has some."""
    if batch.valid is not None:
        x = x.masked_fill(~_like(batch.valid, x), fill)
    flat = x.reshape(-1, *x.shape[2:])
    return flat if batch.indices is None else flat.index_select(0, batch.indices)


def pad(x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """(T, ...) -> (B, S, ...), zeros at the padding positions."""
    shape = (batch.batch_size, batch.padded_length, *x.shape[1:])
    if batch.valid is not None:
        x = x.reshape(shape)
        return x.masked_fill(~_like(batch.valid, x), 0)
    if batch.indices is None:
        return x.reshape(shape)
    flat = x.new_zeros(batch.batch_size * batch.padded_length, *x.shape[1:])
    return flat.index_copy(0, batch.indices, x).reshape(shape)


def first_rows(x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """(T, H) -> (B, H): the row of each sequence's first token, zeros where there is none, in an `in_place` batch."""
    assert batch.valid is not None
    x = x.reshape(batch.batch_size, batch.padded_length, x.shape[-1])
    is_first = batch.valid & (batch.valid.long().cumsum(1) == 1)  # in ONNX bools have no sum
    return x.masked_fill(~is_first[:, :, None], 0).sum(1)


def _like(valid: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, S) -> (B, S, 1, ...), with as many dimensions as x."""
    for _ in range(x.dim() - 2):
        valid = valid.unsqueeze(-1)
    return valid
