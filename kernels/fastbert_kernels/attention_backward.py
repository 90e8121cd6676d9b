"""These kernels compute the gradients of attention over packed sequences, in two passes without atomics.

    p[i, j] = exp(scale * q[i] . k[j] - lse[i]),    dp[i, j] = keep[i, j] * keep_scale * (dout[i] . v[j])
    ds[i, j] = p[i, j] * (dp[i, j] - delta[i]),     delta[i] = dout[i] . out[i]
    dq[i] = scale * sum_j ds[i, j] k[j],    dk[j] = scale * sum_i ds[i, j] q[i]
    dv[j] = keep_scale * sum_i keep[i, j] * p[i, j] dout[i]

qkv, grad_qkv: (T, 3 * N * D), laid out [q | k | v]; dout, out: (T, N * D); fp32 / bf16 / fp16, D from 16 to 128.
lse, delta: (N, T) float32. p, ds and all sums are float32; p and ds are rounded to the input dtype for the products they
enter. FLOPs: 14 * N * D * sum_b len_b^2, where one pass that adds dq atomically would need 10. Bytes moved: read 5, then
5, write 3 of N * D * T elements.

The first pass has a program for each tile of queries, which goes over blocks of keys; it computes dq and delta. The
second has one for each tile of keys, which goes over blocks of queries; it computes dk and dv from scores that stand
transposed, (keys, queries). Each sum is made by one program in a fixed order, so the bits do not vary. Tiles and work
lists are those of the forward pass: `attention` describes them, and what shares a tile.

The factor keep_scale is taken out of the sums: delta is divided by it, ds too, and the results are multiplied.

Source: Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention import LOG2_E, build_work_list, keep_probabilities
from fastbert_kernels.dropout import GROUP, keep_bits, keep_bits_from, spread_columns, spread_rows
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import RANGE, Dropout

N_NUMBERS = tl.constexpr(RANGE)


@jit
def _load_rows(ptrs, row_mask, d_mask, MASKED: tl.constexpr, PADDED_D: tl.constexpr):
    """Loads rows (rows, BLOCK_D), zero past the head and, where MASKED, past row_mask."""
    if MASKED:
        rows = tl.load(ptrs, mask=row_mask[:, None] & d_mask[None, :], other=0.0)
    elif PADDED_D:
        rows = tl.load(ptrs, mask=d_mask[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@jit
def _own_range(rows, row_mask, seq_ids_ptr, cu_seqlens_ptr):
    """Returns the first and the end row of each row's sequence, 0 past row_mask."""
    seq_ids = tl.load(seq_ids_ptr + rows, mask=row_mask, other=0)
    first = tl.load(cu_seqlens_ptr + seq_ids, mask=row_mask, other=0)
    return first, tl.load(cu_seqlens_ptr + seq_ids + 1, mask=row_mask, other=0)


@jit
def _store_statistics(ptrs, lse_log2, delta, inverse_sum, row_mask):
    """Stores (rows, 4): lse times log2(e), delta, and inverse_sum twice.

    Rows of 16 bytes because Triton loads a vector of fewer elements than threads in each of them that needs it, each
    time in the loop.
    """
    pairs = tl.join(tl.join(lse_log2, delta), tl.join(inverse_sum, inverse_sum))
    rows = tl.permute(pairs, (0, 2, 1)).reshape(lse_log2.shape[0], 4)
    tl.store(ptrs[:, None] + tl.arange(0, 4)[None, :], rows, mask=row_mask[:, None])


@jit
def _load_statistics(ptrs, row_mask, MASKED: tl.constexpr):
    """Loads lse times log2(e), delta and inverse_sum, (rows,) each, zero past row_mask where MASKED."""
    ptrs = ptrs[:, None] + tl.arange(0, 4)[None, :]
    if MASKED:
        rows = tl.load(ptrs, mask=row_mask[:, None], other=0.0)
    else:
        rows = tl.load(ptrs)
    first, second = tl.split(tl.permute(rows.reshape(ptrs.shape[0], 2, 2), (0, 2, 1)))
    lse_log2, delta = tl.split(first)
    inverse_sum, _ = tl.split(second)
    return lse_log2, delta, inverse_sum


@jit
def _tile_offs(
    work_list_ptr,
    tile,
    head,
    row_stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns offsets and mask of a tile's rows, (BLOCK_ROWS, BLOCK_D), to store it. It reads the work list again, so
    that no register holds them over the loops."""
    rows = tl.load(work_list_ptr + 4 * tile, volatile=True) + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.load(work_list_ptr + 4 * tile + 1, volatile=True)
    d_offs = tl.arange(0, BLOCK_D)
    offs = rows.to(tl.int64)[:, None] * row_stride + head * HEAD_SIZE + d_offs[None, :]
    return offs, row_mask[:, None] & (d_offs < HEAD_SIZE)[None, :]


@jit
def _add_query_gradients(
    dq,  # (BLOCK_Q, BLOCK_D) float32
    row_sum,  # (BLOCK_Q,) float32: of p, where NORMALIZE
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
    rows,  # (BLOCK_Q,) packed rows
    row_mask,  # (BLOCK_Q,)
    seq_ids_ptr,
    cu_seqlens_ptr,
    qkv_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    head,
    mask_key,  # (key_low, key_high, site, threshold) where DROPOUT
    DROPOUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds what the keys [start, end) give. Unless MASKED, that is a whole number of blocks."""
    row_first_key, row_end_key = rows, rows
    if SHARED:
        row_first_key, row_end_key = _own_range(rows, row_mask, seq_ids_ptr, cu_seqlens_ptr)
    for block_start in range(start, end, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        block_offset = tl.cast(block_start, tl.int64) * qkv_row_stride
        k = _load_rows(k_ptr + block_offset + key_offs, keys < end, d_mask, MASKED, PADDED_D)
        v = _load_rows(v_ptr + block_offset + key_offs, keys < end, d_mask, MASKED, PADDED_D)

        if DROPOUT:
            bits = keep_probabilities(block_start, rows, row_first_key, first_key, head, mask_key, SHARED, BLOCK_K)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        if MASKED and not SHARED:
            scores = tl.where((keys < end)[None, :], scores, float("-inf"))
        if SHARED:
            own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
            scores = tl.where(own, scores, float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        if NORMALIZE:
            row_sum += tl.sum(p, axis=1)
        if DROPOUT:
            keep = spread_columns(bits)
            dp = tl.where(keep, dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
    return dq, row_sum


@jit(
    do_not_specialize=["lse_head_stride", "n_rows", *drawing.DO_NOT_SPECIALIZE],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _query_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    lse_ptr,  # (N, T) float32
    statistics_ptr,  # (N, T, 4) float32: see `_store_statistics`
    dq_ptr,  # (T, N, D)
    work_list_ptr,  # (W, 4) int32: first row, end row, first sequence, end sequence
    seq_ids_ptr,  # (T,) int32: the sequence of each token
    cu_seqlens_ptr,  # (B + 1,) int32
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
    HEAD_SIZE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.load(work_list_ptr + 4 * tile)
    end_row = tl.load(work_list_ptr + 4 * tile + 1)
    if end_row == first_row:  # what fills a work list of fixed length up
        return
    first_seq = tl.load(work_list_ptr + 4 * tile + 2)
    end_seq = tl.load(work_list_ptr + 4 * tile + 3)
    first_key = tl.load(cu_seqlens_ptr + first_seq)
    end_key = tl.load(cu_seqlens_ptr + end_seq)

    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row

    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    mask = row_mask[:, None] & d_mask[None, :]
    column_offs = (head * HEAD_SIZE + d_offs)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    q = tl.load(q_ptr + long_rows * qkv_row_stride + column_offs, mask=mask, other=0.0)
    dout = tl.load(dout_ptr + long_rows * dout_row_stride + column_offs, mask=mask, other=0.0)
    out = tl.load(out_ptr + long_rows * out_row_stride + column_offs, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    if DROPOUT:
        delta *= 1.0 - threshold.to(tl.float32) / N_NUMBERS
    lse_ptrs = lse_ptr + head * lse_head_stride.to(tl.int64) + rows
    lse_log2 = tl.load(lse_ptrs, mask=row_mask, other=0.0) * LOG2_E

    key_offs = tl.arange(0, BLOCK_K)[:, None] * qkv_row_stride + column_offs
    mask_key = (key_low, key_high, site, threshold)
    # Of one sequence, whole blocks of keys need no mask, and the rest only one of its end. Of several, each block does.
    end_unmasked, start_shared = first_key, first_key
    if end_seq - first_seq == 1:
        end_unmasked, start_shared = first_key + (end_key - first_key) // BLOCK_K * BLOCK_K, end_key
    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    dq, row_sum = _add_query_gradients(
        dq, row_sum, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, first_key, end_unmasked, first_key, rows,
        row_mask, seq_ids_ptr, cu_seqlens_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, False, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
    )  # fmt: skip
    dq, row_sum = _add_query_gradients(
        dq, row_sum, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, end_unmasked, start_shared, first_key, rows,
        row_mask, seq_ids_ptr, cu_seqlens_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, True, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
    )  # fmt: skip
    dq, row_sum = _add_query_gradients(
        dq, row_sum, q, dout, lse_log2, delta, k_ptr, v_ptr, key_offs, start_shared, end_key, first_key, rows,
        row_mask, seq_ids_ptr, cu_seqlens_ptr, qkv_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, True, True, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
    )  # fmt: skip

    inverse_sum = tl.full((BLOCK_Q,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        inverse_sum = 1.0 / tl.where(row_mask, row_sum, 1.0)
        dq *= inverse_sum[:, None]
    statistics_ptrs = statistics_ptr + 4 * (head * n_rows.to(tl.int64) + rows)
    _store_statistics(statistics_ptrs, lse_log2, delta, inverse_sum, row_mask)
    offs, mask = _tile_offs(work_list_ptr, tile, head, dq_row_stride, HEAD_SIZE, BLOCK_Q, BLOCK_D)
    tl.store(dq_ptr + offs, (dq * grad_scale).to(dq_ptr.dtype.element_ty), mask=mask)


@jit
def _keep_transposed(
    first_row,  # the first of the keys
    block_start,  # the first of the queries
    end_query,
    first_key,
    seq_ids_ptr,
    cu_seqlens_ptr,
    head,
    mask_key,
    SHARED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns the mask (BLOCK_K, BLOCK_Q) of a block of queries. See `keep_probabilities`."""
    key_offs = (tl.arange(0, BLOCK_K // GROUP) * GROUP)[:, None, None]
    rows = block_start + tl.arange(0, BLOCK_Q).reshape(1, BLOCK_Q // GROUP, GROUP)
    if SHARED:
        seq_ids = tl.load(seq_ids_ptr + rows, mask=rows < end_query, other=0)
        places = first_row - tl.load(cu_seqlens_ptr + seq_ids) + key_offs
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
    seq_ids_ptr,
    cu_seqlens_ptr,
    start,
    end,
    first_row,
    end_row,
    first_key,
    qkv_row_stride,
    dout_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    head,
    mask_key,
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
        key_first_row, key_end_row = _own_range(keys, keys < end_row, seq_ids_ptr, cu_seqlens_ptr)
    for block_start in range(start, end, BLOCK_Q):
        queries = block_start + tl.arange(0, BLOCK_Q)
        query_mask = queries < end
        long_start = tl.cast(block_start, tl.int64)
        q = _load_rows(q_ptr + long_start * qkv_row_stride + q_offs, query_mask, d_mask, MASKED, PADDED_D)
        dout = _load_rows(dout_ptr + long_start * dout_row_stride + dout_offs, query_mask, d_mask, MASKED, PADDED_D)
        if DROPOUT:
            bits = _keep_transposed(
                first_row, block_start, end, first_key, seq_ids_ptr, cu_seqlens_ptr, head, mask_key,
                SHARED, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK_K, BLOCK_Q)
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        if MASKED and not SHARED:
            scores = tl.where(query_mask[None, :], scores, float("-inf"))
        if SHARED:
            own = (queries[None, :] >= key_first_row[:, None]) & (queries[None, :] < key_end_row[:, None])
            scores = tl.where(own, scores, float("-inf"))
        lse_log2, delta, inverse_sum = _load_statistics(statistics_ptr + 4 * queries, query_mask, MASKED)
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
    do_not_specialize=["n_rows", *drawing.DO_NOT_SPECIALIZE],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def _key_value_gradient_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    dout_ptr,  # (T, N, D)
    statistics_ptr,  # (N, T, 4) float32
    dk_ptr,  # (T, N, D)
    dv_ptr,  # (T, N, D)
    work_list_ptr,  # (W, 4) int32, as of `_query_gradient_kernel`; rows are keys
    seq_ids_ptr,  # (T,) int32
    cu_seqlens_ptr,  # (B + 1,) int32
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
    HEAD_SIZE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.load(work_list_ptr + 4 * tile)
    end_row = tl.load(work_list_ptr + 4 * tile + 1)
    if end_row == first_row:
        return
    first_seq = tl.load(work_list_ptr + 4 * tile + 2)
    end_seq = tl.load(work_list_ptr + 4 * tile + 3)
    first_query = tl.load(cu_seqlens_ptr + first_seq)
    end_query = tl.load(cu_seqlens_ptr + end_seq)

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
    end_unmasked, start_shared = first_query, first_query
    if end_seq - first_seq == 1:
        end_unmasked, start_shared = first_query + (end_query - first_query) // BLOCK_Q * BLOCK_Q, end_query
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dk, dv = _add_key_value_gradients(
        dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, seq_ids_ptr, cu_seqlens_ptr,
        first_query, end_unmasked, first_row, end_row, first_query,
        qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, False, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    dk, dv = _add_key_value_gradients(
        dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, seq_ids_ptr, cu_seqlens_ptr,
        end_unmasked, start_shared, first_row, end_row, first_query,
        qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, True, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    dk, dv = _add_key_value_gradients(
        dk, dv, k, v, q_ptr, q_offs, dout_ptr, dout_offs, statistics_ptr, seq_ids_ptr, cu_seqlens_ptr,
        start_shared, end_query, first_row, end_row, first_query,
        qkv_row_stride, dout_row_stride, scale_log2, d_mask, head, mask_key,
        DROPOUT, NORMALIZE, True, True, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip

    if DROPOUT:
        dv *= keep_scale
    offs, mask = _tile_offs(work_list_ptr, tile, head, grad_row_stride, HEAD_SIZE, BLOCK_K, BLOCK_D)
    tl.store(dk_ptr + offs, (dk * grad_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


class Plan(NamedTuple):
    """A `Plan` holds what the gradients need of a batch, int32 and on its device.

    cu_seqlens: (B + 1,). seq_ids: (T,), the sequence of each token. query_tiles, key_tiles: (W, 4), of `work_lists`.
    """

    cu_seqlens: torch.Tensor
    seq_ids: torch.Tensor
    query_tiles: torch.Tensor
    key_tiles: torch.Tensor


def work_lists(
    cu_seqlens: Sequence[int], tiles: configs.AttentionBackward, share: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the tiles of queries and those of keys as `attention.build_work_list` does, once where both are the same."""
    n_queries, n_keys = tiles.query["BLOCK_Q"], tiles.key["BLOCK_K"]
    query_tiles = build_work_list(cu_seqlens, n_queries, share)
    return query_tiles, query_tiles if n_keys == n_queries else build_work_list(cu_seqlens, n_keys, share)


def varlen_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    num_heads: int,
    scale: float,
    dropout: Dropout | None = None,
    tiles: configs.AttentionBackward | None = None,
) -> torch.Tensor:
    """Computes the gradient of qkv, (T, 3 * N * D), in its dtype, from that of the result, grad (T, N * D).

    out (T, N * D) and lse (N, T) float32 are what `varlen_attention_forward` computed with the same scale and dropout.
    Each needs unit stride along its last axis. Rows that no tile holds are left as they are: the caller sets them to
    zero where the batch has some.
    """
    n_rows, hidden_size = grad.shape
    head_size = hidden_size // num_heads
    grad_qkv = launch.empty((n_rows, 3 * hidden_size), like=qkv)
    if n_rows == 0:
        return grad_qkv
    statistics = launch.empty((num_heads, n_rows, 4), like=lse)
    tiles = tiles or configs.attention_backward_configs(qkv.dtype, head_size, launch.arch(qkv.device))
    shared = {
        "q_ptr": qkv,
        "k_ptr": qkv[:, hidden_size:],
        "v_ptr": qkv[:, 2 * hidden_size :],
        "dout_ptr": grad,
        "statistics_ptr": statistics,
        "seq_ids_ptr": plan.seq_ids,
        "cu_seqlens_ptr": plan.cu_seqlens,
        "qkv_row_stride": qkv.stride(0),
        "dout_row_stride": grad.stride(0),
        "n_rows": n_rows,
        "scale_log2": scale * LOG2_E.value,
        "grad_scale": scale * (1.0 if dropout is None else dropout.scale),
        "HEAD_SIZE": head_size,
        "DROPOUT": dropout is not None,
        "NORMALIZE": qkv.dtype == torch.float32,
        "INPUT_PRECISION": launch.dot_precision(qkv.dtype),
        **drawing.arguments(dropout),
    }
    # Grids: every tile of a work list, for every head.
    launch.run(
        _query_gradient_kernel,
        (plan.query_tiles.shape[0], num_heads),
        tiles.query,
        **shared,
        out_ptr=out,
        lse_ptr=lse,
        dq_ptr=grad_qkv,
        work_list_ptr=plan.query_tiles,
        out_row_stride=out.stride(0),
        lse_head_stride=lse.stride(0),
        dq_row_stride=grad_qkv.stride(0),
    )
    launch.run(
        _key_value_gradient_kernel,
        (plan.key_tiles.shape[0], num_heads),
        tiles.key,
        **shared,
        dk_ptr=grad_qkv[:, hidden_size:],
        dv_ptr=grad_qkv[:, 2 * hidden_size :],
        work_list_ptr=plan.key_tiles,
        grad_row_stride=grad_qkv.stride(0),
    )
    return grad_qkv
