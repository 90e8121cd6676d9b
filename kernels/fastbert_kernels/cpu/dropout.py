"""This module draws dropout masks by the C++ kernels, and declares how the other kernels take a `Dropout`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from fastbert_kernels.cpu import library
from fastbert_kernels.masks import Dropout

ARGUMENTS = (ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64)  # Types of what `arguments` returns.


def arguments(dropout: Dropout | None) -> tuple[int, int, int]:
    """Returns threshold, seed and site as the kernels take them; threshold 0, which drops nothing, for None."""
    return (0, 0, 0) if dropout is None else (dropout.threshold, dropout.seed, dropout.site)


def dropout_mask(first_row: int, n_rows: int, n_columns: int, dropout: Dropout, num_heads: int = 1) -> torch.Tensor:
    """Draws the mask of rows that follow one another, (num_heads, n_rows, n_columns) bool, True where one is kept."""
    keep = torch.empty(num_heads, n_rows, n_columns, dtype=torch.bool, device="cpu")
    _mask_function(library.load()[0])(first_row, n_rows, n_columns, num_heads, *arguments(dropout), keep.data_ptr())
    return keep


@functools.lru_cache(8)
def _mask_function(loaded: Any) -> Any:
    function = loaded.fastbert_dropout_mask
    function.argtypes = [*[ctypes.c_int64] * 4, *ARGUMENTS, ctypes.c_void_p]
    function.restype = None
    return function
