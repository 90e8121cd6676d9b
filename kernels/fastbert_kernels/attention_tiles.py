"""These helpers are what both passes of attention's gradients share: rows of a tile, and what is kept of a query."""

from __future__ import annotations

import triton.language as tl

from fastbert_kernels.jit import jit


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
def own_range(rows, row_mask, seq_ids_ptr, cu_seqlens_ptr):
    """Returns the first and the end row of each row's sequence, 0 past row_mask."""
    seq_ids = tl.load(seq_ids_ptr + rows, mask=row_mask, other=0)
    first = tl.load(cu_seqlens_ptr + seq_ids, mask=row_mask, other=0)
    return first, tl.load(cu_seqlens_ptr + seq_ids + 1, mask=row_mask, other=0)


@jit
def tile_offs(
    work_list_ptr,
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
    rows = tl.load(work_list_ptr + 4 * tile, volatile=True) + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.load(work_list_ptr + 4 * tile + 1, volatile=True)
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
