"""This module adds the gradients of tokens to the rows of a table, in a fixed order and without atomics.

    out[v] = sum of grad[t] over the tokens t with ids[t] = v, in the order of t;    0 for padding_idx

grad: (T, E), fp32 / bf16 / fp16; ids: (T,); out: (V, E), float32 or the table's dtype. Sums in float32. The tokens are
sorted by id, stably, once a batch (`segments_of`). The tokens of one id are then a segment. It may be empty, or have
thousands of rows, such as those of [CLS] and [SEP], of a token type, or of position 0. Such segments are added in two
steps. Sorted tokens are cut into pieces of 64:

    sorted ids    0 0 0 0 | 0 0 0 0 | 0 0 1 1 | 4 4 4 4
    pieces        added   | added   |         | added          each piece of one id, by a program of its own
    out[0]        piece 0 + piece 1 + 2 rows                   by the program of the segment

Bytes moved: T * E elements of grad read, V * E elements of out written, and less than T * E / 16 for the pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit

PIECE = 64
PIECE_ROWS = tl.constexpr(PIECE)


class Segments(NamedTuple):
    """A `Segments` holds the tokens of each id: order[offsets[v] : offsets[v + 1]] for v, in ascending order."""

    order: torch.Tensor  # (T,) int64
    offsets: torch.Tensor  # (V + 1,) int64
    sorted_ids: torch.Tensor  # (T,)


def segments_of(ids: torch.Tensor, n_ids: int) -> Segments:
    """Sorts the ids (T,), integers from 0 to n_ids - 1. The host does not read them."""
    # A radix sort takes a pass for each byte of the numbers.
    narrow = ids.to(torch.int16 if n_ids <= torch.iinfo(torch.int16).max else torch.int32)
    sorted_ids, order = torch.sort(narrow, stable=True)
    bounds = torch.arange(n_ids + 1, dtype=narrow.dtype, device=ids.device)
    return Segments(order, torch.searchsorted(sorted_ids, bounds), sorted_ids)


@jit
def _gathered(grad_ptr, order_ptr, places, last, row_stride, col_offs, col_mask):
    """Rows of grad, in float32, of the sorted tokens at places; 0 from place `last` on."""
    row_mask = places < last
    rows = tl.load(order_ptr + places, mask=row_mask, other=0)
    offs = rows[:, None] * row_stride + col_offs[None, :]
    return tl.load(grad_ptr + offs, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)


@jit
def _pieces_kernel(
    grad_ptr,  # (T, E)
    order_ptr,  # (T,)
    sorted_ids_ptr,  # (T,)
    pieces_ptr,  # (T / PIECE, E)
    grad_row_stride,
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE_ROWS
    end = start + PIECE_ROWS
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    if tl.load(sorted_ids_ptr + start) == tl.load(sorted_ids_ptr + end - 1):
        for first in range(0, PIECE_ROWS, BLOCK_ROWS):
            places = start + first + tl.arange(0, BLOCK_ROWS)
            sums += _gathered(grad_ptr, order_ptr, places, end, grad_row_stride, col_offs, col_mask)
    tl.store(pieces_ptr + piece * N_COLS + col_offs, tl.sum(sums, axis=0), mask=col_mask)


@jit(do_not_specialize=["padding_idx"])
def _segments_kernel(
    grad_ptr,  # (T, E)
    order_ptr,  # (T,)
    offsets_ptr,  # (V + 1,)
    pieces_ptr,  # (T / PIECE, E)
    out_ptr,  # (V, E)
    grad_row_stride,
    padding_idx,  # -1 where there is none
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    if row == padding_idx:
        end = start
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    first_piece, last_piece = (start + PIECE_ROWS - 1) // PIECE_ROWS, end // PIECE_ROWS
    # Rows before the first whole piece, pieces, rows after the last one; without a piece all rows are the former.
    head_end = tl.where(first_piece < last_piece, first_piece * PIECE_ROWS, end)
    tail_start = tl.where(first_piece < last_piece, last_piece * PIECE_ROWS, end)
    steps = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(start, head_end, BLOCK_ROWS):
        sums += _gathered(grad_ptr, order_ptr, first + steps, head_end, grad_row_stride, col_offs, col_mask)
    for first in range(first_piece, last_piece, BLOCK_ROWS):
        mask = (first + steps < last_piece)[:, None] & col_mask[None, :]
        sums += tl.load(pieces_ptr + (first + steps)[:, None] * N_COLS + col_offs[None, :], mask=mask, other=0.0)
    for first in range(tail_start, end, BLOCK_ROWS):
        sums += _gathered(grad_ptr, order_ptr, first + steps, end, grad_row_stride, col_offs, col_mask)
    out = tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * N_COLS + col_offs, out, mask=col_mask)


def embedding_backward(
    grad: torch.Tensor, segments: Segments, dtype: torch.dtype, padding_idx: int | None = None
) -> torch.Tensor:
    """Adds gradients of tokens, (T, E), to the table's, (V, E), in dtype. grad needs unit stride along E.

    segments: the segments of the tokens' ids. padding_idx: an id whose row gets no gradient.
    """
    n_rows, n_cols = segments.offsets.shape[0] - 1, grad.shape[1]
    out = launch.empty((n_rows, n_cols), like=grad, dtype=dtype)
    pieces = _pieces(grad, segments)
    config = configs.segments_config(n_rows, n_cols)
    # Grid: a program for every row of the table and block of columns.
    launch.run(
        _segments_kernel,
        (n_rows, launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        grad_ptr=grad,
        order_ptr=segments.order,
        offsets_ptr=segments.offsets,
        pieces_ptr=pieces,
        out_ptr=out,
        grad_row_stride=grad.stride(0),
        padding_idx=-1 if padding_idx is None else padding_idx,
        N_COLS=n_cols,
    )
    return out


def _pieces(grad: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Adds the rows of each whole piece of sorted tokens that has one id; zeros for the other pieces."""
    n_pieces, n_cols = grad.shape[0] // PIECE, grad.shape[1]
    pieces = launch.empty((n_pieces, n_cols), like=grad, dtype=torch.float32)
    if n_pieces == 0:
        return pieces
    config = configs.pieces_config(n_cols)
    # Grid: a program for every piece and block of columns.
    launch.run(
        _pieces_kernel,
        (n_pieces, launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        grad_ptr=grad,
        order_ptr=segments.order,
        sorted_ids_ptr=segments.sorted_ids,
        pieces_ptr=pieces,
        grad_row_stride=grad.stride(0),
        N_COLS=n_cols,
    )
    return pieces
