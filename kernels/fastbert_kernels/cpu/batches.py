"""This module reads the lengths of a batch, and writes the input of a CUDA graph, in one C++ call each."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastbert_kernels.cpu import library

ALL = 2**63 - 1  # More tokens than a sequence has.
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Cutting(NamedTuple):
    """A `Cutting` describes how sequences are cut into tiles: the arguments of `work_list.build_work_list`."""

    block_q: int
    share: bool = True
    longer_than: int = 0
    up_to: int = ALL


class StaticList(NamedTuple):
    """A `StaticList` is a list of tiles in static memory: its first integer, and the most tiles that it can hold."""

    cutting: Cutting
    start: int
    room: int


_EMPTY = StaticList(Cutting(1), 0, 0)


class StaticIntegers:
    """`StaticIntegers` describe the places of attention's int32 in the static memory of a CUDA graph.

    lists: one list of tiles, or that of long sequences and that of short ones. row_spans: the first integer of the
    rows' spans, (T',), None if neighbours do not share tiles. cu_seqlens: the first one of the offsets, (T' + 1,).
    columns: the first one of the rows' columns, (T',), followed by their sequences, (T',); None without them.
    """

    def __init__(
        self, lists: Sequence[StaticList], row_spans: int | None, cu_seqlens: int, columns: int | None = None
    ) -> None:
        members = [len(lists)]
        for each in [*lists, _EMPTY][:2]:
            members += [*each.cutting, each.start, each.room]
        members += [-1 if row_spans is None else row_spans, cu_seqlens, -1 if columns is None else columns]
        self._members = (_SIZE * len(members))(*members)
        self.address = ctypes.addressof(self._members)


def longest_of(cu_seqlens: torch.Tensor, n_tokens: int) -> int:
    """Returns the length of the longest sequence. cu_seqlens: (B + 1,) int32 or int64 on the host, contiguous.

    Returns -1 if they do not start at 0, decrease, or do not end at n_tokens.
    """
    longest: int = _functions(library.load()[0]).longest(
        cu_seqlens.data_ptr(), cu_seqlens.element_size(), cu_seqlens.shape[0], n_tokens
    )
    return longest


def work_list(cu_seqlens: torch.Tensor, cutting: Cutting, tiles: torch.Tensor, row_spans: torch.Tensor) -> int:
    """Writes the work list of a batch: see `work_list.build_work_list`. All tensors are int32 and contiguous.

    cu_seqlens: (B + 1,), which must be right. tiles: (W, 5), for at most W tiles. row_spans: (T,), unused if neighbours
    do not share tiles. Returns 2 n + s for n tiles; s is 1 if one of them is shared; -1 for more than W tiles.
    """
    rows = row_spans.data_ptr() if cutting.share else None
    n_tiles: int = _functions(library.load()[0]).work_list(
        cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, *cutting, tiles.data_ptr(), tiles.shape[0], rows
    )
    return n_tiles


class TileChoice(ctypes.Structure):
    """A `TileChoice` holds the sizes of large and of small tiles, and decides which batches take the small ones.

    small_q is 0 if there are no small ones. few_tokens: batches with at most so many tokens take them. short_texts: the
    same limit for the tokens of a text, on average over tokens.
    """

    _fields_ = (
        ("block_q", _SIZE), ("share", _SIZE), ("small_q", _SIZE), ("share_small", _SIZE), ("few_tokens", _SIZE),
        ("short_texts", _SIZE),
    )  # fmt: skip


def suitable_tiles(cu_seqlens: torch.Tensor, choice: TileChoice) -> int:
    """Chooses between the tiles of a batch, and counts them: 2 n + s for n tiles; s is 1 for the small ones.

    cu_seqlens: (B + 1,) int32 on the host, contiguous and right.
    """
    n_tiles: int = _functions(library.load()[0]).suitable_tiles(cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, choice)
    return n_tiles


def fill_words(
    words: torch.Tensor,
    bucket: int,
    integers: StaticIntegers,
    cu_seqlens: torch.Tensor,
    number: int,
    ids: Sequence[int],
) -> bool:
    """Fills words, int64 on the host, in the layout of `fastbert.engine.static_memory.Layout`.

    bucket: the T' rows of its ids. cu_seqlens: (B + 1,) int32 on the host, contiguous and right. number: of the batch.
    ids: the addresses of input_ids, token_type_ids and position_ids, (T,) int64 each; 0 for ids that are zeros, and for
    positions that count from 0 in each sequence. Columns are zeros. Returns False if a list is too small.
    """
    fits: int = _functions(library.load()[0]).fill_words(
        words.data_ptr(), bucket, integers.address, cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, number, *ids
    )
    return fits != 0


class _Functions(NamedTuple):
    """The functions of a library keep the GIL: to get it back would take longer than most batches take to write."""

    work_list: Any
    suitable_tiles: Any
    fill_words: Any
    longest: Any


_TYPES = _Functions(
    work_list=(_POINTER, *[_SIZE] * 5, _POINTER, _SIZE, _POINTER),
    suitable_tiles=(_POINTER, _SIZE, ctypes.POINTER(TileChoice)),
    fill_words=(_POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3),
    longest=(_POINTER, *[_SIZE] * 3),
)


@functools.lru_cache(8)
def _functions(loaded: Any) -> _Functions:
    return _Functions(*(
        ctypes.PYFUNCTYPE(_SIZE, *types)(library.address_of(getattr(loaded, f"fastbert_{name}")))
        for name, types in _TYPES._asdict().items()
    ))  # fmt: skip
