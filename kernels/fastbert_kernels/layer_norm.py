"""This module has kernels that add a bias and a residual, then apply LayerNorm, in one pass.

    out = (x' - mean(x')) / sqrt(var(x') + eps) * weight + ln_bias,    x' = x + bias + residual
    for training                                                       x' = dropout(x + bias) + residual

x, residual, out: (T, H), fp32 / bf16 / fp16; bias, weight, ln_bias: (H,). H up to 4096, any value. In inference ln_bias
is None for a norm without one.
All arithmetic is float32, the variance is the mean squared distance from the mean (no cancellation), and there is one
rounding, at the store. Bytes moved: read x and residual, write out: 3 * T * H elements.

For training, x has the dtype C of products, and residual and out have the dtype S of hidden states between layers. A
separate kernel, so that inference has no more arguments, saves the data of the backward pass: x' rounded to C (T * H
elements more), and the mean and 1 / sqrt(var + eps) of each row, in float32. If S is not C, it can return out in both.

A row's bits do not depend on the batch: a tile holds whole rows, and each row is summed by the same tree, which depends
only on H, at any place in its tile.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, dependent, launch, masks, tables
from fastbert_kernels import dropout as drawing
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.dropout import GROUP, keep_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout
from fastbert_kernels.quantize import quantize_rows, rotate_rows


@jit
def normalize_rows(x, col_mask, n_cols, eps):
    """Rows of the float32 tile x (rows, cols), masked columns 0, to mean 0 and variance 1; masked columns undefined.

    Returns the mean and 1 / sqrt(variance + eps) of each row as well.
    """
    mean = tl.sum(x, axis=1) / n_cols
    centered = tl.where(col_mask, x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / n_cols
    rstd = 1.0 / tl.sqrt(variance + eps)
    return centered * rstd[:, None], mean, rstd


@jit
def load_bias(ptr, col_offs, N_COLS: tl.constexpr):
    """Loads a vector, (cols,) float32, which is zeros where its pointer is None."""
    if ptr is not None:
        bias = tl.load(ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros_like(col_offs).to(tl.float32)
    return bias


@jit
def quantize_normalized(x, INT8: tl.constexpr, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """Normalised rows, as they are stored, masked columns 0 -> 8-bit rows and scales; int8 rows are rotated."""
    if INT8:
        rotated = rotate_rows(x, N_ROWS, N_COLS)
        q, scale = quantize_rows(rotated, INT8)
    else:
        q, scale = quantize_rows(x.to(tl.float32), INT8)
    return q, scale


@jit
def drop_columns(x, row_offs, key_low, key_high, site, threshold, keep_scale, N_COLS: tl.constexpr):
    """Dropout of the float32 tile x (rows, N_COLS) of the packed rows row_offs."""
    kept = keep_columns(row_offs, tl.arange(0, N_COLS // GROUP), 0, key_low, key_high, site, threshold)
    return tl.where(kept, x * keep_scale, 0.0)


@jit(do_not_specialize=["n_rows"])
def _bias_residual_layer_norm_kernel(
    x_ptr,  # (T, H)
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H)
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,) or None
    out_ptr,  # (T, H)
    q_ptr,  # (T, H), 8-bit, where QUANTIZE
    q_scale_ptr,  # (T,)
    n_rows,
    x_row_stride,
    residual_row_stride,
    out_row_stride,
    eps,
    N_COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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

    x = tl.load(x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
        x += bias[None, :]
    if HAS_RESIDUAL:
        residual_offs = row_offs[:, None] * residual_row_stride + col_offs[None, :]
        x += tl.load(residual_ptr + residual_offs, mask=mask, other=0.0).to(tl.float32)

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = load_bias(ln_bias_ptr, col_offs, N_COLS)
    normalized, _, _ = normalize_rows(x, col_mask, N_COLS, eps)
    out = normalized * weight[None, :] + ln_bias[None, :]

    out_offs = row_offs[:, None] * out_row_stride + col_offs[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offs, out, mask=mask)
    if QUANTIZE:
        q, scale = quantize_normalized(out, INT8, BLOCK_ROWS, BLOCK_COLS)
        tl.store(q_ptr + row_offs[:, None] * N_COLS + col_offs[None, :], q, mask=mask)
        tl.store(q_scale_ptr + row_offs, scale, mask=row_offs < n_rows)


@jit(do_not_specialize=["n_rows", *drawing.DO_NOT_SPECIALIZE])
def _residual_norm_kernel(
    x_ptr,  # (T, H) C
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H) S
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H) S
    low_ptr,  # (T, H) C, or None
    total_ptr,  # (T, H) C
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    n_rows,
    x_row_stride,
    residual_row_stride,
    eps,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    N_COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < n_rows
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < N_COLS)[None, :]
    mask = row_mask[:, None] & col_mask

    x = tl.load(x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        x = drop_columns(x, row_offs, key_low, key_high, site, threshold, keep_scale, BLOCK_COLS)
    if HAS_RESIDUAL:
        residual_offs = row_offs[:, None] * residual_row_stride + col_offs[None, :]
        x += tl.load(residual_ptr + residual_offs, mask=mask, other=0.0).to(tl.float32)

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    normalized, mean, rstd = normalize_rows(x, col_mask, N_COLS, eps)
    out = normalized * weight[None, :] + ln_bias[None, :]

    offs = row_offs[:, None] * N_COLS + col_offs[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if LOW:
        tl.store(low_ptr + offs, out.to(low_ptr.dtype.element_ty), mask=mask)
    tl.store(total_ptr + offs, x.to(total_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row_offs, mean, mask=row_mask)
    tl.store(rstd_ptr + row_offs, rstd, mask=row_mask)


def bias_residual_layer_norm_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises x + bias + residual: (T, H) -> (T, H) in x's dtype. x and residual need unit stride along H.

    ln_bias None: zeros. out: memory for the result, with unit stride along H, which may be x itself; None for new
    memory. quantized: contiguous buffers (T, H), float8_e4m3fn or int8, and (T, 1) float32, for the same rows in 8 bits
    (int8: rotated) and their scales (see `quantize`).
    """
    n_rows, n_cols = x.shape
    if out is None:
        out = launch.empty((n_rows, n_cols), like=x)
    if n_rows == 0:
        return out
    config = configs.rowwise_config(n_cols)
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    grid = (launch.cdiv(n_rows, config["BLOCK_ROWS"]),)  # one program per BLOCK_ROWS whole rows
    kernel, facts = _bias_residual_layer_norm_kernel, None
    if quantized is None and n_rows > 1 and (dtypes := launch.alike(x, bias, residual, weight, ln_bias, out)):
        facts = dtypes, n_cols, eps
        if launch.again(kernel, grid, config, facts, x, bias, residual, weight, ln_bias, out, None, None, n_rows):
            return out
    launch.run_first(
        kernel,
        grid,
        config,
        facts,
        9,
        x_ptr=x,
        bias_ptr=bias,
        residual_ptr=residual,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        out_ptr=out,
        q_ptr=quantized[0] if quantized is not None else None,
        q_scale_ptr=quantized[1] if quantized is not None else None,
        n_rows=n_rows,
        x_row_stride=x.stride(0),
        residual_row_stride=residual.stride(0) if residual is not None else 0,
        out_row_stride=out.stride(0),
        eps=eps,
        N_COLS=n_cols,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=quantized is not None,
        INT8=quantized is not None and quantized[0].dtype == torch.int8,
    )
    return out


def residual_norm_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    dropout: Dropout | None,
    low: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = LayerNorm(dropout(x + bias) + residual) * weight + ln_bias, and the data for its backward pass.

    x: (T, H) in C; residual: (T, H) in S, or None, and then S is C. Both need unit stride along H. Vectors: (H,) in
    either dtype. Returns y in S; y rounded to C if `low` and C is not S, else None; the sum before the norm, rounded to
    C; and the mean and 1 / sqrt(variance + eps) of each row of the unrounded sum, (T,) float32.
    """
    n_rows, n_cols = x.shape
    stream = x if residual is None else residual
    y, total = (launch.empty((n_rows, n_cols), like=like) for like in (stream, x))
    y_low = launch.empty((n_rows, n_cols), like=x) if low and x.dtype != stream.dtype else None
    mean, rstd = (launch.empty((n_rows,), like=x, dtype=torch.float32) for _ in range(2))
    if n_rows == 0:
        return y, y_low, total, mean, rstd
    config = configs.rowwise_config(max(n_cols, masks.GROUP))
    # Grid: one program per BLOCK_ROWS whole rows.
    launch.run(
        _residual_norm_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]),),
        config,
        x_ptr=x,
        bias_ptr=bias,
        residual_ptr=residual,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        out_ptr=y,
        low_ptr=y_low,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        n_rows=n_rows,
        x_row_stride=x.stride(0),
        residual_row_stride=residual.stride(0) if residual is not None else 0,
        eps=eps,
        N_COLS=n_cols,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        DROPOUT=dropout is not None,
        LOW=y_low is not None,
        **(drawing.NONE if dropout is None else drawing.arguments(dropout)),
    )
    return y, y_low, total, mean, rstd
