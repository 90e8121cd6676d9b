"""This module has a kernel that packs a small padded batch on the device. The host need not know the number of tokens.

    row of a token = the number of tokens before it in the flattened (B, S) mask

`unpack` writes the data of a packed batch: offsets, the row of each place, ids in their rows, and the work list of
attention. The list is that of `work_list.build_work_list`, in the order of the sequences, and ends with empty tiles.
One program computes all for at most `MOST_ROWS` places, so there is one launch. Bytes moved: at most 33 read for each
place and 48 written for each row, 40 KB in all. `spread` copies rows back to their places, (R, N) -> (B * S, N), with
zeros for padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.attention_tiles import COLUMNS, SPAN_SHIFT
from fastbert_kernels.jit import jit

MOST_ROWS = 512
# The most slices of one sequence, in tiles of 16 rows or more.
SLICES = tl.constexpr(MOST_ROWS // 16)
# The caller's tensors, and views of memory that may begin anywhere.
POINTERS = ("mask_ptr", "input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr", "offsets_ptr", "places_ptr",
            "seq_ids_ptr")  # fmt: skip
NUMBERS = ("number", "n_sequences", "length", "n_rows", "n_tiles", "n_short_tiles", "has_types", "has_positions")


class Static(NamedTuple):
    """A `Static` is the static memory of R rows that `unpack` fills: see `engine.static_memory.Layout`.

    words: (3 R + 2,) int64: input_ids, token_type_ids and position_ids, zeros after the last token, then the number of
    the batch and of its tokens. cu_seqlens: (R + 1,) int32, whose other sequences are empty. tiles: (W, 5) int32.
    row_spans: (R,) int32, or (0,) if no tile is shared. short_tiles: (W', 5) int32, or None if there is no list of
    short sequences. columns, seq_ids: (R,) int32 each, the column and the sequence of each row, 0 and R after the last
    token; or None.
    """

    words: torch.Tensor
    cu_seqlens: torch.Tensor
    tiles: torch.Tensor
    row_spans: torch.Tensor
    short_tiles: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    seq_ids: torch.Tensor | None = None


@jit
def _clear(ptr, n_integers, BLOCK: tl.constexpr):
    """Writes zeros."""
    for start in range(0, n_integers, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(ptr + offs, tl.zeros((BLOCK,), tl.int32), mask=offs < n_integers)


@jit
def _store_tile(tiles_ptr, tile, first_row, end_row, first_key, end_key, shared, mask):
    """Writes rows of a work list: see `work_list.WorkList`."""
    ptrs = tiles_ptr + tile * COLUMNS
    tl.store(ptrs, first_row, mask=mask)
    tl.store(ptrs + 1, end_row, mask=mask)
    tl.store(ptrs + 2, tl.zeros_like(first_row) + first_key, mask=mask)
    tl.store(ptrs + 3, tl.zeros_like(first_row) + end_key, mask=mask)
    tl.store(ptrs + 4, tl.zeros_like(first_row) + shared, mask=mask)


@jit
def _list_slices(tiles_ptr, first, end, lengths, BLOCK_Q: tl.constexpr):
    """Lists slices of sequences, one sequence a lane, which share no tiles. lengths: 0 for one that is not listed."""
    counts = (lengths + BLOCK_Q - 1) // BLOCK_Q
    tile = tl.cumsum(counts, 0) - counts
    for i in range(0, tl.max(counts, 0)):
        first_row = first + i * BLOCK_Q
        _store_tile(tiles_ptr, tile + i, first_row, tl.minimum(first_row + BLOCK_Q, end), first, end, 0, i < counts)


@jit
def _list_runs(tiles_ptr, offsets_ptr, seq_ids_ptr, seq, n_sequences, n_tokens, BLOCK_Q: tl.constexpr):
    """Lists runs of sequences that fit a tile together, and slices of longer ones.

    seq: (BLOCK,) int32. Returns the first row of each one's tile, -1 where it is not shared.
    """
    slices = tl.arange(0, SLICES)
    shared_first = tl.zeros_like(seq) - 1
    head = n_sequences * 0
    tile = n_sequences * 0
    while head < n_sequences:
        first = tl.load(offsets_ptr + head)
        # A sequence that has the row BLOCK_Q rows on does not fit any more; those before it do.
        beyond = first + BLOCK_Q
        following = tl.load(seq_ids_ptr + beyond, mask=beyond < n_tokens, other=0)
        following = tl.where(beyond < n_tokens, tl.maximum(following, head + 1), n_sequences)
        end = tl.load(offsets_ptr + following)
        some = end > first
        one = tl.load(seq_ids_ptr + first, mask=some, other=0)
        other = tl.load(seq_ids_ptr + end - 1, mask=some, other=0)
        shared = one != other
        first_row = first + slices * BLOCK_Q
        end_row = tl.minimum(first_row + BLOCK_Q, end)
        _store_tile(tiles_ptr, tile + slices, first_row, end_row, first, end, shared.to(tl.int32), first_row < end)
        shared_first = tl.where((seq >= head) & (seq < following) & shared, first, shared_first)
        tile += (end - first + BLOCK_Q - 1) // BLOCK_Q
        head = following
    return shared_first


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def _unpack_kernel(
    mask_ptr,  # (B * S,) int64 or uint8
    input_ids_ptr,  # (B * S,) int64
    token_type_ids_ptr,  # (B * S,) int64, read where has_types
    position_ids_ptr,  # (B * S,) int64, read where has_positions
    offsets_ptr,  # (B + 1,) int32
    places_ptr,  # (B * S,) int32
    seq_ids_ptr,  # (R,) int32
    words_ptr,  # (3 R + 2,) int64, and the next ones: see `Static`
    cu_seqlens_ptr,  # (R + 1,) int32
    tiles_ptr,  # (W, 5) int32
    short_tiles_ptr,  # (W', 5) int32 where SHORT_Q
    row_spans_ptr,  # (R,) int32 where SHARE
    columns_ptr,  # (R,) int32 where COLUMNS_TOO
    static_seq_ids_ptr,  # (R,) int32 where COLUMNS_TOO
    number,
    n_sequences,
    length,
    n_rows,
    n_tiles,
    n_short_tiles,
    has_types,
    has_positions,
    SHARE: tl.constexpr,
    COLUMNS_TOO: tl.constexpr,
    LONGEST: tl.constexpr,  # tokens of a short sequence
    SHORT_Q: tl.constexpr,  # rows of its tiles, 0 without them
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.arange(0, BLOCK)
    inside = places < n_sequences * length
    seq = places // length
    column = places - seq * length
    valid = inside & (tl.load(mask_ptr + places, mask=inside, other=0) != 0)
    counted = valid.to(tl.int32)
    rows = tl.cumsum(counted, 0) - counted
    n_tokens = tl.sum(counted, 0)

    begins = inside & (column == 0)
    tl.store(offsets_ptr + seq, rows, mask=begins)
    tl.store(cu_seqlens_ptr + seq, rows, mask=begins)
    tl.store(offsets_ptr + n_sequences, n_tokens)
    tl.store(cu_seqlens_ptr + n_sequences, n_tokens)
    tl.store(cu_seqlens_ptr + 1 + places, n_tokens, mask=(places >= n_sequences) & (places < n_rows))
    tl.store(places_ptr + places, tl.where(valid, rows, -1), mask=inside)
    tl.store(seq_ids_ptr + rows, seq, mask=valid)

    empty = (places >= n_tokens) & (places < n_rows)
    zeros = tl.zeros((BLOCK,), tl.int64)
    input_ids = tl.load(input_ids_ptr + places, mask=valid, other=0)
    token_types = tl.load(token_type_ids_ptr + places, mask=valid & (has_types != 0), other=0)
    positions = tl.load(position_ids_ptr + places, mask=valid & (has_positions != 0), other=0)
    positions = tl.where(has_positions != 0, positions, column.to(tl.int64))
    tl.store(words_ptr + rows, input_ids, mask=valid)
    tl.store(words_ptr + places, zeros, mask=empty)
    tl.store(words_ptr + n_rows + rows, token_types, mask=valid)
    tl.store(words_ptr + n_rows + places, zeros, mask=empty)
    tl.store(words_ptr + 2 * n_rows + rows, positions, mask=valid)
    tl.store(words_ptr + 2 * n_rows + places, zeros, mask=empty)
    tl.store(words_ptr + 3 * n_rows, number.to(tl.int64))
    tl.store(words_ptr + 3 * n_rows + 1, n_tokens.to(tl.int64))
    if COLUMNS_TOO:
        tl.store(columns_ptr + rows, column, mask=valid)
        tl.store(columns_ptr + places, tl.zeros((BLOCK,), tl.int32), mask=empty)
        tl.store(static_seq_ids_ptr + rows, seq, mask=valid)
        tl.store(static_seq_ids_ptr + places, tl.zeros((BLOCK,), tl.int32) + n_rows, mask=empty)
    _clear(tiles_ptr, n_tiles * COLUMNS, BLOCK)
    if SHORT_Q:
        _clear(short_tiles_ptr, n_short_tiles * COLUMNS, BLOCK)

    tl.debug_barrier()  # what other threads have stored is read from here on
    if SHARE:
        shared_first = _list_runs(tiles_ptr, offsets_ptr, seq_ids_ptr, seq, n_sequences, n_tokens, BLOCK_Q)
        first = tl.load(offsets_ptr + seq, mask=inside, other=0) - shared_first
        end = tl.load(offsets_ptr + seq + 1, mask=inside, other=0) - shared_first
        spans = tl.where(shared_first >= 0, first + (end << SPAN_SHIFT), 0)
        tl.store(row_spans_ptr + rows, spans, mask=valid)
        tl.store(row_spans_ptr + places, tl.zeros((BLOCK,), tl.int32), mask=empty)
    else:
        there = places < n_sequences
        first = tl.load(offsets_ptr + places, mask=there, other=0)
        end = tl.load(offsets_ptr + places + 1, mask=there, other=0)
        lengths = end - first
        _list_slices(tiles_ptr, first, end, tl.where(lengths > LONGEST, lengths, 0), BLOCK_Q)
        if SHORT_Q:
            _list_slices(short_tiles_ptr, first, end, tl.where(lengths <= LONGEST, lengths, 0), SHORT_Q)


@jit(do_not_specialize=["n_places"], do_not_specialize_on_alignment=["places_ptr"])
def _spread_kernel(
    x_ptr,  # (R, N)
    places_ptr,  # (B * S,) int32
    out_ptr,  # (B * S, N)
    n_places,
    n_cols,
    x_row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place_mask = places < n_places
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < n_cols)[None, :]
    rows = tl.load(places_ptr + places, mask=place_mask, other=-1)
    x_offs = rows.to(tl.int64)[:, None] * x_row_stride + col_offs[None, :]
    x = tl.load(x_ptr + x_offs, mask=(rows >= 0)[:, None] & col_mask, other=0)
    out_offs = places.to(tl.int64)[:, None] * n_cols + col_offs[None, :]
    tl.store(out_ptr + out_offs, x, mask=place_mask[:, None] & col_mask)


def unpack(
    mask: torch.Tensor,
    length: int,
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    offsets: torch.Tensor,
    places: torch.Tensor,
    seq_ids: torch.Tensor,
    static: Static,
    number: int,
    block_q: int,
    short: tuple[int, int] = (0, 0),
) -> None:
    """Packs a batch of n = B * S places, from 1 to MOST_ROWS of them.

    mask: (n,) int64 or uint8, nonzero at tokens. length: S. ids: (n,) int64, contiguous; token_type_ids None for zeros,
    position_ids None for columns. It fills offsets, (B + 1,) int32; places, (n,) int32, the row of each place, -1 for
    padding; the first T elements of seq_ids, (n,) int32 or longer, for T tokens; and `static`. number: the number of
    the batch. block_q: rows of a tile. short: rows of the tiles of short sequences, and the greatest length of these.
    """
    n_places = mask.shape[0]
    columns, static_seq_ids = static.columns, static.seq_ids
    # Grid: one program.
    launch.run(
        _unpack_kernel,
        (1,),
        {"BLOCK": MOST_ROWS, "num_warps": 8, "num_stages": 1},
        mask_ptr=mask,
        input_ids_ptr=input_ids,
        token_type_ids_ptr=input_ids if token_type_ids is None else token_type_ids,
        position_ids_ptr=input_ids if position_ids is None else position_ids,
        offsets_ptr=offsets,
        places_ptr=places,
        seq_ids_ptr=seq_ids,
        words_ptr=static.words,
        cu_seqlens_ptr=static.cu_seqlens,
        tiles_ptr=static.tiles,
        short_tiles_ptr=static.short_tiles,
        row_spans_ptr=static.row_spans,
        columns_ptr=columns,
        static_seq_ids_ptr=static_seq_ids,
        number=number,
        n_sequences=n_places // length,
        length=length,
        n_rows=(static.words.shape[0] - 2) // 3,
        n_tiles=static.tiles.shape[0],
        n_short_tiles=0 if static.short_tiles is None else static.short_tiles.shape[0],
        has_types=int(token_type_ids is not None),
        has_positions=int(position_ids is not None),
        SHARE=static.row_spans.shape[0] > 0,
        COLUMNS_TOO=columns is not None,
        LONGEST=short[1],
        SHORT_Q=short[0],
        BLOCK_Q=block_q,
    )


def spread(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns the rows of x, (R, N) with unit stride along its last axis, at their places: (n, N), zeros elsewhere.

    places: (n,) int32, the row of each place, -1 for padding.
    """
    n_places, n_cols = places.shape[0], x.shape[1]
    out = launch.empty((n_places, n_cols), like=x)
    block_cols = min(1024, max(16, 1 << (n_cols - 1).bit_length()))
    block_rows = max(1, 2048 // block_cols)
    # Grid: one program per BLOCK_ROWS places and BLOCK_COLS columns.
    launch.run(
        _spread_kernel,
        (launch.cdiv(n_places, block_rows), launch.cdiv(n_cols, block_cols)),
        {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1},
        x_ptr=x,
        places_ptr=places,
        out_ptr=out,
        n_places=n_places,
        n_cols=n_cols,
        x_row_stride=x.stride(0),
    )
    return out
