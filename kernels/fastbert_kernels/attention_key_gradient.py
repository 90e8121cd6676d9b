"""This kernel computes the gradients of attention's keys and values.

`attention_backward` has the formulas. A program has a tile of keys, and loops over blocks of queries. Scores are
transposed, (keys, queries), so that they are the left operand of the following products. It reads q, dout, k, v and 16
bytes for each query and head, and writes dk and dv: 6 * T * N * D elements at least. FLOPs: 8 * N * D * sum_b len_b^2.
"""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels import attention_bias as biases
from fastbert_kernels import attention_window as windows
from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention_bias import bias_of
from fastbert_kernels.attention_tiles import load_rows, load_statistics, load_tile, row_ranges, tile_offs
from fastbert_kernels.attention_window import keys_in_reach, reach_of_rows
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
    shared,  # whether the tile is of several sequences
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns the mask (BLOCK_K, BLOCK_Q) of a block of queries. See `keep_probabilities`."""
    key_offs = (tl.arange(0, BLOCK_K // GROUP) * GROUP)[:, None, None]
    rows = block_start + tl.arange(0, BLOCK_Q).reshape(1, BLOCK_Q // GROUP, GROUP)
    if shared:
        row_first_key, _ = row_ranges(row_spans_ptr, rows, rows < end_query, first_key, end_query, True)
        places = first_row - row_first_key + key_offs
        bits = keep_bits_from(places, rows, head, *mask_key)
    else:
        bits = keep_bits((first_row - first_key + key_offs) // GROUP, rows, head, *mask_key)
    return bits


@jit
def _add_key_value_gradients(
    dk,  # (BLOCK_K, BLOCK_D) float32
    dv,  # (BLOCK_K, BLOCK_D) float32
    k,  # (BLOCK_K, BLOCK_D)
    v,  # (BLOCK_K, BLOCK_D)
    q_ptr,  # (T, N, D)
    q_offs,  # (BLOCK_Q, BLOCK_D) offsets of queries 0 to BLOCK_Q - 1 of the batch
    dout_ptr,  # (T, N, D)
    dout_offs,  # (BLOCK_Q, BLOCK_D)
    statistics_ptr,  # (T, 4) float32, those of the head
    row_spans_ptr,
    start,
    end,
    first_row,
    end_row,
    first_key,
    end_key,
    shared,  # whether the tile is of several sequences: without it, SHARED goes over no queries
    qkv_row_stride,
    dout_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    head,
    mask_key,
    bias,  # (bias_ptr, columns_ptr, bias_radius, bias_scale) where BIASED
    reach,  # (window, ranges_ptr) where WINDOWED
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    WINDOWED: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds what the queries [start, end) give. Unless MASKED, that is a whole number of blocks."""
    if SHARED:
        keys = first_row + tl.arange(0, BLOCK_K)
        key_first_row, key_end_row = row_ranges(row_spans_ptr, keys, keys < end_row, first_key, end_key, shared)
        if WINDOWED:
            key_first_row, key_end_row = reach_of_rows(keys, keys < end_row, key_first_row, key_end_row, *reach)
    for block_start in range(start, end, BLOCK_Q):
        queries = block_start + tl.arange(0, BLOCK_Q)
        query_mask = queries < end
        long_start = tl.cast(block_start, tl.int64)
        q = load_rows(q_ptr + long_start * qkv_row_stride + q_offs, query_mask, d_mask, MASKED, PADDED_D)
        dout = load_rows(dout_ptr + long_start * dout_row_stride + dout_offs, query_mask, d_mask, MASKED, PADDED_D)
        if DROPOUT:
            bits = _keep_transposed(
                first_row, block_start, end, first_key, row_spans_ptr, head, mask_key,
                SHARED and (not WINDOWED or shared), BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK_K, BLOCK_Q)
        if BIASED:
            own_keys = first_row + tl.arange(0, BLOCK_K)[:, None]
            scores += bias_of(queries[None, :], own_keys, query_mask[None, :], own_keys < end_row, head, bias, HOLES)
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        if MASKED and not SHARED:
            scores = tl.where(query_mask[None, :], scores, float("-inf"))
        if SHARED:
            own = (queries[None, :] >= key_first_row[:, None]) & (queries[None, :] < key_end_row[:, None])
            scores = tl.where(own, scores, float("-inf"))
        lse_log2, delta, inverse_sum = load_statistics(statistics_ptr + 4 * queries, query_mask, MASKED)
        p = tl.exp2(scores * scale_log2 - lse_log2[None, :])
        if NORMALIZE:
            p *= inverse_sum[None, :]
        kept = p
        if DROPOUT:
            kept = tl.where(spread_rows(bits), p, 0.0)
        ds = kept * dp - p * delta[None, :]
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    return dk, dv


@jit(
    do_not_specialize=[
        "n_rows", *drawing.DO_NOT_SPECIALIZE, *biases.DO_NOT_SPECIALIZE, *windows.DO_NOT_SPECIALIZE
    ]
)  # fmt: skip
def key_value_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    statistics_ptr,  # (N, T, 4) float32
    dk_ptr,  # (T, N, D)
    dv_ptr,  # (T, N, D)
    tiles_ptr,  # (W, 5) int32, as of `query_gradient_kernel`; rows are keys
    row_spans_ptr,  # (T,) int32
    qkv_row_stride,
    dout_row_stride,
    grad_row_stride,
    n_rows,
    scale_log2,
    grad_scale,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    bias_ptr,  # (N, 2R + 1), and the next three: where BIASED; see `attention_bias`
    columns_ptr,  # (T,) int32 where HOLES
    bias_radius,
    bias_scale,
    window,  # this and the next: where WINDOWED; see `attention_window`
    ranges_ptr,  # (T, 2) int32, or None
    HEAD_SIZE: tl.constexpr,
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    WINDOWED: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row, end_row, first_query, end_query, shared = load_tile(tiles_ptr, tile)
    if end_row == first_row:
        return

    rows = first_row + tl.arange(0, BLOCK_K)
    row_mask = rows < end_row

    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    mask = row_mask[:, None] & d_mask[None, :]
    column_offs = (head * HEAD_SIZE + d_offs)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    k = tl.load(k_ptr + long_rows * qkv_row_stride + column_offs, mask=mask, other=0.0)
    v = tl.load(v_ptr + long_rows * qkv_row_stride + column_offs, mask=mask, other=0.0)
    q_offs = tl.arange(0, BLOCK_Q)[:, None] * qkv_row_stride + column_offs
    dout_offs = tl.arange(0, BLOCK_Q)[:, None] * dout_row_stride + column_offs
    statistics_ptr += head.to(tl.int64) * 4 * n_rows

    mask_key = (key_low, key_high, site, threshold)
    bias, reach = (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row), (window, ranges_ptr)
    start_shared, end = first_query, end_query
    if WINDOWED:  # The queries that reach a key are those that it would reach.
        start_shared, end = keys_in_reach(first_row, end_row, first_query, end_query, window, False)
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    if not WINDOWED:
        end_unmasked = first_query
        if not shared:
            end_unmasked, start_shared = first_query + (end_query - first_query) // BLOCK_Q * BLOCK_Q, end_query
        dk, dv = _add_key_value_gradients(
            dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, row_spans_ptr,
            first_query, end_unmasked, first_row, end_row, first_query, end_query, shared,
            qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key, bias, reach, BIASED, HOLES, WINDOWED,
            DROPOUT, NORMALIZE, False, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        dk, dv = _add_key_value_gradients(
            dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, row_spans_ptr,
            end_unmasked, start_shared, first_row, end_row, first_query, end_query, shared,
            qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key, bias, reach, BIASED, HOLES, WINDOWED,
            DROPOUT, NORMALIZE, True, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    dk, dv = _add_key_value_gradients(
        dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, row_spans_ptr,
        start_shared, end, first_row, end_row, first_query, end_query, shared,
        qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key, bias, reach, BIASED, HOLES, WINDOWED,
        DROPOUT, NORMALIZE, True, True, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip

    if DROPOUT:
        dv *= keep_scale
    offs, mask = tile_offs(tiles_ptr, tile, head, grad_row_stride, HEAD_SIZE, BLOCK_K, BLOCK_D)
    tl.store(dk_ptr + offs, (dk * grad_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)
