"""This kernel adds a residual and normalises the sum in one pass, for pre-norm layers.

    sum = x + residual,    out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + ln_bias

x, residual, sum, out: (T, H), fp32 / bf16 / fp16; weight, ln_bias: (H,), ln_bias may be missing. H up to 4096. The sum
is rounded to its dtype before it is normalised, so the bits are those of a separate addition and LayerNorm. These move
5 * T * H elements, this kernel moves 4 * T * H, and they need one launch more. Arithmetic in float32, as in
layer_norm.py.

In 8 bits the normalised rows are quantised at once (int8: rotated), and not stored in another dtype. A row's bits do
not depend on the batch, because a tile holds whole rows.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, dependent, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import load_bias, normalize_rows, quantize_normalized


@jit(do_not_specialize=["n_rows"])
def _sum_norm_kernel(
    x_ptr,  # (T, H)
    residual_ptr,  # (T, H)
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,) or None
    sum_ptr,  # (T, H), or None if it is not needed
    out_ptr,  # (T, H), or None where QUANTIZE
    q_ptr,  # (T, H), 8-bit, where QUANTIZE
    q_scale_ptr,  # (T,)
    n_rows,
    x_row_stride,
    residual_row_stride,
    eps,
    N_COLS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < N_COLS)[None, :]
    mask = (row_offs < n_rows)[:, None] & col_mask
    offs = row_offs[:, None] * N_COLS + col_offs[None, :]

    x = tl.load(x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :], mask=mask, other=0.0).to(tl.float32)
    residual_offs = row_offs[:, None] * residual_row_stride + col_offs[None, :]
    x += tl.load(residual_ptr + residual_offs, mask=mask, other=0.0).to(tl.float32)
    x = x.to(x_ptr.dtype.element_ty)
    if sum_ptr is not None:
        tl.store(sum_ptr + offs, x, mask=mask)

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = load_bias(ln_bias_ptr, col_offs, N_COLS)
    normalized, _, _ = normalize_rows(x.to(tl.float32), col_mask, N_COLS, eps)
    out = (normalized * weight[None, :] + ln_bias[None, :]).to(x_ptr.dtype.element_ty)
    if QUANTIZE:
        q, scale = quantize_normalized(out, INT8, BLOCK_ROWS, BLOCK_COLS)
        tl.store(q_ptr + offs, q, mask=mask)
        tl.store(q_scale_ptr + row_offs, scale, mask=row_offs < n_rows)
    else:
        tl.store(out_ptr + offs, out, mask=mask)


def sum_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    keep_sum: bool = True,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Computes the sum, None unless keep_sum, and the normalised rows, (T, H) each, in x's dtype.

    x and residual need unit stride along H. quantized: contiguous buffers (T, H), float8_e4m3fn or int8, and (T, 1)
    float32, for the normalised rows in 8 bits and their scales; then the first buffer is returned in their place.
    """
    n_rows, n_cols = x.shape
    total = launch.empty((n_rows, n_cols), like=x) if keep_sum else None
    out = launch.empty((n_rows, n_cols), like=x) if quantized is None else quantized[0]
    if n_rows == 0:
        return total, out
    config = configs.rowwise_config(n_cols)
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    grid, facts = (launch.cdiv(n_rows, config["BLOCK_ROWS"]),), None  # one program per BLOCK_ROWS whole rows
    if quantized is None and n_rows > 1 and (dtypes := launch.alike(x, residual, weight, ln_bias, total, out)):
        facts, head = (dtypes, n_cols, eps), (x, residual, weight, ln_bias, total, out, None, None, n_rows)
        if launch.again(_sum_norm_kernel, grid, config, facts, *head):
            return total, out
    launch.run_first(
        _sum_norm_kernel,
        grid,
        config,
        facts,
        9,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        sum_ptr=total,
        out_ptr=out if quantized is None else None,
        q_ptr=quantized[0] if quantized is not None else None,
        q_scale_ptr=quantized[1] if quantized is not None else None,
        n_rows=n_rows,
        x_row_stride=x.stride(0),
        residual_row_stride=residual.stride(0),
        eps=eps,
        N_COLS=n_cols,
        QUANTIZE=quantized is not None,
        INT8=out.dtype == torch.int8,
    )
    return total, out
