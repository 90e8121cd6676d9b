"""This kernel computes the gradient of the queries of disentangled attention, and sums ds by the rows of distances.

`disentangled_backward` has the formulas. A program has a tile of queries of one head, and loops over blocks of keys. It
adds ds to its own rows of sums, and multiplies these by pk at the end. In float32 it loops over the keys twice, for the
reason in `attention_query_gradient`.
"""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention import keep_probabilities
from fastbert_kernels.attention_tiles import LOG2_E, load_rows, load_tile, row_ranges, store_statistics, tile_offs
from fastbert_kernels.disentangled_tiles import (
    add_by_place,
    add_rows_product,
    distances_of,
    places_of,
    rows_in_reach,
    terms_of,
)
from fastbert_kernels.dropout import spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import RANGE

N_NUMBERS = tl.constexpr(RANGE)


@jit
def _block(
    q,  # (BLOCK_Q, BLOCK_D)
    dout,  # (BLOCK_Q, BLOCK_D)
    lse_log2,  # (BLOCK_Q,)
    k,  # (BLOCK_K, BLOCK_D)
    v,  # (BLOCK_K, BLOCK_D)
    rows,  # (BLOCK_Q,)
    keys,  # (BLOCK_K,)
    apart,  # (BLOCK_Q, BLOCK_K)
    own,  # (BLOCK_Q, BLOCK_K)
    head,
    n_heads,
    scale_log2,
    of_queries_ptr,
    of_keys_ptr,
    distances,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Returns p and dp without dropout, (BLOCK_Q, BLOCK_K)."""
    scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    scores += terms_of(
        places_of(apart, distances), rows[:, None], keys[None, :], own, head, n_heads, of_queries_ptr, of_keys_ptr,
        distances, KEYS, QUERIES,
    )  # fmt: skip
    p = tl.where(own, tl.exp2(scores * scale_log2 - lse_log2[:, None]), 0.0)
    return p, tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)


@jit(do_not_specialize=["lse_head_stride", "n_tokens", "radius", "low", "n_rows", *drawing.DO_NOT_SPECIALIZE])
def disentangled_query_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    lse_ptr,  # (N, T) float32
    statistics_ptr,  # (N, T, 4) float32: see `store_statistics`
    dq_ptr,  # (T, N, D)
    table_ptr,  # (2R, N, D): pk, where KEYS
    sums_ptr,  # (T, N, W) float32, zeros, where KEYS: of ds, by rows of distances
    of_queries_ptr,  # (T, N, W): q . pk, where KEYS
    of_keys_ptr,  # (T, N, W): k . pq, where QUERIES
    rows_of_ptr,  # (2 * radius + 1,) int32
    runs_of_ptr,  # (2 * radius + 1,) int32
    columns_ptr,  # (T,) int32 where HOLES
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    qkv_row_stride,
    dout_row_stride,
    out_row_stride,
    grad_row_stride,
    table_row_stride,
    lse_head_stride,
    n_tokens,
    scale_log2,  # softmax scale times log2(e)
    grad_scale,  # softmax scale times keep_scale
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
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(0), tl.num_programs(0)
    tile = tl.program_id(1)
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
    lse_ptrs = lse_ptr + head * lse_head_stride.to(tl.int64) + rows
    lse_log2 = tl.load(lse_ptrs, mask=row_mask, other=0.0) * LOG2_E
    key_offs = tl.arange(0, BLOCK_K)[:, None] * qkv_row_stride + column_offs
    distances = (rows_of_ptr, columns_ptr, radius, low, n_rows)
    mask_key = (key_low, key_high, site, threshold)
    sums_ptrs = sums_ptr
    if KEYS:
        sums_ptrs += (long_rows * n_heads + head) * n_rows

    inverse_sum = tl.full((BLOCK_Q,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        delta = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        for block_start in range(first_key, end_key, BLOCK_K):
            keys = block_start + tl.arange(0, BLOCK_K)
            key_mask = keys < end_key
            block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
            k = load_rows(k_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
            v = load_rows(v_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
            own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
            own &= row_mask[:, None]
            apart = distances_of(rows[:, None], keys[None, :], row_mask[:, None], key_mask[None, :], distances, HOLES)
            p, dp = _block(
                q, dout, lse_log2, k, v, rows, keys, apart, own, head, n_heads, scale_log2, of_queries_ptr,
                of_keys_ptr, distances, KEYS, QUERIES, INPUT_PRECISION,
            )  # fmt: skip
            if DROPOUT:
                bits = keep_probabilities(block_start, rows, row_first_key, first_key, head, mask_key, shared, BLOCK_K)
                dp = tl.where(spread_columns(bits), dp, 0.0)
            row_sum += tl.sum(p, axis=1)
            delta += tl.sum(p * dp, axis=1)
        inverse_sum = 1.0 / tl.where(row_mask, row_sum, 1.0)
        delta *= inverse_sum
    else:
        out = load_rows(out_ptr + long_rows * out_row_stride + column_offs, row_mask, d_mask, True, True)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        if DROPOUT:
            delta *= 1.0 - threshold.to(tl.float32) / N_NUMBERS

    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for block_start in range(first_key, end_key, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        key_mask = keys < end_key
        block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
        k = load_rows(k_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
        v = load_rows(v_ptr + block_offset + key_offs, key_mask, d_mask, True, True)
        own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None]) & row_mask[:, None]
        apart = distances_of(rows[:, None], keys[None, :], row_mask[:, None], key_mask[None, :], distances, HOLES)
        p, dp = _block(
            q, dout, lse_log2, k, v, rows, keys, apart, own, head, n_heads, scale_log2, of_queries_ptr, of_keys_ptr,
            distances, KEYS, QUERIES, INPUT_PRECISION,
        )  # fmt: skip
        if DROPOUT:
            bits = keep_probabilities(block_start, rows, row_first_key, first_key, head, mask_key, shared, BLOCK_K)
            dp = tl.where(spread_columns(bits), dp, 0.0)
        ds = p * (dp - delta[:, None]) * inverse_sum[:, None]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
        if KEYS:
            add_by_place(ds, apart, own, sums_ptrs, runs_of_ptr, distances)
    if KEYS:
        first, end = rows_in_reach(first_row, end_row, first_key, end_key, distances, HOLES)
        dq = add_rows_product(
            dq, sums_ptrs, row_mask, table_ptr + head * HEAD_SIZE, first, end, d_offs, d_mask, table_row_stride,
            distances, INPUT_PRECISION, BLOCK_W,
        )  # fmt: skip

    statistics_ptrs = statistics_ptr + 4 * (head * n_tokens.to(tl.int64) + rows)
    store_statistics(statistics_ptrs, lse_log2, delta, inverse_sum, row_mask)
    offs, mask = tile_offs(tiles_ptr, tile, head, grad_row_stride, HEAD_SIZE, BLOCK_Q, BLOCK_D)
    tl.store(dq_ptr + offs, (dq * grad_scale).to(dq_ptr.dtype.element_ty), mask=mask)
