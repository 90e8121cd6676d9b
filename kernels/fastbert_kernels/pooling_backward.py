"""This module is the backward pass of pooling. Each row gets its share of the gradient of its sequence.

    cls, last            g for the first or the last row, 0 for the others
    mean, mean_sqrt_len  g / n, g / sqrt(n)
    weighted_mean        g (i + 1) / (n (n + 1) / 2) for row i
    max                  g for the first row that has the maximum of the column, as torch.max gives it
    g = grad, or where y = x / ||x||_2 was normalised, (grad - y (y . grad)) / ||x||_2;    grad / 1e-12 below 1e-12

grad: (B, H), in the dtype of the pooled vectors; hidden, out: (T, H), fp32 / bf16 / fp16; cu_seqlens: (B + 1,) int32,
which ends at T. Arithmetic in float32, one rounding; no sum is over tokens. Bytes moved: T * H elements written. A
maximum first reads T * H elements. A norm runs the forward pass again, with its bytes.

A program writes every fourth block of rows of a sequence, in some of the columns.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit
from fastbert_kernels.pooling import pool_forward

SPLITS = 4
STEP = tl.constexpr(SPLITS)
NOWHERE = tl.constexpr((1 << 31) - 1)


@jit
def _normalize_backward_kernel(
    grad_ptr,  # (B, H)
    pooled_ptr,  # (B, H) float32, before it was normalised
    out_ptr,  # (B, H) float32
    grad_row_stride,
    N_COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    grad = tl.load(grad_ptr + seq * grad_row_stride + col_offs, mask=col_mask, other=0.0).to(tl.float32)
    pooled = tl.load(pooled_ptr + seq * N_COLS + col_offs, mask=col_mask, other=0.0)
    norm = tl.sqrt(tl.sum(pooled * pooled, axis=0))
    divisor = tl.maximum(norm, 1e-12)
    y = pooled / divisor
    along = tl.where(norm < 1e-12, 0.0, tl.sum(y * grad, axis=0))
    tl.store(out_ptr + seq * N_COLS + col_offs, (grad - y * along) / divisor, mask=col_mask)


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr"])  # a caller's tensor may start anywhere
def _first_maxima_kernel(
    hidden_ptr,  # (T, H)
    cu_seqlens_ptr,  # (B + 1,)
    first_ptr,  # (B, H) int32: places in the sequence
    hidden_row_stride,
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64) - start
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    greatest = tl.full((BLOCK_ROWS, BLOCK_COLS), float("-inf"), tl.float32)
    place_of = tl.full((BLOCK_ROWS, BLOCK_COLS), NOWHERE, tl.int32)
    for block in range(0, length, BLOCK_ROWS):
        places = block + tl.arange(0, BLOCK_ROWS)
        mask = (places < length)[:, None] & col_mask[None, :]
        x_offs = (start + places)[:, None] * hidden_row_stride + col_offs[None, :]
        x = tl.load(hidden_ptr + x_offs, mask=mask, other=float("-inf")).to(tl.float32)
        place_of = tl.where(x > greatest, places.to(tl.int32)[:, None], place_of)
        greatest = tl.maximum(greatest, x)
    first = tl.min(tl.where(greatest == tl.max(greatest, axis=0)[None, :], place_of, NOWHERE), axis=0)
    # Nothing is above minus infinity where there is nothing else, and the first row is as good as the others.
    tl.store(first_ptr + seq * N_COLS + col_offs, tl.where(first == NOWHERE, 0, first), mask=col_mask)


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def _spread_kernel(
    grad_ptr,  # (B, H)
    cu_seqlens_ptr,  # (B + 1,)
    first_ptr,  # (B, H) int32, or None
    out_ptr,  # (T, H)
    grad_row_stride,
    N_COLS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64) - start
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    grad = tl.load(grad_ptr + seq * grad_row_stride + col_offs, mask=col_mask, other=0.0).to(tl.float32)
    n = tl.maximum(length, 1).to(tl.float32)
    if MODE == "mean":
        grad /= n
    elif MODE == "mean_sqrt_len":
        grad /= tl.sqrt(n)
    elif MODE == "weighted_mean":
        grad /= n * (n + 1.0) * 0.5
    elif MODE == "max":
        first = tl.load(first_ptr + seq * N_COLS + col_offs, mask=col_mask, other=0)
    for block in range(tl.program_id(2) * BLOCK_ROWS, length, STEP * BLOCK_ROWS):
        places = block + tl.arange(0, BLOCK_ROWS)
        share = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32) + grad[None, :]
        if MODE == "cls":
            share = tl.where((places == 0)[:, None], share, 0.0)
        elif MODE == "last":
            share = tl.where((places == length - 1)[:, None], share, 0.0)
        elif MODE == "weighted_mean":
            share *= (places + 1).to(tl.float32)[:, None]
        elif MODE == "max":
            share = tl.where(places[:, None] == first[None, :], share, 0.0)
        mask = (places < length)[:, None] & col_mask[None, :]
        out_offs = (start + places)[:, None] * N_COLS + col_offs[None, :]
        tl.store(out_ptr + out_offs, share.to(out_ptr.dtype.element_ty), mask=mask)


def pool_backward(
    grad: torch.Tensor, hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool
) -> torch.Tensor:
    """Returns the gradient of hidden, (T, H) in its dtype, from grad, that of `pool_forward`'s result, (B, H).

    Both need unit stride along H, and cu_seqlens ends at T. The values of hidden are read only for "max" and for a
    norm.
    """
    n_seqs, n_cols = grad.shape
    out = launch.empty((hidden.shape[0], n_cols), like=hidden)
    if hidden.shape[0] == 0:
        return out
    if normalize:
        grad = _normalize_backward(grad, pool_forward(hidden, cu_seqlens, mode, False, torch.float32))
    first = _first_maxima(hidden, cu_seqlens) if mode == "max" else None
    config = configs.pooling_backward_config(n_cols)
    # Grid: SPLITS programs for every sequence and block of columns.
    launch.run(
        _spread_kernel,
        (n_seqs, launch.cdiv(n_cols, config["BLOCK_COLS"]), SPLITS),
        config,
        grad_ptr=grad,
        cu_seqlens_ptr=cu_seqlens,
        first_ptr=first,
        out_ptr=out,
        grad_row_stride=grad.stride(0),
        N_COLS=n_cols,
        MODE=mode,
    )
    return out


def _normalize_backward(grad: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the vectors before they were normalised, (B, H) float32."""
    n_seqs, n_cols = pooled.shape
    out = launch.empty((n_seqs, n_cols), like=pooled)
    # Grid: a program for every sequence.
    launch.run(
        _normalize_backward_kernel,
        (n_seqs,),
        configs.whole_row_config(n_cols),
        grad_ptr=grad,
        pooled_ptr=pooled,
        out_ptr=out,
        grad_row_stride=grad.stride(0),
        N_COLS=n_cols,
    )
    return out


def _first_maxima(hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Returns the place of the first maximum of each column in each sequence, (B, H) int32; 0 in an empty one."""
    n_seqs, n_cols = cu_seqlens.shape[0] - 1, hidden.shape[1]
    first = launch.empty((n_seqs, n_cols), like=hidden, dtype=torch.int32)
    config = configs.pooling_backward_config(n_cols)
    # Grid: a program for every sequence and block of columns.
    launch.run(
        _first_maxima_kernel,
        (n_seqs, launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        hidden_ptr=hidden,
        cu_seqlens_ptr=cu_seqlens,
        first_ptr=first,
        hidden_row_stride=hidden.stride(0),
        N_COLS=n_cols,
    )
    return first
