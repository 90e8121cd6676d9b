"""This kernel pools each packed sequence to one vector, with optional L2 normalisation, in one pass.

    cls            x_0
    last           x_{n-1}
    mean           sum_i x_i / n
    mean_sqrt_len  sum_i x_i / sqrt(n)
    weighted_mean  sum_i (i + 1) x_i / sum_i (i + 1)
    max            max_i x_i
    normalize      y / max(||y||_2, 1e-12)

hidden: (T, H), fp32 / bf16 / fp16; cu_seqlens: (B + 1,) int32; out: (B, H), fp32 / bf16 / fp16. H up to 4096. A
sequence of length 0 gives zeros. Sums in float32. Bytes moved: T * H elements read (B * H for cls and last), B * H
written; if a mean or a maximum is normalised, a second kernel reads and writes B * H more.

A program has some columns of one sequence. It adds block after block of rows to a tile of partial results, and reduces
the tile once, after the last block:

    rows 0, 32, 64 ...   -> partial 0  \
    rows 1, 33, 65 ...   -> partial 1   > reduced across threads: pooled
          ...                          /

A vector's bits do not depend on the batch. Blocks are counted from the sequence's first row. The split of columns and
the order of reduction depend only on H and the sequence's own length.

Source: the pooling modes of Reimers and Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084; weighted_mean from
Muennighoff, "SGPT", 2022, arXiv:2202.08904.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit

MODES = ("cls", "mean", "max", "weighted_mean", "last", "mean_sqrt_len")
ONE_ROW = ("cls", "last")  # modes that read one row of each sequence


@jit
def _normalized(row):
    """The row (cols,), masked columns 0, over its L2 norm; a row of zeros stays one."""
    return row / tl.maximum(tl.sqrt(tl.sum(row * row, axis=0)), 1e-12)


@jit
def _weighted(x, places, MODE: tl.constexpr):
    """Rows x (rows, cols) in float32, times their weights where the mode has some. places: (rows,) in the sequence."""
    x = x.to(tl.float32)
    if MODE == "weighted_mean":
        x *= (places + 1).to(tl.float32)[:, None]
    return x


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr"])  # a caller's tensor may start anywhere
def _pool_kernel(
    hidden_ptr,  # (T, H)
    cu_seqlens_ptr,  # (B + 1,)
    out_ptr,  # (B, H)
    hidden_row_stride,
    out_row_stride,
    N_COLS: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,  # only where BLOCK_COLS is a whole row
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64) - start
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS

    if MODE == "cls" or MODE == "last":
        row = start if MODE == "cls" else start + length - 1
        mask = col_offs < tl.minimum(length, 1) * N_COLS  # nothing of an empty sequence
        pooled = tl.load(hidden_ptr + row * hidden_row_stride + col_offs, mask=mask, other=0.0).to(tl.float32)
    else:
        EMPTY: tl.constexpr = float("-inf") if MODE == "max" else 0.0
        partial = tl.full((BLOCK_ROWS, BLOCK_COLS), EMPTY, tl.float32)
        nans = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.int32)  # of a maximum, which drops them
        # Whole blocks, UNROLL at a time, so that their loads are in flight together. A thread has the same place in
        # each of them: what it has of them is added up before it enters the partial results.
        STEP: tl.constexpr = UNROLL * BLOCK_ROWS
        end_whole = length // STEP * STEP
        stride = tl.cast(hidden_row_stride, tl.int64)
        first_ptr = hidden_ptr + start * stride
        places = tl.arange(0, STEP)
        x_offs = places[:, None] * stride + col_offs[None, :]
        for first in range(0, end_whole, STEP):
            if N_COLS % BLOCK_COLS == 0:
                x = tl.load(first_ptr + first * stride + x_offs)
            else:
                x = tl.load(first_ptr + first * stride + x_offs, mask=col_mask[None, :], other=EMPTY)
            blocks = tl.reshape(_weighted(x, first + places, MODE), (UNROLL, BLOCK_ROWS, BLOCK_COLS))
            if MODE == "max":
                partial = tl.maximum(partial, tl.max(blocks, axis=0))
                nans |= tl.max((blocks != blocks).to(tl.int32), axis=0)
            else:
                partial += tl.sum(blocks, axis=0)
        # The blocks that are left, the last one in part.
        places = tl.arange(0, BLOCK_ROWS)
        x_offs = places[:, None] * stride + col_offs[None, :]
        for first in range(end_whole, length, BLOCK_ROWS):
            mask = (first + places < length)[:, None] & col_mask[None, :]
            x = tl.load(first_ptr + first * stride + x_offs, mask=mask, other=EMPTY)
            x = _weighted(x, first + places, MODE)
            if MODE == "max":
                partial = tl.maximum(partial, x)
                nans |= (x != x).to(tl.int32)
            else:
                partial += x
        n = tl.maximum(length, 1).to(tl.float32)
        if MODE == "max":
            pooled = tl.where(tl.max(nans, axis=0) == 0, tl.max(partial, axis=0), float("nan"))
        elif MODE == "mean":
            pooled = tl.sum(partial, axis=0) / n
        elif MODE == "mean_sqrt_len":
            pooled = tl.sum(partial, axis=0) / tl.sqrt(n)
        else:
            pooled = tl.sum(partial, axis=0) / (n * (n + 1.0) * 0.5)
        pooled = tl.where(col_mask & (length > 0), pooled, 0.0)

    if NORMALIZE:
        tl.static_assert(BLOCK_COLS >= N_COLS)
        pooled = _normalized(pooled)
    tl.store(out_ptr + seq * out_row_stride + col_offs, pooled.to(out_ptr.dtype.element_ty), mask=col_mask)


@jit
def _normalize_kernel(
    pooled_ptr,  # (B, H) float32
    out_ptr,  # (B, H)
    pooled_row_stride,
    out_row_stride,
    N_COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < N_COLS
    out = _normalized(tl.load(pooled_ptr + seq * pooled_row_stride + col_offs, mask=col_mask, other=0.0))
    tl.store(out_ptr + seq * out_row_stride + col_offs, out.to(out_ptr.dtype.element_ty), mask=col_mask)


def pool_forward(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    """Pools (T, H) -> (B, H) in out_dtype. hidden needs unit stride along H."""
    n_seqs, n_cols = cu_seqlens.shape[0] - 1, hidden.shape[1]
    out = launch.empty((n_seqs, n_cols), like=hidden, dtype=out_dtype)
    if n_seqs == 0:
        return out
    whole_rows = mode in ONE_ROW
    config = configs.one_row_pooling_config(n_cols) if whole_rows else configs.pooling_config(n_cols)
    # A norm needs the whole row in float32.
    again = normalize and not whole_rows
    pooled = launch.empty((n_seqs, n_cols), like=hidden, dtype=torch.float32) if again else out
    # Grid: a program for every sequence and block of columns.
    launch.run(
        _pool_kernel,
        (n_seqs, launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        hidden_ptr=hidden,
        cu_seqlens_ptr=cu_seqlens,
        out_ptr=pooled,
        hidden_row_stride=hidden.stride(0),
        out_row_stride=pooled.stride(0),
        N_COLS=n_cols,
        MODE=mode,
        NORMALIZE=normalize and whole_rows,
    )
    if again:
        # Grid: a program for every sequence.
        launch.run(
            _normalize_kernel,
            (n_seqs,),
            configs.whole_row_config(n_cols),
            pooled_ptr=pooled,
            out_ptr=out,
            pooled_row_stride=pooled.stride(0),
            out_row_stride=out.stride(0),
            N_COLS=n_cols,
        )
    return out
