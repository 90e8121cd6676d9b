"""This module computes disentangled attention over packed sequences. It stores no numbers for all pairs of tokens.

    out[i] = sum_j softmax_j(scale * (q[i] . k[j] + q[i] . pk[b(i - j)] + k[j] . pq[b(i - j)])) v[j]

q, k, v, out: (T, N, D), fp32 / bf16 / fp16, D from 16 to 128. pk, pq: (2R, N, D); one of them may be missing. b maps
each distance in columns to a row of pk and pq: `rows_of`, (2M + 1,) int32, for the distances from -M to M.

First a product for each head gives q . pk and k . pq, (T, N, W) each, for the W rows that the distances in the longest
sequence need. A CUDA graph has room for the longest possible sequence, and multiplies only blocks of rows that the
batch needs. Then attention reads, for each pair of a tile, one number of the query's row and one of the key's row. For
one query the numbers of neighbouring keys are neighbours, and vice versa, so that they come from the L1 cache. FLOPs: 4
* N * D * sum_b len_b^2 + 4 * T * N * W * D. Bytes moved at least: 4 * T * N * D + 4 * T * N * W elements.

A row's bits do not depend on the other sequences if tiles are not shared (`share=False` in the work list). Sources: He
et al., "DeBERTa", 2020, arXiv:2006.03654; Dao, "FlashAttention-2", 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.attention import keep_probabilities
from fastbert_kernels.attention_tiles import LOG2_E, LOWEST, load_tile, row_ranges
from fastbert_kernels.disentangled_tiles import Distances, distances_of, places_of, terms_of
from fastbert_kernels.dropout import spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.work_list import WorkList

BLOCK_Q = 64  # query rows of a tile; the work list is built for it
MAX_TILES = 65_532  # of a launch


@jit(do_not_specialize=["n_tokens", "low", "n_rows"])
def _product_kernel(
    x_ptr,  # (T, N, D)
    y_ptr,  # (2R, N, D)
    out_ptr,  # (T, N, W)
    needed_ptr,  # (2,) int32, or None
    n_tokens,
    low,
    n_rows,  # W
    x_row_stride,
    y_row_stride,
    HEAD_SIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(2), tl.num_programs(2)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_place = tl.program_id(1) * BLOCK_W
    if needed_ptr is not None:
        first_needed, last_needed = tl.load(needed_ptr), tl.load(needed_ptr + 1)
        if (first_place > last_needed) | (first_place + BLOCK_W <= first_needed):
            return
    places = first_place + tl.arange(0, BLOCK_W)
    d_offs = tl.arange(0, BLOCK_D)
    d_mask, token_mask, place_mask = d_offs < HEAD_SIZE, tokens < n_tokens, places < n_rows
    x_offs = tokens.to(tl.int64)[:, None] * x_row_stride + head * HEAD_SIZE + d_offs[None, :]
    x = tl.load(x_ptr + x_offs, mask=token_mask[:, None] & d_mask[None, :], other=0.0)
    y_offs = (low + places)[None, :] * y_row_stride + head * HEAD_SIZE + d_offs[:, None]
    y = tl.load(y_ptr + y_offs, mask=place_mask[None, :] & d_mask[:, None], other=0.0)
    out = tl.dot(x, y, input_precision=INPUT_PRECISION)
    out_offs = (tokens.to(tl.int64) * n_heads + head)[:, None] * n_rows + places[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & place_mask[None, :])


@jit
def attend_tile(
    q,  # (BLOCK_Q, BLOCK_D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    rows,  # (BLOCK_Q,) packed rows
    row_mask,
    first_key,
    end_key,
    shared,  # whether the tile is of several sequences
    row_spans_ptr,
    qkv_row_stride,
    scale_log2,
    head,
    n_heads,
    of_queries_ptr,
    of_keys_ptr,
    distances,  # (rows_of_ptr, columns_ptr, radius, low, n_rows)
    mask_key,  # (key_low, key_high, site, threshold) where DROPOUT
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
    """Returns the sum of p v, (BLOCK_Q, BLOCK_D), the sum of p, and the largest score times scale_log2."""
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    row_first_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, first_key, end_key, shared)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    row_max = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)
    for block_start in range(first_key, end_key, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        key_mask = keys < end_key
        key_offs = keys.to(tl.int64) * qkv_row_stride + head * HEAD_SIZE
        k = tl.load(k_ptr + key_offs[None, :] + d_offs[:, None], mask=d_mask[:, None] & key_mask[None, :], other=0.0)
        if DROPOUT:
            bits = keep_probabilities(block_start, rows, row_first_key, first_key, head, mask_key, shared, BLOCK_K)
        scores = tl.dot(q, k, input_precision=INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        apart = distances_of(rows[:, None], keys[None, :], row_mask[:, None], key_mask[None, :], distances, HOLES)
        scores += terms_of(
            places_of(apart, distances), rows[:, None], keys[None, :], row_mask[:, None] & key_mask[None, :], head,
            n_heads, of_queries_ptr, of_keys_ptr, distances, KEYS, QUERIES,
        )  # fmt: skip
        own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
        scores = tl.where(own, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(spread_columns(bits), p, 0.0)
        v = tl.load(v_ptr + key_offs[:, None] + d_offs[None, :], mask=key_mask[:, None] & d_mask[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=INPUT_PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@jit(do_not_specialize=["radius", "low", "n_rows"])
def _disentangled_attention_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    of_queries_ptr,  # (T, N, W): q . pk, where KEYS
    of_keys_ptr,  # (T, N, W): k . pq, where QUERIES
    rows_of_ptr,  # (2 * radius + 1,) int32
    columns_ptr,  # (T,) int32 where HOLES
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    radius,
    low,
    n_rows,
    qkv_row_stride,
    out_row_stride,
    scale_log2,  # softmax scale times log2(e)
    HEAD_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    HOLES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(0), tl.num_programs(0)
    first_row, end_row, first_key, end_key, shared = load_tile(tiles_ptr, tl.program_id(1))
    if end_row == first_row:  # what fills a work list of fixed length up
        return

    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    q_offs = rows.to(tl.int64)[:, None] * qkv_row_stride + head * HEAD_SIZE + d_offs[None, :]
    q = tl.load(q_ptr + q_offs, mask=row_mask[:, None] & d_mask[None, :], other=0.0)
    acc, row_sum, _ = attend_tile(
        q, k_ptr, v_ptr, rows, row_mask, first_key, end_key, shared, row_spans_ptr, qkv_row_stride, scale_log2, head,
        n_heads, of_queries_ptr, of_keys_ptr, (rows_of_ptr, columns_ptr, radius, low, n_rows), None,
        HEAD_SIZE, KEYS, QUERIES, HOLES, False, INPUT_PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    out = acc * (1.0 / tl.where(row_mask, row_sum, 1.0))[:, None]
    out_offs = rows.to(tl.int64)[:, None] * out_row_stride + head * HEAD_SIZE + d_offs[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & d_mask[None, :])


@functools.cache
def tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Chooses the tile of attention: BLOCK_Q query rows, BLOCK_K keys a step, the head size padded to BLOCK_D."""
    exact, narrow = dtype == torch.float32, head_size <= 16  # spills with 64 keys on sm_120
    wide = head_size > 64 or exact
    return {
        "BLOCK_Q": BLOCK_Q, "BLOCK_K": 32 if wide or narrow else 64,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "num_warps": 16 if exact and head_size > 64 else 8 if wide else 4, "num_stages": 1 if exact else 2,
    }  # fmt: skip


@functools.cache
def product_tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Chooses the tile of the products: BLOCK_T tokens, BLOCK_W rows, the head size padded to BLOCK_D."""
    wide, block_d = dtype == torch.float32, max(16, triton.next_power_of_2(head_size))
    return {
        "BLOCK_T": 64,
        "BLOCK_W": 32 if wide else 64,
        "BLOCK_D": block_d,
        "num_warps": 16 if wide and block_d > 64 else 8 if wide else 4,
        "num_stages": 1,
    }


def products(x: torch.Tensor, y: torch.Tensor, distances: Distances, num_heads: int) -> torch.Tensor:
    """Computes x . y for each head, (T, N, W), in the dtype of x. x: (T, N * D). y: (2R, N * D).

    Whole blocks of BLOCK_W rows that no distance needs (`Distances.needed`) are undefined.
    """
    n_tokens, head_size = x.shape[0], x.shape[1] // num_heads
    out = launch.empty((n_tokens, num_heads, distances.n_rows), like=x)
    config, precision, facts = product_tile(x.dtype, head_size), launch.dot_precision(x.dtype), None
    # Grid: tiles of tokens, tiles of rows, heads.
    grid = launch.cdiv(n_tokens, config["BLOCK_T"]), launch.cdiv(distances.n_rows, config["BLOCK_W"]), num_heads
    if x.data_ptr() % 16 == 0 and y.shape[0] > 1 and (dtypes := launch.alike(y, out, distances.needed)):
        facts = dtypes, x.dtype, x.stride(0), y.shape[1], head_size, precision
        head = x, y, out, distances.needed, n_tokens, distances.low, distances.n_rows
        if launch.again(_product_kernel, grid, config, facts, *head):
            return out
    launch.run_first(
        _product_kernel,
        grid,
        config,
        facts,
        7,
        x_ptr=x,
        y_ptr=y,
        out_ptr=out,
        needed_ptr=distances.needed,
        n_tokens=n_tokens,
        low=distances.low,
        n_rows=distances.n_rows,
        x_row_stride=x.stride(0),
        y_row_stride=y.stride(0),
        HEAD_SIZE=head_size,
        INPUT_PRECISION=precision,
    )
    return out


def terms(qkv: torch.Tensor, num_heads: int, distances: Distances) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the products of queries and of keys with distances, (T, N, W) each, or None for a missing one."""
    size, (keys, queries) = qkv.shape[1] // 3, distances[:2]
    of_queries = None if keys is None else products(qkv[:, :size], keys, distances, num_heads)
    of_keys = None if queries is None else products(qkv[:, size : 2 * size], queries, distances, num_heads)
    return of_queries, of_keys


def attention_arguments(
    qkv: torch.Tensor,
    out: torch.Tensor,
    num_heads: int,
    scale: float,
    distances: Distances,
    of_queries: torch.Tensor | None,
    of_keys: torch.Tensor | None,
) -> dict[str, Any]:
    """Returns the arguments of a forward kernel except its tiles. of_queries, of_keys: the results of `terms`."""
    hidden_size = out.shape[1]
    return {
        "q_ptr": qkv,
        "k_ptr": qkv[:, hidden_size:],
        "v_ptr": qkv[:, 2 * hidden_size :],
        "out_ptr": out,
        "of_queries_ptr": of_queries,
        "of_keys_ptr": of_keys,
        "rows_of_ptr": distances.rows_of,
        "columns_ptr": distances.columns,
        "qkv_row_stride": qkv.stride(0),
        "out_row_stride": out.stride(0),
        "scale_log2": scale * LOG2_E.value,
        "radius": distances.rows_of.shape[0] // 2,
        "low": distances.low,
        "n_rows": distances.n_rows,
        "HEAD_SIZE": hidden_size // num_heads,
        "KEYS": of_queries is not None,
        "QUERIES": of_keys is not None,
        "HOLES": distances.columns is not None,
        "INPUT_PRECISION": launch.dot_precision(qkv.dtype),
    }


def disentangled_attention_forward(
    qkv: torch.Tensor, work_list: WorkList, num_heads: int, scale: float, distances: Distances
) -> torch.Tensor:
    """Computes attention: (T, 3 * N * D), laid out [q | k | v], -> (T, N * D) in the same dtype.

    work_list: on qkv's device, built for BLOCK_Q. Output rows outside of all tiles are not written. qkv needs unit
    stride along its last axis.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    head_size = hidden_size // num_heads
    out = launch.empty((n_tokens, hidden_size), like=qkv)
    if n_tokens == 0:
        return out
    config, precision, (lists, row_spans) = tile(qkv.dtype, head_size), launch.dot_precision(qkv.dtype), work_list
    of_queries, of_keys = terms(qkv, num_heads, distances)
    operands = of_queries, of_keys, distances.rows_of, distances.columns
    # Grid: every head for every tile of the work list. A launch takes as many tiles as a grid's second dimension
    # allows.
    for tiles in lists.split(MAX_TILES) if lists.shape[0] > MAX_TILES else (lists,):
        grid, facts = (num_heads, tiles.shape[0]), None
        if n_tokens > 1 and (dtypes := launch.alike(qkv, out, *operands, tiles, row_spans)):
            facts = dtypes, hidden_size, num_heads, scale, precision
            q, step = qkv.data_ptr(), hidden_size * qkv.element_size()
            of_batch = distances.rows_of.shape[0] // 2, distances.low, distances.n_rows
            head = qkv, q + step, q + 2 * step, out, *operands, tiles, row_spans, *of_batch
            if launch.again(_disentangled_attention_kernel, grid, config, facts, *head):
                continue
        arguments = attention_arguments(qkv, out, num_heads, scale, distances, of_queries, of_keys)
        launch.run_first(
            _disentangled_attention_kernel,
            grid,
            config,
            facts,
            13,
            **arguments,
            tiles_ptr=tiles,
            row_spans_ptr=row_spans,
        )
    return out
