"""This kernel computes the gradient of attention's queries, and statistics of queries for the pass over keys.

`attention_backward` has the formulas. A program has a tile of queries, and loops over blocks of keys. It reads q, k, v,
dout and out, and writes dq: 6 * T * N * D elements at least. FLOPs: 6 * N * D * sum_b len_b^2.

In 16 bits, delta comes from the rounded result. In float32 the errors of lse and such a delta would be visible: the
probabilities of a row add up to 1 only within |lse| * 2^-24, and if one of them is almost 1, dp and delta cancel. So in
float32 the kernel loops over the keys twice. The first loop computes the sum of p, and delta from the same products
from which it is later subtracted.
"""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels import attention_bias as biases
from fastbert_kernels import attention_window as windows
from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention import keep_probabilities
from fastbert_kernels.attention_bias import bias_of
from fastbert_kernels.attention_tiles import LOG2_E, load_rows, load_tile, row_ranges, store_statistics, tile_offs
from fastbert_kernels.attention_window import keys_in_reach, reach_of_rows
from fastbert_kernels.dropout import spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import RANGE

N_NUMBERS = tl.constexpr(RANGE)


@jit
def _sum_over_keys(
    q,  # (BLOCK_Q, BLOCK_D)
    dout,  # (BLOCK_Q, BLOCK_D)
    lse_log2,  # (BLOCK_Q,)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    key_offs,  # (BLOCK_K, BLOCK_D)
    start,
    end,
    rows,  # (BLOCK_Q,)
    row_first_key,  # (BLOCK_Q,) first key that each row sees
    row_end_key,  # (BLOCK_Q,)
    row_text_key,  # (BLOCK_Q,) first key of each row's sequence
    qkv_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    head,
    mask_key,
    bias,
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns the sums of p and of p * dp over all keys, each (BLOCK_Q,), for every sequence of the tile."""
    row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    product_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for block_start in range(start, end, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
        k = load_rows(k_ptr + block_offset + key_offs, keys < end, d_mask, True, True)
        v = load_rows(v_ptr + block_offset + key_offs, keys < end, d_mask, True, True)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
        if BIASED:
            own_rows, own_keys = (rows < bias[4])[:, None], (keys < end)[None, :]
            scores += bias_of(rows[:, None], keys[None, :], own_rows, own_keys, head, bias, HOLES)
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
        p = tl.where(own, tl.exp2(scores * scale_log2 - lse_log2[:, None]), 0.0)
        row_sum += tl.sum(p, axis=1)
        if DROPOUT:
            bits = keep_probabilities(block_start, rows, row_text_key, start, head, mask_key, True, BLOCK_K)
            dp = tl.where(spread_columns(bits), dp, 0.0)
        product_sum += tl.sum(p * dp, axis=1)
    return row_sum, product_sum


@jit
def _add_query_gradients(
    dq,  # (BLOCK_Q, BLOCK_D) float32
    q,  # (BLOCK_Q, BLOCK_D)
    dout,  # (BLOCK_Q, BLOCK_D)
    lse_log2,  # (BLOCK_Q,) lse times log2(e)
    delta,  # (BLOCK_Q,) divided by keep_scale
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    key_offs,  # (BLOCK_K, BLOCK_D) offsets of keys 0 to BLOCK_K - 1 of the batch
    start,
    end,
    first_key,
    end_key,
    shared,  # whether the tile is of several sequences: without it, SHARED goes over no keys
    rows,  # (BLOCK_Q,) packed rows
    row_mask,  # (BLOCK_Q,)
    row_spans_ptr,
    qkv_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    head,
    mask_key,  # (key_low, key_high, site, threshold) where DROPOUT
    bias,  # (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row) where BIASED
    reach,  # (window, ranges_ptr) where WINDOWED
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    WINDOWED: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds what the keys [start, end) give. Unless MASKED, that is a whole number of blocks."""
    row_text_key, row_first_key, row_end_key = rows, rows, rows  # Without SHARED, of no use.
    if SHARED:
        row_text_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, first_key, end_key, shared)
        row_first_key = row_text_key
        if WINDOWED:
            row_first_key, row_end_key = reach_of_rows(rows, row_mask, row_text_key, row_end_key, *reach)
    for block_start in range(start, end, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
        k = load_rows(k_ptr + block_offset + key_offs, keys < end, d_mask, MASKED, PADDED_D)
        v = load_rows(v_ptr + block_offset + key_offs, keys < end, d_mask, MASKED, PADDED_D)

        if DROPOUT:
            bits = keep_probabilities(
                block_start, rows, row_text_key, first_key, head, mask_key, SHARED and (not WINDOWED or shared), BLOCK_K
            )
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        if BIASED:
            scores += bias_of(rows[:, None], keys[None, :], row_mask[:, None], (keys < end)[None, :], head, bias, HOLES)
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        if MASKED and not SHARED:
            scores = tl.where((keys < end)[None, :], scores, float("-inf"))
        if SHARED:
            own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
            scores = tl.where(own, scores, float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        if DROPOUT:
            keep = spread_columns(bits)
            dp = tl.where(keep, dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
    return dq


@jit(
    do_not_specialize=[
        "lse_head_stride", "n_rows", *drawing.DO_NOT_SPECIALIZE, *biases.DO_NOT_SPECIALIZE, *windows.DO_NOT_SPECIALIZE
    ]
)  # fmt: skip
def query_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    lse_ptr,  # (N, T) float32
    statistics_ptr,  # (N, T, 4) float32: see `store_statistics`
    dq_ptr,  # (T, N, D)
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    qkv_row_stride,
    dout_row_stride,
    out_row_stride,
    dq_row_stride,
    lse_head_stride,
    n_rows,
    scale_log2,  # softmax scale times log2(e)
    grad_scale,  # softmax scale times keep_scale
    key_low,  # this and the next four: where DROPOUT
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
    first_row, end_row, first_key, end_key, shared = load_tile(tiles_ptr, tile)
    if end_row == first_row:  # what fills a work list of fixed length up
        return

    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row

    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    mask = row_mask[:, None] & d_mask[None, :]
    column_offs = (head * HEAD_SIZE + d_offs)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    q = tl.load(q_ptr + long_rows * qkv_row_stride + column_offs, mask=mask, other=0.0)
    dout = tl.load(dout_ptr + long_rows * dout_row_stride + column_offs, mask=mask, other=0.0)
    lse_ptrs = lse_ptr + head * lse_head_stride.to(tl.int64) + rows
    lse_log2 = tl.load(lse_ptrs, mask=row_mask, other=0.0) * LOG2_E
    key_offs = tl.arange(0, BLOCK_K)[:, None] * qkv_row_stride + column_offs
    mask_key = (key_low, key_high, site, threshold)
    bias, reach = (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row), (window, ranges_ptr)
    start, end = first_key, end_key
    if WINDOWED:
        start, end = keys_in_reach(first_row, end_row, first_key, end_key, window, DROPOUT)
    if NORMALIZE:
        row_text_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, first_key, end_key, shared)
        row_first_key = row_text_key
        if WINDOWED:
            row_first_key, row_end_key = reach_of_rows(rows, row_mask, row_text_key, row_end_key, window, ranges_ptr)
        row_sum, delta = _sum_over_keys(
            q, dout, lse_log2, k_ptr, v_ptr, key_offs, start, end, rows, row_first_key, row_end_key, row_text_key,
            qkv_row_stride, scale_log2, d_mask, head, mask_key, bias, BIASED, HOLES,
            DROPOUT, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        inverse_sum = 1.0 / tl.where(row_mask, row_sum, 1.0)
        delta *= inverse_sum
    else:
        out = tl.load(out_ptr + long_rows * out_row_stride + column_offs, mask=mask, other=0.0)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        if DROPOUT:
            delta *= 1.0 - threshold.to(tl.float32) / N_NUMBERS
        inverse_sum = tl.full((BLOCK_Q,), 1.0, dtype=tl.float32)

    # Of one sequence, whole blocks of keys need no mask, and the rest only one of its end. Of several, or within a
    # window, each block does.
    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    start_shared = start
    if not WINDOWED:
        end_unmasked = first_key
        if not shared:
            end_unmasked, start_shared = first_key + (end_key - first_key) // BLOCK_K * BLOCK_K, end_key
        dq = _add_query_gradients(
            dq, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, first_key, end_unmasked, first_key, end_key, shared,
            rows, row_mask, row_spans_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key, bias, reach,
            BIASED, HOLES, WINDOWED, DROPOUT, False, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
        )  # fmt: skip
        dq = _add_query_gradients(
            dq, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, end_unmasked, start_shared, first_key, end_key,
            shared, rows, row_mask, row_spans_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key, bias, reach,
            BIASED, HOLES, WINDOWED, DROPOUT, True, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
        )  # fmt: skip
    dq = _add_query_gradients(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, start_shared, end, first_key, end_key, shared,
        rows, row_mask, row_spans_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key, bias, reach,
        BIASED, HOLES, WINDOWED, DROPOUT, True, True, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
    )  # fmt: skip

    if NORMALIZE:
        dq *= inverse_sum[:, None]
    statistics_ptrs = statistics_ptr + 4 * (head * n_rows.to(tl.int64) + rows)
    store_statistics(statistics_ptrs, lse_log2, delta, inverse_sum, row_mask)
    offs, mask = tile_offs(tiles_ptr, tile, head, dq_row_stride, HEAD_SIZE, BLOCK_Q, BLOCK_D)
    tl.store(dq_ptr + offs, (dq * grad_scale).to(dq_ptr.dtype.element_ty), mask=mask)
