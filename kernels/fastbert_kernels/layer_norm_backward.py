"""This kernel is the backward pass of dropout + residual + LayerNorm. It also computes the sums over all tokens.

    y = LayerNorm(total) * weight + ln_bias,    total = dropout(x + bias) + residual,    n = (total - mean) * rstd
    grad_residual = rstd * (g - mean(g) - n * mean(g * n)),    g = dy * weight,    dy = grad + grad_low
    grad_x        = keep * scale * grad_residual
    grad_weight   = sum_t dy * n,    grad_ln_bias = sum_t dy,    grad_bias = sum_t grad_x

If a dropout was applied to y itself, dy is masked first. Masks are drawn again, not stored. total, grad_low, grad_x:
(T, H) in the dtype C of products; grad, grad_residual: (T, H) in the dtype S of hidden states; mean, rstd: (T,)
float32; the three sums: (H,) float32. Arithmetic in float32, one rounding. Bytes moved: grad and total read, grad_x
written, and grad_low and grad_residual if they exist: 3 to 5 times T * H elements; partial sums: 24 bytes for each
column and program, with at most 384 programs.

Each program has a fixed share of the row tiles and adds its rows in order. `column_sums` adds up the programs' sums.
There are no atomics: the same inputs give the same bits.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch, masks
from fastbert_kernels import dropout as drawing
from fastbert_kernels.column_sums import column_sums, shares
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import drop_columns
from fastbert_kernels.masks import Dropout

MAX_PROGRAMS = 384  # Three for each multiprocessor of an H100. It decides the order of sums and is always equal.
STAGES = tl.constexpr(3)  # Two tiles are copied while one is computed.
OUT_DROPOUT_ARGUMENTS = tuple(f"out_{name}" for name in drawing.DO_NOT_SPECIALIZE)


@jit(do_not_specialize=["n_rows", "tiles_each", *drawing.DO_NOT_SPECIALIZE, *OUT_DROPOUT_ARGUMENTS])
def _residual_norm_backward_kernel(
    grad_ptr,  # (T, H) S
    grad_low_ptr,  # (T, H) C, or None
    total_ptr,  # (T, H) C
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    weight_ptr,  # (H,)
    grad_x_ptr,  # (T, H) C, or None
    grad_residual_ptr,  # (T, H) S, or None
    partials_ptr,  # (P, 3, H): of grad_weight, grad_ln_bias, grad_bias
    n_rows,
    tiles_each,  # row tiles of a program
    grad_row_stride,
    grad_low_row_stride,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    out_key_low,
    out_key_high,
    out_site,
    out_threshold,
    out_keep_scale,
    N_COLS: tl.constexpr,
    GRAD_LOW: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    OUT_DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    weight = tl.load(weight_ptr + col_offs, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    # Sums stay in the threads that have the elements, and are reduced across rows once, after the last tile.
    weight_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    ln_bias_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    bias_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for tile in tl.range(tiles_each, num_stages=STAGES):
        row_offs = (program * tiles_each + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_mask = row_offs < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        offs = row_offs[:, None] * N_COLS + col_offs[None, :]
        grad_offs = row_offs[:, None] * grad_row_stride + col_offs[None, :]
        dy = tl.load(grad_ptr + grad_offs, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row_offs, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row_offs, mask=row_mask, other=0.0)[:, None]
        if GRAD_LOW:
            grad_low_offs = row_offs[:, None] * grad_low_row_stride + col_offs[None, :]
            dy += tl.load(grad_low_ptr + grad_low_offs, mask=mask, other=0.0).to(tl.float32)
        if OUT_DROPOUT:
            dy = drop_columns(
                dy, row_offs, out_key_low, out_key_high, out_site, out_threshold, out_keep_scale, BLOCK_COLS
            )
        n = tl.where(mask, (total - mean) * rstd, 0.0)
        g = dy * weight
        # Outside of the mask g and n are 0 here, and dy is.
        g_mean = tl.sum(g, axis=1)[:, None] / N_COLS
        gn_mean = tl.sum(g * n, axis=1)[:, None] / N_COLS
        if total_ptr.dtype.element_ty.primitive_bitwidth < 32:
            # A total that was rounded has another mean and variance than those saved. In a nearly constant row that
            # difference is many times the deviation: n is brought back to mean 0 and, at most, variance 1.
            n_mean = tl.sum(n, axis=1)[:, None] / N_COLS
            variance = tl.sum(n * n, axis=1)[:, None] / N_COLS - n_mean * n_mean
            shrink = tl.rsqrt(tl.maximum(variance, 1.0))
            gn_mean = (gn_mean - n_mean * g_mean) * shrink
            n = (n - n_mean) * shrink
        grad_x = (g - g_mean - n * gn_mean) * rstd
        if GRAD_RESIDUAL:
            tl.store(grad_residual_ptr + offs, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            grad_x = drop_columns(grad_x, row_offs, key_low, key_high, site, threshold, keep_scale, BLOCK_COLS)
        if GRAD_X:
            tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        weight_sums += dy * n
        ln_bias_sums += dy
        bias_sums += grad_x  # of rows past the end: rstd is 0 there

    partial_ptrs = partials_ptr + program * 3 * N_COLS + col_offs
    tl.store(partial_ptrs, tl.sum(weight_sums, axis=0), mask=col_mask)
    tl.store(partial_ptrs + N_COLS, tl.sum(ln_bias_sums, axis=0), mask=col_mask)
    tl.store(partial_ptrs + 2 * N_COLS, tl.sum(bias_sums, axis=0), mask=col_mask)


def residual_norm_backward(
    grad: torch.Tensor,
    grad_low: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout | None,
    out_dropout: Dropout | None,
    want_residual: bool,
    want_x: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients (grad_x, grad_residual, grad_weight, grad_ln_bias, grad_bias) of `residual_norm_forward`.

    grad: the gradient of y, (T, H) in S; grad_low: that of y_low, (T, H) in C, or None. Both need unit stride along H.
    total, mean and rstd are those of the forward pass. dropout: the dropout of x + bias; out_dropout: the dropout of y.
    grad_x is in C. grad_residual is in S; it is the same tensor as grad_x if there is no dropout and C is S. Each is
    None if it is not needed. The vectors are (H,) float32.
    """
    n_rows, n_cols = total.shape
    same = dropout is None and grad.dtype == total.dtype
    first = launch.empty((n_rows, n_cols), like=total) if want_x or (want_residual and same) else None
    second = launch.empty((n_rows, n_cols), like=grad) if want_residual and not same else None
    partials = _partials(grad, grad_low, total, mean, rstd, weight, dropout, out_dropout, first, second)
    grad_weight, grad_ln_bias, grad_bias = column_sums(partials)
    grad_residual = first if want_residual and same else second
    return first if want_x else None, grad_residual, grad_weight, grad_ln_bias, grad_bias


def _partials(
    grad: torch.Tensor,
    grad_low: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout | None,
    out_dropout: Dropout | None,
    grad_x: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
) -> torch.Tensor:
    """Fills grad_x and grad_residual, and returns the partial sums, (P, 3, H)."""
    n_rows, n_cols = total.shape
    config = configs.rowwise_config(max(n_cols, masks.GROUP))
    n_programs, tiles_each = shares(n_rows, config["BLOCK_ROWS"], MAX_PROGRAMS)
    partials = launch.empty((n_programs, 3, n_cols), like=total, dtype=torch.float32)
    if n_rows == 0:
        return partials
    # Grid: one program for each share of the row tiles.
    launch.run(
        _residual_norm_backward_kernel,
        (n_programs,),
        config,
        grad_ptr=grad,
        grad_low_ptr=grad_low,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight,
        grad_x_ptr=grad_x,
        grad_residual_ptr=grad_residual,
        partials_ptr=partials,
        n_rows=n_rows,
        tiles_each=tiles_each,
        grad_row_stride=grad.stride(0),
        grad_low_row_stride=grad_low.stride(0) if grad_low is not None else 0,
        N_COLS=n_cols,
        GRAD_LOW=grad_low is not None,
        GRAD_X=grad_x is not None,
        GRAD_RESIDUAL=grad_residual is not None,
        DROPOUT=dropout is not None,
        OUT_DROPOUT=out_dropout is not None,
        **drawing.arguments(dropout),
        **{f"out_{name}": value for name, value in drawing.arguments(out_dropout).items()},
    )
    return partials
