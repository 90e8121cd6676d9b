"""Packing converts padded (B, S, ...) batches to rows of T tokens, and back.

A batch is unpadded once, at the input of the model. Every layer runs on (T, H). Outputs are padded at most once. The
position is the column index, as in transformers, also for left-padded rows and for masks with zeros between tokens. The
RoBERTa family counts positions in another way: `positions_after_padding`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastbert.ops import masked, tracing
from fastbert.ops.packed_batch import PackedBatch as PackedBatch
from fastbert.ops.packed_batch import count_positions, counted_positions, longest_sequence, offsets_of
from fastbert.ops.packed_batch import sequence_ids as sequence_ids
from fastbert.ops.packed_batch import within_sequences as within_sequences
from fastbert.ops.tracing import untraced

_HOST = torch.device("cpu")
_INTEGERS = torch.int32, torch.int64


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor from the host to the device without waiting; returns a tensor on the device unchanged.

    A GPU copies asynchronously only from pinned memory. For other memory the driver waits until the stream is idle,
    unless the copy has at most 64 kB.
    """
    device = torch.device(device)
    if pins(device) and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pins(device: torch.device) -> bool:
    """Tells whether the device copies asynchronously from pinned memory of the host."""
    return device.type == "cuda"


def on_host(device: torch.device) -> bool:
    """Tells whether the host can read the device's memory without waiting."""
    return device == _HOST or device.type == "cpu"


def takes_from_host(device: torch.device, tensor: torch.Tensor) -> bool:
    """Tells whether the tensor is on the host and the device is a GPU."""
    return pins(device) and tensor.device.type == "cpu"


def wait_for(device: torch.device) -> None:
    """Waits until all launched work of the device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@untraced
def unpad(attention_mask: torch.Tensor, device: torch.device | None = None) -> PackedBatch:
    """Returns the packing of a padded batch. attention_mask: (B, S), any numeric dtype, nonzero for tokens.

    The mask may have zeros between tokens and on the left. A row without tokens becomes a sequence of length 0. device:
    the device of the batch, by default that of the mask. For a mask on a GPU the host waits once, because the number of
    tokens decides the number of rows; for a mask on the host it does not wait.
    """
    _refuse_recording("attention_mask", attention_mask)
    device = attention_mask.device if device is None else device
    if torch.compiler.is_exporting():
        return _unpad_exported(attention_mask)
    valid = attention_mask != 0
    batch_size, padded_length = attention_mask.shape
    if not on_host(valid.device):
        lengths, ends, first = _shape_of(valid)
        if not np.array_equal(lengths, ends):  # padding on the left, or holes
            return _unpad_on_device(valid, lengths, ends, first)
        columns = count_positions(offsets_of(lengths))
        indices = np.repeat(np.arange(batch_size, dtype=np.int64) * padded_length, lengths) + columns
        first_column = padded_length == 0 or bool(first.all())
    else:
        mask = valid.numpy()
        lengths, indices = mask.sum(1, dtype=np.int32), np.flatnonzero(mask)
        columns = indices % max(padded_length, 1)
        first_column = padded_length == 0 or bool(mask[:, 0].all())
    offsets = torch.from_numpy(offsets_of(lengths))
    fields: dict[str, Any] = {
        "cu_seqlens_cpu": offsets,
        "batch_size": batch_size,
        "padded_length": padded_length,
        "first_column": first_column,
        "last_position": int(columns.max(initial=-1)),
        "host_columns": columns,
        "host_indices": indices,
    }
    if device.type == "cpu":
        rows: dict[str, Any] = {"position_ids": torch.from_numpy(columns), "indices": torch.from_numpy(indices)}
        return PackedBatch(cu_seqlens=offsets, **rows, **fields)
    make: dict[str, Any] = {
        "cu_seqlens": lambda batch: to_device(batch.cu_seqlens_cpu, device),
        "position_ids": lambda batch: to_device(torch.from_numpy(columns), device),
        "indices": lambda batch: to_device(torch.from_numpy(indices), device),
    }
    return PackedBatch.later(make, len(indices), device, **fields)


def _shape_of(valid: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each row of a mask its tokens, the end of the last one, and whether the first column has one.

    All are (B,) int32. The host waits for the device, once.
    """
    columns = torch.arange(1, valid.shape[1] + 1, dtype=torch.int32, device=valid.device)
    ends = torch.nn.functional.pad(columns * valid, (1, 0)).amax(1)
    first = torch.nn.functional.pad(valid[:, :1].int(), (0, 1 if valid.shape[1] == 0 else 0))[:, 0]
    lengths, ends, first = torch.stack([valid.sum(1, dtype=torch.int32), ends, first]).cpu().numpy()
    return lengths, ends, first


def _unpad_on_device(valid: torch.Tensor, lengths: np.ndarray, ends: np.ndarray, first: np.ndarray) -> PackedBatch:
    """Packs any mask whose counts the host has: the row of a token is the number of tokens before it."""
    n_rows, device = valid.numel(), valid.device
    offsets = offsets_of(lengths)
    n_tokens = int(offsets[-1])
    flat = valid.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, n_tokens)  # padding goes to an extra row, which is cut off
    indices = torch.empty(n_tokens + 1, dtype=torch.int64, device=device)
    indices = indices.scatter_(0, places, torch.arange(n_rows, device=device))[:n_tokens]
    offsets_cpu = torch.from_numpy(offsets)
    return PackedBatch(
        cu_seqlens=to_device(offsets_cpu, device),
        cu_seqlens_cpu=offsets_cpu,
        position_ids=indices % max(valid.shape[1], 1),
        batch_size=valid.shape[0],
        padded_length=valid.shape[1],
        indices=indices,
        first_column=bool(first.all()),
        last_position=int(ends.max(initial=0)) - 1,
    )


def _unpad_exported(attention_mask: torch.Tensor) -> PackedBatch:
    """Packs a mask whose values torch.export does not know."""
    batch_size, padded_length = attention_mask.shape
    valid = attention_mask != 0
    indices = valid.flatten().nonzero().flatten()
    offsets = torch.zeros(batch_size + 1, dtype=torch.int32, device=valid.device)
    torch.cumsum(valid.sum(1), 0, dtype=torch.int32, out=offsets[1:])
    return PackedBatch(
        cu_seqlens=offsets,
        cu_seqlens_cpu=offsets.cpu(),
        position_ids=indices % max(padded_length, 1),
        batch_size=batch_size,
        padded_length=padded_length,
        indices=indices,
    )


@untraced
def without_padding(batch_size: int, length: int, device: torch.device) -> PackedBatch:
    """Returns the packing of a (B, S) batch in which every position holds a token, without reading a mask."""
    make: dict[str, Any] = {
        "cu_seqlens": lambda batch: torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length,
        "position_ids": lambda batch: torch.arange(length, device=device).repeat(batch_size),
    }
    fields: dict[str, Any] = {
        "cu_seqlens_cpu": torch.from_numpy(np.arange(batch_size + 1, dtype=np.int32) * np.int32(length)),
        "batch_size": batch_size,
        "padded_length": length,
        "last_position": length - 1 if batch_size else -1,
        "counted": True,
    }
    if torch.device(device).type == "cpu":
        return PackedBatch(**{name: value(None) for name, value in make.items()}, **fields)
    return PackedBatch.later(make, batch_size * length, torch.device(device), **fields)


def in_place(like: torch.Tensor, attention_mask: torch.Tensor | None) -> PackedBatch:
    """Returns the packing that keeps all T = B * S rows, with the rows of padding. like: (B, S, ...).

    It is for tracers and transforms, which have no values. Its shapes may be symbolic, and no value is read. Attention
    masks the padding, `pack` fills it and `pad` clears it.
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
        cu_seqlens_cpu=offsets,  # nothing reads it
        position_ids=positions.expand(batch_size, padded_length).reshape(-1),
        batch_size=batch_size,
        padded_length=padded_length,
        valid=valid,
    )


@untraced
def from_cu_seqlens(cu_seqlens: torch.Tensor, n_tokens: int, device: torch.device | str) -> PackedBatch:
    """Returns the packing that cu_seqlens, (B + 1,) int32 on any device, describes; positions start at 0 in each.

    Raises ValueError if cu_seqlens does not start at 0, decreases or does not end at n_tokens; TypeError for its dtype.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in _INTEGERS:
        raise TypeError(f"cu_seqlens: expected dtype int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    _refuse_recording("cu_seqlens", cu_seqlens)
    on_cpu = cu_seqlens if on_host(cu_seqlens.device) else cu_seqlens.cpu()
    if isinstance(device, str):
        device = torch.device(device)
    if makes_later(device):
        inference = torch.is_inference_mode_enabled()  # inference tensors may not be used outside of it
        return PackedBatch.of_fields(_fields_of(on_cpu.numpy().tobytes(), on_cpu.dtype, n_tokens, device, inference))
    longest = longest_sequence(on_cpu, n_tokens)
    return from_offsets(on_cpu.numpy().astype(np.int32), longest, device)  # a copy, which the caller cannot change


def makes_later(device: torch.device) -> bool:
    """Tells whether a batch's tensors on the device are made at their first use, as for a GPU."""
    return device.type != "cpu"


@functools.lru_cache(maxsize=64)
def _fields_of(
    numbers: bytes, dtype: torch.dtype, n_tokens: int, device: torch.device, inference: bool
) -> dict[str, Any]:
    """Returns the fields of a batch on a GPU. numbers: the bytes of its checked offsets.

    They are kept for the last lengths, because many programs run batches of a few forms. inference: whether inference
    mode is on, because its tensors must not be kept for other modes.
    """
    cu_seqlens = torch.frombuffer(bytearray(numbers), dtype=dtype)
    longest = longest_sequence(cu_seqlens, n_tokens)
    if dtype != torch.int32:
        cu_seqlens = cu_seqlens.int()
        numbers = cu_seqlens.numpy().tobytes()
    return _fields_on_a_gpu(cu_seqlens, numbers, n_tokens, device, longest)


@untraced
def find_holes(batch: PackedBatch) -> None:
    """Sets the batch's `columns` if its mask has zeros between tokens, for operations that depend on distances.

    If the batch was padded and its mask is on a GPU, the host waits.
    """
    if batch.indices is None or batch.columns is not None or batch.valid is not None:
        return

    indices, host_columns = batch.indices, batch.host_columns

    def make() -> torch.Tensor | None:
        if host_columns is not None and not torch.compiler.is_exporting():
            return to_device(torch.from_numpy(host_columns.astype(np.int32)), batch.device) if has_gaps() else None
        columns = indices % max(batch.padded_length, 1)
        rows = torch.arange(batch.n_tokens, device=batch.device)
        starts = within_sequences(columns - rows, -batch.cu_seqlens.long(), batch.seq_ids)
        first = starts.index_select(0, batch.cu_seqlens.long().index_select(0, batch.seq_ids))
        some = torch.compiler.is_exporting() or bool((starts != first).any())  # an exporter has no values
        return columns.int() if some else None

    def has_gaps() -> bool:
        assert host_columns is not None
        steps, firsts = np.diff(host_columns), batch.cu_seqlens_cpu.numpy()[1:-1]
        steps[firsts[(firsts > 0) & (firsts < batch.n_tokens)] - 1] = 1  # from one sequence to the next
        return bool((steps != 1).any())

    batch.columns = batch.plan("holes", make)


def _refuse_recording(name: str, values: torch.Tensor) -> None:
    if tracing.recorded(values) and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: a batch is packed by its values, which a tracer would store as constants; give a model "
            "the padded batch (forward), which it traces without packing, or use torch.export or torch.compile"
        )


def from_lengths(lengths: Sequence[int], device: torch.device) -> PackedBatch:
    """Returns the packing of sequences of these lengths, none of them negative; positions count from 0 in each."""
    return from_offsets(offsets_of(lengths), max(lengths, default=0), torch.device(device))


def from_offsets(offsets: np.ndarray, longest: int, device: torch.device) -> PackedBatch:
    """Returns the packing of sequences with these offsets, (B + 1,) int32 on the host, which must not change later.

    longest: the greatest sequence length.
    """
    cu_seqlens = torch.from_numpy(offsets)
    if makes_later(device):
        return PackedBatch.of_fields(_fields_on_a_gpu(cu_seqlens, offsets.tobytes(), int(offsets[-1]), device, longest))
    return PackedBatch(
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens,
        position_ids=torch.from_numpy(count_positions(offsets)),
        batch_size=len(offsets) - 1,
        padded_length=longest,
        indices=None,
        last_position=longest - 1,
    )


def _fields_on_a_gpu(
    cu_seqlens: torch.Tensor, numbers: bytes, n_tokens: int, device: torch.device, longest: int
) -> dict[str, Any]:
    """Returns the fields of a batch whose tensors on the device are made at their first use.

    cu_seqlens: (B + 1,) int32 on the host; numbers: their bytes.
    """
    return PackedBatch.fields_later(
        _MADE_LATER,
        n_tokens,
        device,
        cu_seqlens_cpu=cu_seqlens,
        batch_size=cu_seqlens.shape[0] - 1,
        padded_length=longest,
        last_position=longest - 1,
        counted=True,
        _offsets=numbers,
    )


_MADE_LATER: dict[str, Any] = {
    "cu_seqlens": lambda batch: to_device(batch.cu_seqlens_cpu, batch.device),
    "position_ids": counted_positions,
}


def positions_after_padding(input_ids: torch.Tensor, pad_id: int, batch: PackedBatch | None = None) -> torch.Tensor:
    """Returns RoBERTa's positions of ids, int64. The ids are padded (B, S), or packed (T,) with their batch.

    In each sequence the ids that are not pad_id count from pad_id + 1. The position of pad_id is pad_id.
    """
    counted = input_ids != pad_id
    numbers = counted.cumsum(-1)
    if batch is not None and batch.batch_size != 1:  # subtracts the counts of earlier sequences
        here = on_host(input_ids.device)
        offsets = batch.cu_seqlens_cpu if here else batch.cu_seqlens
        sequences = sequence_ids(offsets, batch.n_tokens) if here else batch.seq_ids
        before = torch.nn.functional.pad(numbers, (1, 0)).index_select(0, offsets[:-1])  # (B,)
        numbers = numbers - before.index_select(0, sequences)
    return numbers * counted + pad_id


def pad_rows(x: Any, n_rows: int) -> Any:
    """Pads a tensor (T, ...) to (n_rows, ...) with zeros; returns a tensor of that size, or None, unchanged."""
    if x is None or x.shape[0] == n_rows:
        return x
    out = x.new_zeros(n_rows, *x.shape[1:])
    out[: x.shape[0]] = x
    return out


def pack(x: torch.Tensor, batch: PackedBatch, fill: int = 0) -> torch.Tensor:
    """Packs (B, S, ...) -> (T, ...): the rows of tokens. fill: the value for padding, in a batch that keeps it."""
    if batch.mask is not None:
        return masked.pack(x, batch, fill)
    if batch.valid is not None:
        x = x.masked_fill(~_like(batch.valid, x), fill)
    flat = x.reshape(-1, *x.shape[2:])
    if batch.host_indices is not None and on_host(x.device):
        return flat.index_select(0, torch.from_numpy(batch.host_indices))
    if batch.indices is None:
        return flat
    return (flat if on_host(batch.device) else to_device(flat, batch.device)).index_select(0, batch.indices)


def pad(x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Pads (T, ...) -> (B, S, ...), with zeros at the padding positions."""
    if batch.mask is not None:
        return masked.pad(x, batch)
    shape = (batch.batch_size, batch.padded_length, *x.shape[1:])
    if batch.valid is not None:
        x = x.reshape(shape)
        return x.masked_fill(~_like(batch.valid, x), 0)
    if batch.indices is None:
        return x.reshape(shape)
    flat = x.new_zeros(batch.batch_size * batch.padded_length, *x.shape[1:])
    return flat.index_copy(0, batch.indices, x).reshape(shape)


def first_rows(x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Returns the row of each sequence's first token, (T, H) -> (B, H); in an `in_place` batch zeros without one."""
    assert batch.valid is not None
    x = x.reshape(batch.batch_size, batch.padded_length, x.shape[-1])
    is_first = batch.valid & (batch.valid.long().cumsum(1) == 1)  # ONNX cannot sum bools
    return x.masked_fill(~is_first[:, :, None], 0).sum(1)


def _like(valid: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshapes (B, S) -> (B, S, 1, ...), with as many dimensions as x."""
    for _ in range(x.dim() - 2):
        valid = valid.unsqueeze(-1)
    return valid
