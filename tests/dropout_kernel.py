"""A kernel stores the mask that it draws, for tests."""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import dropout as drawing
from fastbert_kernels import launch
from fastbert_kernels.dropout import keep_bits_from, keep_columns, spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout


@jit(do_not_specialize=["n_rows", "first_row", "head", *drawing.DO_NOT_SPECIALIZE])
def _draw_kernel(
    out_ptr,  # (R, C) int32
    n_rows,
    n_columns,
    first_row,
    head,
    out_row_stride,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    BY_BITS: tl.constexpr,
    HIDDEN: tl.constexpr,  # the head is 0
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1) * BLOCK_COLS
    columns = start + tl.arange(0, BLOCK_COLS)
    packed = first_row + rows
    if BY_BITS:
        N_GROUPS: tl.constexpr = min(BLOCK_COLS // 8, 4)
        firsts = start + 8 * tl.reshape(tl.arange(0, BLOCK_COLS // 8), (1, BLOCK_COLS // 8 // N_GROUPS, N_GROUPS))
        bits = keep_bits_from(firsts, packed[:, None, None], head, key_low, key_high, site, threshold)
        kept = spread_columns(bits)
    else:
        groups = start // 8 + tl.arange(0, BLOCK_COLS // 8)
        kept = keep_columns(packed, groups, 0 if HIDDEN else head, key_low, key_high, site, threshold)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(out_ptr + rows[:, None] * out_row_stride + columns[None, :], kept.to(tl.int32), mask=mask)


def draw(
    out: torch.Tensor,
    dropout: Dropout,
    head: int,
    by_bits: bool,
    block_rows: int,
    block_columns: int,
    first_row: int = 0,
) -> None:
    """Fills out, (R, C) int32, with the mask of its rows, which are packed rows from first_row on."""
    n_rows, n_columns = out.shape
    launch.run(
        _draw_kernel,
        (launch.cdiv(n_rows, block_rows), launch.cdiv(n_columns, block_columns)),
        {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_columns, "num_warps": 1, "num_stages": 1},
        out_ptr=out,
        n_rows=n_rows,
        n_columns=n_columns,
        first_row=first_row,
        head=head,
        out_row_stride=out.stride(0),
        BY_BITS=by_bits,
        HIDDEN=head == 0,
        **drawing.arguments(dropout),
    )
