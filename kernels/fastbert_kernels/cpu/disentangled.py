"""This module runs disentangled attention by the C++ kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.cpu import dropout as masks
from fastbert_kernels.cpu import library
from fastbert_kernels.masks import Dropout

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_BATCH = (_POINTER, *[_SIZE] * 3, ctypes.c_float)  # Offsets, sequences, heads, head size, scale.
_FUNCTIONS = {
    "attention": (
        _POINTER, *[_SIZE] * 2, *_BATCH, _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _POINTER, *masks.ARGUMENTS
    ),
    "backward": (
        *[_POINTER, _SIZE] * 2, _SIZE, *_BATCH, *masks.ARGUMENTS, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE,
        *[_POINTER] * 4,
    ),
}  # fmt: skip


@functools.lru_cache(8)
def _function_of(loaded: Any, name: str, dtype: torch.dtype) -> Any:
    function = getattr(loaded, f"fastbert_disentangled_{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = _FUNCTIONS[name], ctypes.c_int
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
    dropout: Dropout | None = None,
) -> Tensor:
    """Computes dropout(softmax(scale * (q_i k_j + q_i pk[b] + k_j pq[b]))) v within each sequence.

    b is the row for the number of columns that i is after j.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous, D a multiple of 16. keys (pk), queries (pq):
    (2R, N * D) in the same dtype, contiguous, or None for a missing term. rows_of: (2M + 1,) int32, the rows of the
    distances from -M to M, which never decrease. cu_seqlens_cpu: (B + 1,) int32. columns: (T,) int32, ascending in each
    sequence, or None if its tokens are neighbours. Returns (T, N * D), 0 in rows beyond the last sequence. Raises
    ValueError for offsets outside of the rows.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = library.empty((n_tokens, hidden_size), like=qkv)
    offsets = cu_seqlens_cpu.contiguous()
    status = _function_of(library.load()[0], "attention", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size, library.address(keys), library.address(queries),
        rows_of.data_ptr(), rows_of.shape[0] // 2, library.address(columns), *masks.arguments(dropout),
    )  # fmt: skip
    library.check(status, n_tokens)
    return out


def disentangled_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    rows_of: Tensor,
    cu_seqlens_cpu: Tensor,
    num_heads: int,
    scale: float,
    columns: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the gradients of qkv, and of keys and queries if they are given.

    grad: that of `disentangled_attention_forward`'s result, (T, N * D), in qkv's dtype, rows contiguous. The other
    arguments are those of the forward pass. Returns tensors like qkv, keys and queries; the first is 0 in rows beyond
    the last sequence. The bits do not depend on the number of threads. Raises ValueError for offsets outside of the
    rows.
    """
    n_tokens, width = qkv.shape
    grad_qkv = library.empty((n_tokens, width), like=qkv)
    tables = [None if table is None else library.empty(tuple(table.shape), like=table) for table in (keys, queries)]
    offsets = cu_seqlens_cpu.contiguous()
    n_rows = next(table.shape[0] for table in (keys, queries) if table is not None)
    status = _function_of(library.load()[0], "backward", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), grad.data_ptr(), grad.stride(0), n_tokens, offsets.data_ptr(),
        len(offsets) - 1, num_heads, width // (3 * num_heads), scale, *masks.arguments(dropout),
        library.address(keys), library.address(queries), n_rows, rows_of.data_ptr(), rows_of.shape[0] // 2,
        library.address(columns), grad_qkv.data_ptr(), *map(library.address, tables),
    )  # fmt: skip
    library.check(status, n_tokens)
    return grad_qkv, tables[0], tables[1]
