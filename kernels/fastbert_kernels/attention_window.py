"""This module limits attention to a window: a query reaches only keys within so many columns.

A tile of BLOCK_Q queries reads the keys from `window` rows before its first query to `window` rows after its last one.
These are BLOCK_Q + 2 * window keys for any length of the sequence. A mask removes keys that are too far from a query.
Columns ascend in a sequence, so the keys in reach of a query are neighbours: each row has a first key and an end. If
masks have holes, both come from the host, and are no farther away than without holes. In the backward pass a tile of
keys works in the same way, because reach is symmetric.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastbert_kernels.dropout import GROUP
from fastbert_kernels.jit import jit

DO_NOT_SPECIALIZE = ("window",)
WIDEST = 1 << 29  # wider than any sequence


class Window(NamedTuple):
    """A `Window` defines the keys that a query reaches.

    size: columns on either side, 0 or more. ranges: (T, 2) int32, contiguous, the first key and the end of the keys of
    each row, if masks have holes; None if the tokens of each sequence are neighbours.
    """

    size: int
    ranges: torch.Tensor | None = None


# The arguments of a kernel without a window.
NONE: dict[str, Any] = {"window": None, "ranges_ptr": None, "WINDOWED": False}


def arguments(window: Window | None) -> dict[str, Any]:
    """Returns the arguments of a kernel for a window, or for none."""
    if window is None:
        return NONE
    return {"window": min(window.size, WIDEST), "ranges_ptr": window.ranges, "WINDOWED": True}


@jit
def keys_in_reach(first_row, end_row, first_key, end_key, window, ALIGNED: tl.constexpr):
    """Returns the first key and the end of the keys that some row of a tile reaches.

    ALIGNED: whether the first one begins a group of columns that share a draw of dropout.
    """
    first = tl.maximum(first_key, first_row - window)
    if ALIGNED:
        first = first_key + (first - first_key) // GROUP * GROUP
    return first, tl.minimum(end_key, end_row + window)


@jit
def reach_of_rows(rows, row_mask, row_first_key, row_end_key, window, ranges_ptr):
    """Returns the first key and the end of the keys of each row, (rows,) each, from those of its sequence."""
    if ranges_ptr is None:
        first = tl.maximum(row_first_key, rows - window)
        end = tl.minimum(row_end_key, rows + window + 1)
    else:
        first = tl.load(ranges_ptr + 2 * rows.to(tl.int64), mask=row_mask, other=0)
        end = tl.load(ranges_ptr + 2 * rows.to(tl.int64) + 1, mask=row_mask, other=0)
    return first, end
