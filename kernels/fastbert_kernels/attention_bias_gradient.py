"""This kernel computes the gradient of attention's position bias. No two programs add to the same number.

    dbias[n, w] = keep_scale * sum of ds[n, i, j] over the pairs of rows with w = min(max(j - i, -R), R)

`attention_backward` has the formula of ds, and `attention_bias` defines a bias. A program has a tile of queries of one
head, and loops over blocks of keys. It sums ds along the diagonals of a block, and adds these sums to its own row of
numbers, (2R + 1,). The rows are added afterwards, so the bits do not vary. It reads q, k, v, dout and 16 bytes for each
query and head. FLOPs: 4 * N * D * sum_b len_b^2.

If masks have holes, distances are between the columns of rows, and differ along a diagonal. But the distances of one
key to the queries of its sequence all differ. So ds is added key by key.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import attention_bias as biases
from fastbert_kernels import dropout as drawing
from fastbert_kernels import launch
from fastbert_kernels.attention import keep_probabilities
from fastbert_kernels.attention_bias import PositionBias, bias_of
from fastbert_kernels.attention_tiles import LOG2_E, load_rows, load_statistics, load_tile, row_ranges
from fastbert_kernels.dropout import spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList

BLOCK_K = 32  # Small, because the diagonals of a block take twice its registers.


@jit
def _add_diagonals(
    ds,  # (BLOCK_Q, BLOCK_K) float32, 0 past the tile
    first_row,
    block_start,  # the first of the keys
    sums_ptr,  # (2R + 1,) float32, of this program alone
    radius,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the sums of ds along its diagonals, always in the same order."""
    WIDTH: tl.constexpr = 2 * max(BLOCK_Q, BLOCK_K)
    places = tl.arange(0, WIDTH)  # of diagonals, from that of the last query and the first key on
    queries = tl.arange(0, BLOCK_K)[None, :] + BLOCK_Q - 1 - places[:, None]  # of each key, on that diagonal
    inside = (queries >= 0) & (queries < BLOCK_Q)
    line = tl.sum(tl.where(inside, tl.gather(ds, tl.where(inside, queries, 0), 0), 0.0), axis=1)
    distances = block_start - first_row - (BLOCK_Q - 1) + places
    near = (distances > -radius) & (distances < radius)
    tl.debug_barrier()  # another thread may have stored what this one loads
    ptrs = sums_ptr + distances + radius
    tl.store(ptrs, tl.load(ptrs, mask=near, other=0.0) + line, mask=near)
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(tl.where(distances <= -radius, line, 0.0)))
    last_ptr = sums_ptr + 2 * radius
    tl.store(last_ptr, tl.load(last_ptr) + tl.sum(tl.where(distances >= radius, line, 0.0)))


@jit
def _add_by_columns(
    ds,  # (BLOCK_Q, BLOCK_K) float32, 0 past the tile and between two sequences
    query_columns,  # (BLOCK_Q,) int32
    key_columns,  # (BLOCK_K,) int32
    sums_ptr,  # (2R + 1,) float32, of this program alone
    radius,
    BLOCK_K: tl.constexpr,
):
    """Adds ds by the distances between columns, always in the same order."""
    apart = key_columns[None, :] - query_columns[:, None]
    tl.debug_barrier()  # another thread may have stored what this one loads
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(tl.where(apart <= -radius, ds, 0.0)))
    last_ptr = sums_ptr + 2 * radius
    tl.store(last_ptr, tl.load(last_ptr) + tl.sum(tl.where(apart >= radius, ds, 0.0)))
    places = tl.arange(0, BLOCK_K)
    for i in range(BLOCK_K):
        of_key = tl.sum(tl.where((places == i)[None, :], ds, 0.0), axis=1)  # (BLOCK_Q,)
        distances = tl.sum(tl.where(places == i, key_columns, 0), axis=0) - query_columns
        # Queries of other sequences have 0 here, and may be as far from the key as one of its own.
        near = (distances > -radius) & (distances < radius) & (of_key != 0.0)
        ptrs = sums_ptr + distances + radius
        tl.debug_barrier()
        tl.store(ptrs, tl.load(ptrs, mask=near, other=0.0) + of_key, mask=near)


@jit(do_not_specialize=["n_rows", *drawing.DO_NOT_SPECIALIZE, *biases.DO_NOT_SPECIALIZE])
def bias_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    statistics_ptr,  # (N, T, 4) float32: see `store_statistics`
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    bias_ptr,  # (N, 2R + 1)
    columns_ptr,  # (T,) int32 where HOLES
    sums_ptr,  # (W, N, 2R + 1) float32, zeros
    qkv_row_stride,
    dout_row_stride,
    n_rows,
    scale_log2,  # softmax scale times log2(e)
    bias_radius,
    bias_scale,
    key_low,  # this and the next four: where DROPOUT
    key_high,
    site,
    threshold,
    keep_scale,
    HEAD_SIZE: tl.constexpr,
    HOLES: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row, end_row, first_key, end_key, shared = load_tile(tiles_ptr, tile)
    if end_row == first_row:
        return
    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row
    row_first_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, first_key, end_key, shared)
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    column_offs = (head * HEAD_SIZE + d_offs)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    q = load_rows(q_ptr + long_rows * qkv_row_stride + column_offs, row_mask, d_mask, True, True)
    dout = load_rows(dout_ptr + long_rows * dout_row_stride + column_offs, row_mask, d_mask, True, True)
    statistics_ptr += head.to(tl.int64) * 4 * n_rows
    lse_log2, delta, inverse_sum = load_statistics(statistics_ptr + 4 * rows, row_mask, True)
    key_offs = tl.arange(0, BLOCK_K)[:, None] * qkv_row_stride + column_offs
    mask_key = (key_low, key_high, site, threshold)
    bias = (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row)
    if HOLES:
        query_columns = tl.load(columns_ptr + rows, mask=row_mask, other=0)
    sums_ptr += (tile.to(tl.int64) * tl.num_programs(1) + head) * (2 * bias_radius + 1)
    for block_start in range(first_key, end_key, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        key_mask = keys < end_key
        block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
        k = load_rows(k_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
        v = load_rows(v_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        scores += bias_of(rows[:, None], keys[None, :], row_mask[:, None], key_mask[None, :], head, bias, HOLES)
        own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None]) & row_mask[:, None]
        p = tl.where(own, tl.exp2(scores * scale_log2 - lse_log2[:, None]), 0.0) * inverse_sum[:, None]
        if DROPOUT:
            bits = keep_probabilities(block_start, rows, row_first_key, first_key, head, mask_key, True, BLOCK_K)
            dp = tl.where(spread_columns(bits), dp, 0.0)
        ds = p * (dp - delta[:, None])
        if HOLES:
            key_columns = tl.load(columns_ptr + keys, mask=key_mask, other=0)
            _add_by_columns(ds, query_columns, key_columns, sums_ptr, bias_radius, BLOCK_K)
        else:
            _add_diagonals(ds, first_row, block_start, sums_ptr, bias_radius, BLOCK_Q, BLOCK_K)


def bias_gradient(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    statistics: torch.Tensor,
    queries: WorkList,
    num_heads: int,
    scale: float,
    dropout: Dropout | None,
    bias: PositionBias,
    sizes: dict[str, int],
) -> torch.Tensor:
    """Computes the gradient of a bias's table, (N, 2R + 1) float32, zeros without rows.

    grad, qkv and dropout are as in `varlen_attention_backward`. statistics, (N, T, 4) float32, the list of tiles and
    the block sizes are those of its first pass.
    """
    hidden_size = qkv.shape[1] // 3
    n_tiles = queries.tiles.shape[0]
    sums = torch.zeros((n_tiles, *bias.table.shape), dtype=torch.float32, device=qkv.device)
    of_bias = biases.arguments(bias, scale)
    launch.run(
        bias_gradient_kernel,
        (n_tiles, num_heads),
        {**sizes, "BLOCK_K": BLOCK_K, "num_stages": 1},
        q_ptr=qkv,
        k_ptr=qkv[:, hidden_size:],
        v_ptr=qkv[:, 2 * hidden_size :],
        dout_ptr=grad,
        statistics_ptr=statistics,
        tiles_ptr=queries.tiles,
        row_spans_ptr=queries.row_spans,
        bias_ptr=bias.table,
        columns_ptr=bias.columns,
        sums_ptr=sums,
        qkv_row_stride=qkv.stride(0),
        dout_row_stride=grad.stride(0),
        n_rows=grad.shape[0],
        scale_log2=scale * LOG2_E.value,
        bias_radius=of_bias["bias_radius"],
        bias_scale=of_bias["bias_scale"],
        **drawing.arguments(dropout),
        HEAD_SIZE=hidden_size // num_heads,
        HOLES=bias.columns is not None,
        DROPOUT=dropout is not None,
        INPUT_PRECISION=launch.dot_precision(qkv.dtype),
    )
    return sums.sum(0) * (1.0 if dropout is None else dropout.scale)
