"""This module has the epilogue that quantized_linear.py and quantized_linear_persistent.py share."""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.gelu import activate
from fastbert_kernels.jit import jit

OUT_GROUP = 128  # columns of a quantised result that share a scale


@jit
def scaled_epilogue(
    sums,  # (rows, cols) float32 or int32
    row_scale,  # (rows,), of sums that are not scaled yet, or None
    weight_scale_ptr,  # (M,)
    bias_ptr,  # (M,)
    col_offs,  # (cols,)
    n_cols,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,  # of the output
):
    """activation(sums * weight_scale * row_scale + bias), in float32. Columns past the end are 0, as GELU of 0 is."""
    out = sums.to(tl.float32) * tl.load(weight_scale_ptr + col_offs, mask=col_offs < n_cols, other=0.0)[None, :]
    if ROW_SCALE:
        out *= row_scale[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + col_offs, mask=col_offs < n_cols, other=0.0).to(tl.float32)[None, :]
    return activate(out, ACTIVATION, DTYPE)


@jit
def gate(first, second, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """activation(first) * second, elementwise, in float32. DTYPE: of the output."""
    if ACTIVATION == "silu":
        out = first * second / (1.0 + tl.exp(-first))
    else:
        out = activate(first, ACTIVATION, DTYPE) * second
    return out
