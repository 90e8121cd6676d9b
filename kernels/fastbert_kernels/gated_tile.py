"""This module holds the shared code of the two gated linears in 16 or 32 bits: a tile of both halves, and its gate."""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.gated import activate_gate
from fastbert_kernels.jit import jit


@jit
def half_and_place(BLOCK_COLS: tl.constexpr, PAIRS: tl.constexpr):
    """Returns which half of the weight, 0 or 1, each column of a tile is of, and its place there, (BLOCK_COLS,) each.

    With PAIRS the two columns that are multiplied with one another are neighbours, else they lie half a tile apart.
    """
    cols = tl.arange(0, BLOCK_COLS)
    if PAIRS:
        half, place = cols % 2, cols // 2
    else:
        half, place = cols // (BLOCK_COLS // 2), cols % (BLOCK_COLS // 2)
    return half, place


@jit
def gated_epilogue(
    acc,  # (rows, 2 * cols) float32, columns as `half_and_place` has them
    bias_ptr,  # (2 I,)
    col_offs,  # (cols,)
    n_cols,  # I
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the output
):
    """activation(first half + bias) * (second half + bias), (rows, cols), in float32."""
    N_ROWS: tl.constexpr = acc.shape[0]
    N_COLS: tl.constexpr = acc.shape[1] // 2
    if PAIRS:
        first, second = tl.split(tl.reshape(acc, (N_ROWS, N_COLS, 2)))
    else:
        first, second = tl.split(tl.permute(tl.reshape(acc, (N_ROWS, 2, N_COLS)), (0, 2, 1)))
    if HAS_BIAS:
        col_mask = col_offs < n_cols
        first += tl.load(bias_ptr + col_offs, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias_ptr + n_cols + col_offs, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return activate_gate(first, ACTIVATION, DTYPE) * second
