"""This module runs disentangled attention by the C++ kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.cpu import library

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ROWS = (_POINTER, *[_SIZE] * 2, _POINTER, *[_SIZE] * 3, ctypes.c_float, _POINTER, _SIZE)
_DISTANCES = (*[_POINTER] * 3, _SIZE, _POINTER)


@functools.lru_cache(8)
def _function_of(loaded: Any, dtype: torch.dtype) -> Any:
    function = getattr(loaded, f"fastbert_disentangled_attention_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = (*_ROWS, *_DISTANCES), ctypes.c_int
    return function


def disentangled_attention_forward(
    qkv: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    rows_of: Tensor,
    cu_seqlens_cpu: Tensor,
    num_heads: int,
    scale: float,
    columns: Tensor | None = None,
) -> Tensor:
    """Computes softmax(scale * (q_i k_j + q_i pk[b] + k_j pq[b])) v within each sequence, b of how far i is after j.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous, D a multiple of 16. keys (pk), queries (pq):
    (2R, N * D) in the same dtype, contiguous, or None for a term that is not there. rows_of: (2M + 1,) int32, the rows
    of the distances from -M to M, which never fall. cu_seqlens_cpu: (B + 1,) int32. columns: (T,) int32, ascending in
    each sequence, or None where its tokens are neighbours. Returns (T, N * D), 0 in rows beyond the last sequence.
    Raises ValueError for offsets outside of the rows.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = library.empty((n_tokens, hidden_size), like=qkv)
    offsets = cu_seqlens_cpu.contiguous()
    status = _function_of(library.load()[0], qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size, library.address(keys), library.address(queries),
        rows_of.data_ptr(), rows_of.shape[0] // 2, library.address(columns),
    )  # fmt: skip
    library.check(status, n_tokens)
    return out
