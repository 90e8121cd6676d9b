"""This module holds shared code of linear.py and linear_persistent.py: the order of tiles and the epilogue."""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.gelu import activate
from fastbert_kernels.jit import jit

ALIGNMENT = 16  # bytes: the alignment for wide loads and tensor descriptors


@jit
def tile_of(index, n_row_blocks, n_col_blocks, GROUP_ROWS: tl.constexpr):
    """(row block, column block) of a tile: down the rows of a group, then on to the group's next column."""
    group_size = GROUP_ROWS * n_col_blocks
    first_row_block = (index // group_size) * GROUP_ROWS
    group_rows = tl.minimum(n_row_blocks - first_row_block, GROUP_ROWS)
    return first_row_block + (index % group_size) % group_rows, (index % group_size) // group_rows


@jit
def add_bias(acc, bias_ptr, col_offs, n_cols, HAS_BIAS: tl.constexpr):
    """Adds the bias to the sums (BLOCK_ROWS, BLOCK_COLS), in float32."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + col_offs, mask=col_offs < n_cols, other=0.0).to(tl.float32)[None, :]
    return acc


@jit
def epilogue(
    acc,  # (BLOCK_ROWS, BLOCK_COLS) float32, with the bias
    residual_ptr,  # (T, M)
    row_offs,  # (BLOCK_ROWS,)
    col_offs,  # (BLOCK_COLS,)
    mask,  # (BLOCK_ROWS, BLOCK_COLS)
    residual_row_stride,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr,  # of the output
):
    """activation(acc) + residual, in float32."""
    out = activate(acc, ACTIVATION, DTYPE)
    if HAS_RESIDUAL:
        residual_offs = row_offs.to(tl.int64)[:, None] * residual_row_stride + col_offs[None, :]
        out += tl.load(residual_ptr + residual_offs, mask=mask, other=0.0).to(tl.float32)
    return out
