"""This module makes the list of tiles for attention's kernels, once for each batch.

A tile of Q rows holds either a slice of one long sequence or several whole short ones, so that sequences of 20 tokens
do not each need a whole tile:

    sequences   |----- 0 -----|-1-|--2--|-3-|------- 4 -------|
    tiles       |  a   |  b   |      c      |   d    |   e    |       c is masked block-diagonally

A row of the list holds all data that a program needs to load queries and keys, in one read. For a tile of several
sequences, further data are read for each row of the tile, next to the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastbert_kernels import cpu

N_COLUMNS = 5  # columns of a list: see `WorkList`
# A row's span within its tile: the first row of its sequence in the low bits, the end in the high bits.
SPAN_BITS = 16


class WorkList(NamedTuple):
    """A `WorkList` holds the tiles of a batch, int32.

    tiles: (W, 5), each `first row, end row, first key, end key, shared`. shared is 1 if the tile is of several
    sequences, else 0. A list of fixed length ends with tiles without rows. row_spans: (T,), begin + 2^16 * end of each
    row's sequence, counted from the first row of its tile; 0 in tiles of one sequence. It is (0,) if no tile is shared.
    """

    tiles: torch.Tensor
    row_spans: torch.Tensor

    def to(self, device: torch.device | str) -> WorkList:
        """Returns the list on a device."""
        return WorkList(self.tiles.to(device), self.row_spans.to(device))


def build_work_list(
    cu_seqlens: Sequence[int] | np.ndarray,
    block_q: int,
    share: bool = True,
    longer_than: int = 0,
    up_to: int = cpu.ALL,
) -> WorkList:
    """Lists the tiles of a batch, on the CPU.

    cu_seqlens are host integers. Sequences longer than block_q, which is at most 2^15, are cut into slices of block_q
    rows; runs of neighbours that fit a tile together share one, unless share is False. Sequences of length 0 get no
    rows. Tiles with the most keys come first, so that the last programs to run are short ones. longer_than, up_to: the
    list has only sequences with more than longer_than and at most up_to tokens; share must then be False.
    """
    offsets = np.ascontiguousarray(cu_seqlens, np.int32)
    if cpu.obstacle() is not None:
        return _in_numpy(offsets, block_q, share, longer_than, up_to)
    n_tokens, n_seqs = int(offsets[-1]), offsets.shape[0] - 1
    # A sequence has at most one tile that is not full.
    tiles = torch.empty((n_seqs + n_tokens // block_q, N_COLUMNS), dtype=torch.int32, device="cpu")
    row_spans = torch.empty(n_tokens if share else 0, dtype=torch.int32, device="cpu")
    cutting = cpu.Cutting(block_q, share, longer_than, up_to)
    n_tiles = cpu.work_list(torch.from_numpy(offsets), cutting, tiles, row_spans)
    return WorkList(tiles[: n_tiles >> 1], row_spans if n_tiles & 1 else row_spans[:0])


def _in_numpy(offsets: np.ndarray, block_q: int, share: bool, longer_than: int, up_to: int) -> WorkList:
    """Lists the tiles of a batch without C++ kernels. The arguments are those of `build_work_list`."""
    starts, ends = offsets[:-1], offsets[1:]
    lengths = ends - starts
    chosen = (lengths > longer_than) & (lengths <= up_to)
    if not chosen.all():
        starts, ends, lengths = starts[chosen], ends[chosen], lengths[chosen]
    n_seqs = starts.shape[0]
    row_spans = np.empty(0, np.int32)
    shared: np.ndarray | int = 0
    if share and n_seqs > 1 and (heads := _heads(starts, ends, block_q)).shape[0] < n_seqs:
        counts = np.diff(heads, append=n_seqs)
        firsts = starts[heads]
        in_shared = np.repeat(counts > 1, counts)
        begins = np.where(in_shared, starts - np.repeat(firsts, counts), 0)
        row_spans = np.repeat(np.where(in_shared, begins + (begins + lengths << SPAN_BITS), 0), lengths)
        starts, ends, shared = firsts, ends[heads + counts - 1], counts > 1
        lengths = ends - starts
    slices: np.ndarray | int = 0
    if n_seqs and int(lengths.max()) > block_q:
        counts = -(-lengths // block_q)
        last = counts.cumsum()
        slices = np.arange(int(last[-1]), dtype=np.int32) - np.repeat(last - counts, counts).astype(np.int32)
        starts, ends, lengths = (np.repeat(values, counts) for values in (starts, ends, lengths))
        shared = np.repeat(shared, counts) if isinstance(shared, np.ndarray) else shared
    tiles = np.empty((starts.shape[0], N_COLUMNS), np.int32)
    tiles[:, 0] = starts + slices * block_q
    np.minimum(tiles[:, 0] + block_q, ends, out=tiles[:, 1])
    tiles[:, 2], tiles[:, 3], tiles[:, 4] = starts, ends, shared
    if tiles.shape[0] > 1:
        tiles = tiles.take(np.argsort(-lengths, kind="stable"), axis=0)
    return WorkList(torch.from_numpy(tiles), torch.from_numpy(row_spans))


def _heads(starts: np.ndarray, ends: np.ndarray, block_q: int) -> np.ndarray:
    """Returns the first sequence of each run. A run is as many sequences as fit a tile, or one sequence in slices."""
    after = np.maximum(np.searchsorted(ends, starts + block_q, side="right"), np.arange(1, starts.shape[0] + 1))
    following, heads, seq, n_seqs = after.tolist(), [], 0, starts.shape[0]
    while seq < n_seqs:
        heads.append(seq)
        seq = following[seq]
    return np.array(heads)


def max_short_tiles(n_tokens: int) -> int:
    """Returns the length of a static list of the tiles of short sequences: one tile for 4 tokens.

    A sequence of 17 tokens has 2 tiles, 8.5 tokens each. Only many sequences of few tokens need a longer list.
    """
    return -(-n_tokens // 4)


def max_tiles(n_tokens: int, block_q: int) -> int:
    """Returns the greatest number of tiles in `build_work_list` for n_tokens tokens in any sequences.

    Let Q be block_q. A sequence of k >= 2 tiles has at least (k - 1) Q + 1 tokens. A shared tile ends where the
    next sequence does not fit: together with the tile after it, if that is shared too, it has more than Q tokens.
    So count, from the start, a shared tile with what follows it: two shared ones, 2 tiles, at least Q + 1 tokens; a
    shared one and a long sequence, k + 1 tiles, at least (k - 1) Q + 2 tokens, most tiles a token at k = 2; a long
    sequence by itself, k tiles, at least (k - 1) Q + 1 tokens. The most is 3 tiles in Q + 2 tokens (lengths 1,
    Q + 1, 1, Q + 1, ...). Only the last shared tile may be left over, with one token or more: at most
    1 + 3 (n_tokens - 1) / (Q + 2) tiles.
    """
    return 0 if n_tokens == 0 else min(n_tokens, 1 + 3 * (n_tokens - 1) // (block_q + 2))


def dense_tiles(n_tokens: int, block_q: int) -> int:
    """Returns the length of a static list for batches whose tiles are two thirds full, as in most batches."""
    return 1 + -(-3 * n_tokens // (2 * block_q))
