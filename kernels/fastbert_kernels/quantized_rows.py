"""This kernel quantises rows that do not come from a kernel with an 8-bit result: one scale a row, optionally rotated.

    q, scale = as in quantize.py,    x: (R, C) fp32 / bf16 / fp16,    q: (R, C),    scale: (R,) float32

C up to 4096. Bytes moved: (2 + 1) * R * C in 16 bits. Heads with one scale each are separate rows: (T * N, D).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import quantize_normalized
from fastbert_kernels.quantize import quantize_rows


@jit(do_not_specialize=["n_rows"])
def _quantized_rows_kernel(
    x_ptr,  # (R, C)
    q_ptr,  # (R, C)
    q_scale_ptr,  # (R,)
    n_rows,
    N_COLS: tl.constexpr,
    INT8: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.arange(0, BLOCK_COLS)
    mask = (row_offs < n_rows)[:, None] & (col_offs < N_COLS)[None, :]
    offs = row_offs[:, None] * N_COLS + col_offs[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if ROTATED:
        q, scale = quantize_normalized(x, INT8, BLOCK_ROWS, BLOCK_COLS)
    else:
        q, scale = quantize_rows(x.to(tl.float32), INT8)
    tl.store(q_ptr + offs, q, mask=mask)
    tl.store(q_scale_ptr + row_offs, scale, mask=row_offs < n_rows)


def quantized_rows_forward(x: torch.Tensor, dtype: torch.dtype, rotated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises (R, C), contiguous, to dtype, float8_e4m3fn or int8. Returns it and the scales, (R, 1) float32.

    rotated: whether int8 rows are rotated; C must then be a multiple of 32.
    """
    n_rows, n_cols = x.shape
    q, scale = (
        launch.empty((n_rows, n_cols), like=x, dtype=dtype),
        launch.empty((n_rows, 1), like=x, dtype=torch.float32),
    )
    if n_rows == 0:
        return q, scale
    config = configs.rowwise_config(n_cols)
    # Grid: one program per BLOCK_ROWS whole rows.
    launch.run(
        _quantized_rows_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]),),
        config,
        x_ptr=x,
        q_ptr=q,
        q_scale_ptr=scale,
        n_rows=n_rows,
        N_COLS=n_cols,
        INT8=dtype == torch.int8,
        ROTATED=rotated,
    )
    return q, scale
