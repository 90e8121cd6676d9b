"""This module holds shared functions of the kernels of disentangled attention: rows of distances and their terms.

`disentangled` has the formula of attention, and `disentangled_backward` those of its gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from fastbert_kernels.jit import jit


class Distances(NamedTuple):
    """A `Distances` holds a layer's tensors for distances in columns.

    keys, queries: (2R, N * D) in the dtype of qkv, contiguous, or None. rows_of: (2M + 1,) int32. low, n_rows: the
    first row that the batch needs, and the number of rows. columns: (T,) int32, or None if the tokens of each sequence
    are neighbours. needed: (2,) int32 on the device, the first and the last of the n_rows that the batch needs, if the
    host does not know its lengths; None if it needs all.
    """

    keys: torch.Tensor | None
    queries: torch.Tensor | None
    rows_of: torch.Tensor
    low: int
    n_rows: int
    columns: torch.Tensor | None
    needed: torch.Tensor | None = None


@jit
def distances_of(
    queries,  # (rows, 1) or (1, rows) packed rows
    keys,  # (1, rows) or (rows, 1)
    query_mask,  # whether a row is one of the tile's
    key_mask,
    distances,  # (rows_of_ptr, columns_ptr, radius, low, n_rows)
    HOLES: tl.constexpr,
):
    """Returns how many columns each query is after each key, cut at the radius on either side."""
    _, columns_ptr, radius, _, _ = distances
    if HOLES:
        queries = tl.load(columns_ptr + queries, mask=query_mask, other=0)
        keys = tl.load(columns_ptr + keys, mask=key_mask, other=0)
    return tl.minimum(tl.maximum(queries - keys, -radius), radius)


@jit
def places_of(apart, distances):
    """Returns which of the n_rows rows each distance has.

    Pairs of different sequences, which are masked later, may be farther apart than any text is long.
    """
    rows_of_ptr, _, radius, low, n_rows = distances
    return tl.minimum(tl.maximum(tl.load(rows_of_ptr + apart + radius) - low, 0), n_rows - 1)


@jit
def terms_of(
    places,
    queries,  # (rows, 1) or (1, rows) packed rows
    keys,  # (1, rows) or (rows, 1)
    pair_mask,
    head,
    n_heads,
    of_queries_ptr,  # (T, N, W): q . pk, where KEYS
    of_keys_ptr,  # (T, N, W): k . pq, where QUERIES
    distances,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Returns what distances add to q . k, float32, of the shape of places."""
    n_rows = distances[4]
    width = (n_heads * n_rows).to(tl.int64)
    terms = tl.zeros(places.shape, dtype=tl.float32)
    if KEYS:
        ptrs = of_queries_ptr + queries * width + head * n_rows + places
        terms += tl.load(ptrs, mask=pair_mask, other=0.0).to(tl.float32)
    if QUERIES:
        ptrs = of_keys_ptr + keys * width + head * n_rows + places
        terms += tl.load(ptrs, mask=pair_mask, other=0.0).to(tl.float32)
    return terms


@jit
def add_by_place(
    ds,  # (R, C) float32
    apart,  # (R, C)
    own,  # (R, C): which pairs are of one sequence
    sums_ptrs,  # (R, 1): the sums of each row, (W,) float32, which no other program touches
    runs_of_ptr,  # (2 * radius + 1,) int32
    distances,
):
    """Adds the numbers of a row of ds to the sums of their places, always in the same order.

    At one time it adds one number to a sum at most: of the pairs of a row, those of a place have different runs.
    """
    radius, n_rows = distances[2], distances[4]
    near = own & (apart > -radius) & (apart < radius)
    runs = tl.load(runs_of_ptr + apart + radius)
    ptrs = sums_ptrs + places_of(apart, distances)
    n_runs = tl.max(tl.max(tl.where(near, runs + 1, 0), axis=1), axis=0)
    for run in range(0, n_runs):
        tl.debug_barrier()  # another thread may have stored what this one loads
        mask = near & (runs == run)
        tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + ds, mask=mask)
    # All pairs that are as far apart as the radius, or farther, have the first or the last row.
    before, after = own & (apart <= -radius), own & (apart >= radius)
    if tl.max(tl.max((before | after).to(tl.int32), axis=1), axis=0) != 0:
        tl.debug_barrier()
        first = tl.sum(tl.where(before, ds, 0.0), axis=1, keep_dims=True)
        has_first = tl.max(before.to(tl.int32), axis=1, keep_dims=True) != 0
        tl.store(sums_ptrs, tl.load(sums_ptrs, mask=has_first, other=0.0) + first, mask=has_first)
        tl.debug_barrier()
        last = tl.sum(tl.where(after, ds, 0.0), axis=1, keep_dims=True)
        has_last = tl.max(after.to(tl.int32), axis=1, keep_dims=True) != 0
        last_ptrs = sums_ptrs + n_rows - 1
        tl.store(last_ptrs, tl.load(last_ptrs, mask=has_last, other=0.0) + last, mask=has_last)


@jit
def rows_in_reach(first_query, end_query, first_key, end_key, distances, HOLES: tl.constexpr):
    """Returns the first of the n_rows rows that these queries and keys need, and the end of them."""
    radius, n_rows = distances[2], distances[4]
    first, end = 0, n_rows
    if not HOLES:
        first = places_of(tl.minimum(tl.maximum(first_query - end_key + 1, -radius), radius), distances)
        end = places_of(tl.minimum(tl.maximum(end_query - 1 - first_key, -radius), radius), distances) + 1
    return first, end


@jit
def add_rows_product(
    acc,  # (R, BLOCK_D) float32
    sums_ptrs,  # (R, 1): the sums of each row, (W,) float32
    row_mask,  # (R,)
    table_ptr,  # (2R, N, D), from the head on
    first,
    end,
    d_offs,  # (BLOCK_D,)
    d_mask,
    table_row_stride,
    distances,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Adds the product of a tile's sums with the rows [first, end) of pk or pq."""
    low = distances[3]
    tl.debug_barrier()  # other threads have stored the sums
    for start in range(first, end, BLOCK_W):
        places = start + tl.arange(0, BLOCK_W)
        place_mask = places < end
        sums = tl.load(sums_ptrs + places[None, :], mask=row_mask[:, None] & place_mask[None, :], other=0.0)
        table_offs = (low + places).to(tl.int64)[:, None] * table_row_stride + d_offs[None, :]
        table = tl.load(table_ptr + table_offs, mask=place_mask[:, None] & d_mask[None, :], other=0.0)
        acc = tl.dot(sums.to(table.dtype), table, acc, input_precision=INPUT_PRECISION)
    return acc
