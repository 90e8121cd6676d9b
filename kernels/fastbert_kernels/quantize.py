"""This module quantises rows inside the kernels that produce a GEMM's operand, so that it needs no separate pass.

    scale = max |x| / TOP,    q = round(x / scale),    x ~ q * scale        TOP = 448 (float8_e4m3fn) or 127 (int8)

float8 rounds to nearest, ties to even; int8 to nearest, ties up. A row of zeros has q = 0 and scale 0. A row with a NaN
or an infinity has a scale that is NaN or infinite, so that the result shows it.

int8 has one step for a whole row, and a single large channel makes it coarse for all others. LayerNorm's rows have such
channels. So they are first multiplied by a Hadamard matrix in blocks of 32 channels, and the weight by its inverse. The
product stays the same, and the large value is spread over its block. float8 rows are not rotated, because their step
depends on the value: a rotation would add the errors of large channels to products with weights that were small for
these channels.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; the rotation after Ashkboos et
al., "QuaRot", 2024, arXiv:2404.00456.
"""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.jit import jit

TOP_FLOAT8, TOP_INT8 = tl.constexpr(448.0), tl.constexpr(127.0)
ROTATION = tl.constexpr(32)  # channels in a block of the rotation
TINY = tl.constexpr(1e-30)  # rows with smaller maxima count as zeros: the inverse would overflow


@jit
def quantize_rows(x, INT8: tl.constexpr):
    """(rows, cols) float32, masked columns 0 -> 8-bit (rows, cols) and float32 scales (rows,)."""
    TOP: tl.constexpr = TOP_INT8 if INT8 else TOP_FLOAT8
    # As integers, the bit patterns of magnitudes are ordered as the magnitudes, with NaN above infinity: kept by max.
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    inverse = tl.where(largest < TINY, 0.0, TOP / tl.maximum(largest, TINY))
    scaled = x * inverse[:, None]
    if INT8:
        q = tl.floor(scaled + 0.5).to(tl.int8)
    else:
        q = scaled.to(tl.float8e4nv)
    return q, largest * (1.0 / TOP)


@jit
def rotate_rows(x, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """x (N_ROWS, N_COLS) times the Hadamard matrix of signs in blocks of ROTATION columns, in float32."""
    i = tl.arange(0, ROTATION)
    parity = i[:, None] & i[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = (1 - 2 * (parity & 1)).to(tl.float32).to(x.dtype)  # -1 where i & j has an odd number of bits
    blocks = tl.reshape(x, (N_ROWS * N_COLS // ROTATION, ROTATION))
    return tl.reshape(tl.dot(blocks, signs, input_precision="ieee"), (N_ROWS, N_COLS))
