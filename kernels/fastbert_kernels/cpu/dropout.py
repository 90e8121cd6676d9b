"""This module draws dropout masks by the C++ kernels, and defines how the other kernels take a `Dropout`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from fastbert_kernels.cpu import library
from fastbert_kernels.masks import Dropout

ARGUMENTS = (ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64)  # Types of the values of `arguments`.


def arguments(dropout: Dropout | None) -> tuple[int, int, int]:
    """Returns threshold, seed and site in the form of the kernels; for None threshold 0, which drops nothing."""
    return (0, 0, 0) if dropout is None else (dropout.threshold, dropout.seed, dropout.site)


def dropout_mask(first_row: int, n_rows: int, n_columns: int, dropout: Dropout, num_heads: int = 1) -> torch.Tensor:
    """Draws the mask of consecutive rows, (num_heads, n_rows, n_columns) bool, True for a kept element."""
    keep = torch.empty(num_heads, n_rows, n_columns, dtype=torch.bool, device="cpu")
    _mask_function(library.load()[0])(first_row, n_rows, n_columns, num_heads, *arguments(dropout), keep.data_ptr())
    return keep


@functools.lru_cache(8)
def _mask_function(loaded: Any) -> Any:
    function = loaded.fastbert_dropout_mask
    function.argtypes = [*[ctypes.c_int64] * 4, *ARGUMENTS, ctypes.c_void_p]
    function.restype = None
    return function
