"""This module holds shared functions of attention's kernels: for tiles of the list, their rows, and statistics."""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.jit import jit
from fastbert_kernels.work_list import N_COLUMNS, SPAN_BITS

LOG2_E = tl.constexpr(1.4426950408889634)
# The start of the running maximum. It is finite, so that a row without a key so far does not compute inf - inf.
LOWEST = tl.constexpr(-1.0e38)
COLUMNS = tl.constexpr(N_COLUMNS)
SPAN_SHIFT, SPAN_MASK = tl.constexpr(SPAN_BITS), tl.constexpr((1 << SPAN_BITS) - 1)


@jit
def load_rows(ptrs, row_mask, d_mask, MASKED: tl.constexpr, PADDED_D: tl.constexpr):
    """Loads rows (rows, BLOCK_D), zero past the head and, where MASKED, past row_mask."""
    if MASKED:
        rows = tl.load(ptrs, mask=row_mask[:, None] & d_mask[None, :], other=0.0)
    elif PADDED_D:
        rows = tl.load(ptrs, mask=d_mask[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@jit
def load_tile(tiles_ptr, tile):
    """Returns what the work list says of a tile: first row, end row, first key, end key, and whether it is shared."""
    tile_ptr = tiles_ptr + COLUMNS * tile
    first_row, end_row = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first_key, end_key = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    return first_row, end_row, first_key, end_key, tl.load(tile_ptr + 4) != 0


@jit
def row_ranges(row_spans_ptr, rows, row_mask, first_key, end_key, shared):
    """Returns the first and the end key of each row's sequence, (rows,) each, in a tile whose keys these are."""
    spans = tl.load(row_spans_ptr + rows, mask=row_mask & shared, other=0)
    first = first_key + (spans & SPAN_MASK)
    return first, tl.where(shared, first_key + (spans >> SPAN_SHIFT), end_key)


@jit
def tile_offs(
    tiles_ptr,
    tile,
    head,
    row_stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns offsets and mask of a tile's rows, (BLOCK_ROWS, BLOCK_D), to store it.

    The work list is read again, so that no register holds them over the loops.
    """
    rows = tl.load(tiles_ptr + COLUMNS * tile, volatile=True) + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.load(tiles_ptr + COLUMNS * tile + 1, volatile=True)
    d_offs = tl.arange(0, BLOCK_D)
    offs = rows.to(tl.int64)[:, None] * row_stride + head * HEAD_SIZE + d_offs[None, :]
    return offs, row_mask[:, None] & (d_offs < HEAD_SIZE)[None, :]


@jit
def store_statistics(ptrs, lse_log2, delta, inverse_sum, row_mask):
    """Stores (rows, 4): lse times log2(e), delta, and inverse_sum twice.

    Rows of 16 bytes because Triton loads a vector of fewer elements than threads in each of them that needs it, each
    time in the loop.
    """
    pairs = tl.join(tl.join(lse_log2, delta), tl.join(inverse_sum, inverse_sum))
    rows = tl.permute(pairs, (0, 2, 1)).reshape(lse_log2.shape[0], 4)
    tl.store(ptrs[:, None] + tl.arange(0, 4)[None, :], rows, mask=row_mask[:, None])


@jit
def load_statistics(ptrs, row_mask, MASKED: tl.constexpr):
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
