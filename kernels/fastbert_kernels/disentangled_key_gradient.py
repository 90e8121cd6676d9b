"""This kernel computes the gradients of keys and values of disentangled attention, and sums ds by rows of distances.

`disentangled_backward` has the formulas. A program has a tile of keys of one head, and loops over blocks of queries.
Scores are transposed, (keys, queries). It adds ds to its own rows of sums, and multiplies these by pq at the end.
"""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention_tiles import load_rows, load_statistics, load_tile, row_ranges, tile_offs
from fastbert_kernels.disentangled_tiles import (
    add_by_place,
    add_rows_product,
    distances_of,
    places_of,
    rows_in_reach,
    terms_of,
)
from fastbert_kernels.dropout import GROUP, keep_bits, keep_bits_from, spread_rows
from fastbert_kernels.jit import jit


@jit
def _keep_transposed(
    first_row,  # the first of the keys
    block_start,  # the first of the queries
    end_query,
    first_key,
    row_spans_ptr,
    head,
    mask_key,
    shared,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns the mask (BLOCK_K, BLOCK_Q) of a block of queries, as `attention_key_gradient` draws it."""
    key_offs = (tl.arange(0, BLOCK_K // GROUP) * GROUP)[:, None, None]
    rows = block_start + tl.arange(0, BLOCK_Q).reshape(1, BLOCK_Q // GROUP, GROUP)
    if shared:
        row_first_key, _ = row_ranges(row_spans_ptr, rows, rows < end_query, first_key, end_query, True)
        bits = keep_bits_from(first_row - row_first_key + key_offs, rows, head, *mask_key)
    else:
        bits = keep_bits((first_row - first_key + key_offs) // GROUP, rows, head, *mask_key)
    return spread_rows(bits)


@jit(do_not_specialize=["n_tokens", "radius", "low", "n_rows", *drawing.DO_NOT_SPECIALIZE])
def disentangled_key_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    statistics_ptr,  # (N, T, 4) float32
    dk_ptr,  # (T, N, D)
    dv_ptr,  # (T, N, D)
    table_ptr,  # (2R, N, D): pq, where QUERIES
    sums_ptr,  # (T, N, W) float32, zeros, where QUERIES: of ds, by rows of distances
    of_queries_ptr,  # (T, N, W): q . pk, where KEYS
    of_keys_ptr,  # (T, N, W): k . pq, where QUERIES
    rows_of_ptr,  # (2 * radius + 1,) int32
    runs_of_ptr,  # (2 * radius + 1,) int32
    columns_ptr,  # (T,) int32 where HOLES
    tiles_ptr,  # (W, 5) int32, as of the queries; rows are keys
    row_spans_ptr,  # (T,) int32
    qkv_row_stride,
    dout_row_stride,
    grad_row_stride,
    table_row_stride,
    n_tokens,
    scale_log2,
    grad_scale,
    radius,
    low,
    n_rows,
    key_low,
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
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(0), tl.num_programs(0)
    tile = tl.program_id(1)
    first_row, end_row, first_query, end_query, shared = load_tile(tiles_ptr, tile)
    if end_row == first_row:
        return
    rows = first_row + tl.arange(0, BLOCK_K)
    row_mask = rows < end_row
    row_first, row_end = row_ranges(row_spans_ptr, rows, row_mask, first_query, end_query, shared)
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    column_offs = (head * HEAD_SIZE + d_offs)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    k = load_rows(k_ptr + long_rows * qkv_row_stride + column_offs, row_mask, d_mask, True, True)
    v = load_rows(v_ptr + long_rows * qkv_row_stride + column_offs, row_mask, d_mask, True, True)
    q_offs = tl.arange(0, BLOCK_Q)[:, None] * qkv_row_stride + column_offs
    dout_offs = tl.arange(0, BLOCK_Q)[:, None] * dout_row_stride + column_offs
    statistics_ptr += head.to(tl.int64) * 4 * n_tokens
    distances = (rows_of_ptr, columns_ptr, radius, low, n_rows)
    mask_key = (key_low, key_high, site, threshold)
    sums_ptrs = sums_ptr
    if QUERIES:
        sums_ptrs += (long_rows * n_heads + head) * n_rows

    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for block_start in range(first_query, end_query, BLOCK_Q):
        queries = block_start + tl.arange(0, BLOCK_Q)
        query_mask = queries < end_query
        long_start = tl.cast(block_start, tl.int64)
        q = load_rows(q_ptr + long_start * qkv_row_stride + q_offs, query_mask, d_mask, True, True)
        dout = load_rows(dout_ptr + long_start * dout_row_stride + dout_offs, query_mask, d_mask, True, True)
        lse_log2, delta, inverse_sum = load_statistics(statistics_ptr + 4 * queries, query_mask, True)
        own = (queries[None, :] >= row_first[:, None]) & (queries[None, :] < row_end[:, None]) & row_mask[:, None]
        apart = distances_of(queries[None, :], rows[:, None], query_mask[None, :], row_mask[:, None], distances, HOLES)
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK_K, BLOCK_Q)
        scores += terms_of(
            places_of(apart, distances), queries[None, :], rows[:, None], own, head, n_heads, of_queries_ptr,
            of_keys_ptr, distances, KEYS, QUERIES,
        )  # fmt: skip
        p = tl.where(own, tl.exp2(scores * scale_log2 - lse_log2[None, :]), 0.0) * inverse_sum[None, :]
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        kept = p
        if DROPOUT:
            keep = _keep_transposed(
                first_row, block_start, end_query, first_query, row_spans_ptr, head, mask_key, shared, BLOCK_Q, BLOCK_K
            )
            kept = tl.where(keep, p, 0.0)
        ds = kept * dp - p * delta[None, :]
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
        if QUERIES:
            add_by_place(ds, apart, own, sums_ptrs, runs_of_ptr, distances)
    if QUERIES:
        first, end = rows_in_reach(first_query, end_query, first_row, end_row, distances, HOLES)
        dk = add_rows_product(
            dk, sums_ptrs, row_mask, table_ptr + head * HEAD_SIZE, first, end, d_offs, d_mask, table_row_stride,
            distances, INPUT_PRECISION, BLOCK_W,
        )  # fmt: skip
    if DROPOUT:
        dv *= keep_scale
    offs, mask = tile_offs(tiles_ptr, tile, head, grad_row_stride, HEAD_SIZE, BLOCK_K, BLOCK_D)
    tl.store(dk_ptr + offs, (dk * grad_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)
