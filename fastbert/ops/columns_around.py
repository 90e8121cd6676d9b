"""This module finds the rows in the columns around a token of packed sequences, for a convolution and for a window."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import recording
from fastbert.ops.packed_batch import PackedBatch


def beside(x: Tensor, batch: PackedBatch, size: int) -> Tensor:
    """Joins the rows of `size` columns around each token, with zeros for missing tokens: (T, size * H)."""
    if recording.on and recording.is_dry():
        return recording.stand_in((x.shape[0], size * x.shape[1]), x.dtype)
    zero = x.new_zeros(1, x.shape[1])
    near = batch.plan(("columns around", size), lambda: _rows_around(batch, x.shape[0], size))
    return torch.cat([x, zero]).index_select(0, near.flatten()).view(x.shape[0], size * x.shape[1])


def _rows_around(batch: PackedBatch, n_rows: int, size: int) -> Tensor:
    """Returns the row of the token in each column around each token, (T, size) int64; T for a missing token."""
    device, half = batch.device, size // 2
    rows, offsets = torch.arange(n_rows, device=device)[:, None], torch.arange(-half, half + 1, device=device)
    if batch.valid is not None:
        columns = batch.position_ids.long()[:, None] + offsets
        inside = (columns >= 0) & (columns < batch.padded_length)
        around = (rows + offsets).clamp(0, n_rows - 1)
        valid = batch.valid.flatten()[around.flatten()].view(around.shape)
        return torch.where(inside & valid, around, n_rows)
    last = batch.cu_seqlens[-1:].long()  # rows from there on belong to no sequence
    sequences = torch.searchsorted(batch.cu_seqlens[1:].long(), rows[:, 0].contiguous(), right=True)
    if batch.columns is None:
        starts = batch.cu_seqlens.long().index_select(0, sequences.clamp(max=batch.cu_seqlens.shape[0] - 1))
        columns = rows[:, 0] - starts
    else:
        columns = torch.nn.functional.pad(batch.columns.long(), (0, n_rows - batch.columns.shape[0]))
    # One number encodes sequence and column. It grows from row to row.
    width = batch.padded_length + size
    place = torch.where(rows[:, 0] < last, sequences * width + columns + half, sequences * width + width * n_rows)
    wanted = place[:, None] + offsets
    row = torch.searchsorted(place, wanted.contiguous()).clamp(max=n_rows - 1)
    return torch.where(place[row.flatten()].view(row.shape) == wanted, row, n_rows)


def ranges_of(batch: PackedBatch, window: int) -> Tensor | None:
    """Returns the first row and the end of the rows in each row's window, (T, 2) int32, for any mask."""
    columns = batch.columns
    if columns is None:
        return None

    def make() -> Tensor:
        first = batch.seq_ids.long() << 32  # so that all columns of the batch ascend
        places = first + columns.long()
        starts = torch.searchsorted(places, torch.maximum(places - window, first))
        return torch.stack([starts, torch.searchsorted(places, places + window, right=True)], 1).int()

    ranges: Tensor = batch.plan(("window", window), make)
    return ranges
