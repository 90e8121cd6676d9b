"""This module computes disentangled attention for training: with dropout, and with lse for the gradients.

`disentangled` has the formula. lse, (N, T) float32, is the natural logarithm of each query's sum of exponentials.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import dropout as drawing
from fastbert_kernels import launch
from fastbert_kernels.attention import LN_2
from fastbert_kernels.attention_tiles import load_tile
from fastbert_kernels.disentangled import MAX_TILES, attend_tile, attention_arguments, terms, tile
from fastbert_kernels.disentangled_tiles import Distances
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList


@jit(do_not_specialize=["radius", "low", "n_rows", "lse_head_stride", *drawing.DO_NOT_SPECIALIZE])
def _disentangled_training_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    lse_ptr,  # (N, T) float32
    of_queries_ptr,  # (T, N, W): q . pk, where KEYS
    of_keys_ptr,  # (T, N, W): k . pq, where QUERIES
    rows_of_ptr,  # (2 * radius + 1,) int32
    columns_ptr,  # (T,) int32 where HOLES
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    qkv_row_stride,
    out_row_stride,
    lse_head_stride,
    scale_log2,  # softmax scale times log2(e)
    radius,
    low,
    n_rows,
    key_low,  # this and the next four: where DROPOUT
    key_high,
    site,
    threshold,
    keep_scale,
    HEAD_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    HOLES: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(0), tl.num_programs(0)
    first_row, end_row, first_key, end_key, shared = load_tile(tiles_ptr, tl.program_id(1))
    if end_row == first_row:
        return
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row
    d_offs = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (d_offs < HEAD_SIZE)[None, :]
    q_offs = rows.to(tl.int64)[:, None] * qkv_row_stride + head * HEAD_SIZE + d_offs[None, :]
    q = tl.load(q_ptr + q_offs, mask=mask, other=0.0)
    acc, row_sum, row_max = attend_tile(
        q, k_ptr, v_ptr, rows, row_mask, first_key, end_key, shared, row_spans_ptr, qkv_row_stride, scale_log2, head,
        n_heads, of_queries_ptr, of_keys_ptr, (rows_of_ptr, columns_ptr, radius, low, n_rows),
        (key_low, key_high, site, threshold),
        HEAD_SIZE, KEYS, QUERIES, HOLES, DROPOUT, INPUT_PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    row_sum = tl.where(row_mask, row_sum, 1.0)
    row_scale = 1.0 / row_sum
    if DROPOUT:
        row_scale *= keep_scale
    out = acc * row_scale[:, None]
    out_offs = rows.to(tl.int64)[:, None] * out_row_stride + head * HEAD_SIZE + d_offs[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head * lse_head_stride.to(tl.int64) + rows, lse, mask=row_mask)


def disentangled_training_forward(
    qkv: torch.Tensor,
    work_list: WorkList,
    num_heads: int,
    scale: float,
    distances: Distances,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention with dropout, (T, 3 * N * D) -> (T, N * D) in the same dtype, and lse, (N, T) float32.

    The arguments are those of `disentangled_attention_forward`.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = launch.empty((n_tokens, hidden_size), like=qkv)
    lse = torch.empty((num_heads, n_tokens), dtype=torch.float32, device=qkv.device)
    if n_tokens == 0:
        return out, lse
    config = tile(qkv.dtype, hidden_size // num_heads)
    exact = qkv.dtype == torch.float32
    if config["BLOCK_D"] > (32 if exact else 64):  # the masks take registers
        config = {**config, "num_stages": 1, "BLOCK_K": 16 if exact else config["BLOCK_K"]}
    arguments = attention_arguments(qkv, out, num_heads, scale, distances, *terms(qkv, num_heads, distances))
    # Grid: every head for every tile of the work list. A launch takes as many tiles as a grid's second dimension
    # allows.
    for tiles in work_list.tiles.split(MAX_TILES):
        launch.run(
            _disentangled_training_kernel,
            (num_heads, tiles.shape[0]),
            config,
            **arguments,
            lse_ptr=lse,
            lse_head_stride=lse.stride(0),
            tiles_ptr=tiles,
            row_spans_ptr=work_list.row_spans,
            **drawing.arguments(dropout),
            DROPOUT=dropout is not None,
        )
    return out, lse
