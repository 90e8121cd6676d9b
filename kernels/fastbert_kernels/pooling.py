"""Pooling of each packed sequence to one vector, with optional L2 normalisation, in one pass.

    cls            x_0
    last           x_{n-1}
    mean           sum_i x_i / n
    mean_sqrt_len  sum_i x_i / sqrt(n)
    weighted_mean  sum_i (i + 1) x_i / sum_i (i + 1)
    max            max_i x_i
    normalize      y / max(||y||_2, 1e-12)

hidden: (T, H), fp32 / bf16 / fp16; cu_seqlens: (B + 1,) int32; out: (B, H), fp32 / bf16 / fp16. H up to 4096.
A sequence of length 0 gives zeros. Sums in float32. Bytes moved: T * H elements read (B * H for cls and last), B * H
written. A vector's bits do not depend on the batch: a program has one sequence, whose rows it takes in blocks counted
from its first, and sums over them and over the columns by trees that follow from H.

Source: the pooling modes of Reimers and Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084; weighted_mean from
Muennighoff, "SGPT", 2022, arXiv:2202.08904.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.jit import jit

MODES = ("cls", "mean", "max", "weighted_mean", "last", "mean_sqrt_len")


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr"])  # a caller's, which may start anywhere
def _pool_kernel(
    hidden_ptr,  # (T, H)
    cu_seqlens_ptr,  # (B + 1,)
    out_ptr,  # (B, H)
    hidden_row_stride,
    out_row_stride,
    N_COLS: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    length = end - start
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS

    if MODE == "cls" or MODE == "last":
        row = start if MODE == "cls" else end - 1
        pooled = tl.load(hidden_ptr + row * hidden_row_stride + col_offs, mask=col_mask & (length > 0), other=0.0)
        pooled = pooled.to(tl.float32)
    else:
        empty: tl.constexpr = float("-inf") if MODE == "max" else 0.0
        pooled = tl.full((BLOCK_COLS,), empty, tl.float32)
        for block_start in range(0, length, BLOCK_ROWS):
            offs = block_start + tl.arange(0, BLOCK_ROWS)
            row_mask = offs < length
            x_offs = (start + offs)[:, None] * hidden_row_stride + col_offs[None, :]
            x = tl.load(hidden_ptr + x_offs, mask=row_mask[:, None] & col_mask[None, :], other=empty).to(tl.float32)
            if MODE == "max":
                pooled = tl.maximum(pooled, tl.max(x, axis=0))
            elif MODE == "weighted_mean":
                pooled += tl.sum(x * (offs + 1).to(tl.float32)[:, None], axis=0)
            else:
                pooled += tl.sum(x, axis=0)
        n = tl.maximum(length, 1).to(tl.float32)
        if MODE == "mean":
            pooled = pooled / n
        elif MODE == "mean_sqrt_len":
            pooled = pooled / tl.sqrt(n)
        elif MODE == "weighted_mean":
            pooled = pooled / (n * (n + 1.0) * 0.5)
        pooled = tl.where(col_mask & (length > 0), pooled, 0.0)

    if NORMALIZE:
        norm = tl.sqrt(tl.sum(pooled * pooled, axis=0))
        pooled = pooled / tl.maximum(norm, 1e-12)
    tl.store(out_ptr + seq * out_row_stride + col_offs, pooled.to(out_ptr.dtype.element_ty), mask=col_mask)


def pool_forward(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    """(T, H) -> (B, H) in out_dtype. hidden needs unit stride along H."""
    n_seqs, n_cols = cu_seqlens.shape[0] - 1, hidden.shape[1]
    out = launch.empty((n_seqs, n_cols), like=hidden, dtype=out_dtype)
    if n_seqs == 0:
        return out
    # Grid: one program per sequence, which holds the whole row so that it can normalise it.
    launch.run(
        _pool_kernel,
        (n_seqs,),
        launch.pooling_config(n_cols),
        hidden_ptr=hidden,
        cu_seqlens_ptr=cu_seqlens,
        out_ptr=out,
        hidden_row_stride=hidden.stride(0),
        out_row_stride=out.stride(0),
        N_COLS=n_cols,
        MODE=mode,
        NORMALIZE=normalize,
    )
    return out
