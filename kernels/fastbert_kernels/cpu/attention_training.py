"""This module runs attention for training by the C++ kernels: a forward pass that saves its sums, and the gradients."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from fastbert_kernels.cpu import dropout as masks
from fastbert_kernels.cpu import library
from fastbert_kernels.cpu.operations import PositionBias, bias_arguments
from fastbert_kernels.masks import Dropout

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_BATCH = (_POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_float)  # Offsets, sequences, heads, head size, scale.
_FUNCTIONS = {
    "attention_training": (
        _POINTER,
        _SIZE,
        _SIZE,
        *_BATCH,
        _POINTER,
        _SIZE,
        _POINTER,
        *masks.ARGUMENTS,
        *library.BIAS,
        _SIZE,
    ),  # fmt: skip
    "attention_backward": (
        *[_POINTER, _SIZE] * 3,
        _POINTER,
        _SIZE,
        *_BATCH,
        *masks.ARGUMENTS,
        _POINTER,
        *library.BIAS,
        _POINTER,
        _SIZE,
    ),
}


def attention_training_forward(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout: Dropout | None,
    bias: PositionBias | None = None,
    window: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dropout(softmax(scale * q k^T + bias)) v within each sequence, and the data for the backward pass.

    window: the number of tokens that a query sees on either side; beyond it the bias leaves nothing
    (`gated.window_bias`); -1 for all. The time grows with the window, and not with the square of the length.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous, D a multiple of 16. cu_seqlens_cpu: (B + 1,)
    int32. Returns out, (T, N * D), and lse, (N, T) float32: the logarithm of each query's sum of exp(scale * q k). Rows
    beyond the last sequence are 0 in both. Raises ValueError for offsets outside of the rows.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = library.empty((n_tokens, hidden_size), like=qkv)
    lse = library.empty((num_heads, n_tokens), like=torch.empty(0, dtype=torch.float32))
    offsets = cu_seqlens_cpu.contiguous()
    status = _function("attention_training", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size, lse.data_ptr(), *masks.arguments(dropout),
        *bias_arguments(bias), window,
    )  # fmt: skip
    library.check(status, n_tokens)
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout: Dropout | None,
    bias: PositionBias | None = None,
    window: int = -1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the gradients of qkv and of a position bias's table.

    grad: that of `attention_training_forward`'s out, (T, N * D). The other arguments are those of the forward pass and
    its results. grad and out have qkv's dtype, rows contiguous. Returns (T, 3 * N * D), 0 in rows beyond the last
    sequence, and (N, 2R + 1) float32, or None without a bias or with a window. The bits do not depend on the number of
    threads. Raises ValueError for offsets outside of the rows.
    """
    n_tokens, width = qkv.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_qkv = library.empty((n_tokens, width), like=qkv)
    grad_table = None if bias is None or window >= 0 else library.empty(tuple(bias.table.shape), like=bias.table)
    offsets = cu_seqlens_cpu.contiguous()
    status = _function("attention_backward", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), grad.data_ptr(), grad.stride(0), out.data_ptr(), out.stride(0),
        lse.data_ptr(), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads, width // (3 * num_heads), scale,
        *masks.arguments(dropout), grad_qkv.data_ptr(), *bias_arguments(bias), library.address(grad_table), window,
    )  # fmt: skip
    library.check(status, n_tokens)
    if grad_table is not None and n_tokens == 0:
        grad_table.zero_()
    return grad_qkv, grad_table


def _function(name: str, dtype: torch.dtype) -> Any:
    return _declared(library.load()[0], name, str(dtype).removeprefix("torch."))


@functools.lru_cache(16)
def _declared(loaded: Any, name: str, dtype: str) -> Any:
    function = getattr(loaded, f"fastbert_{name}_{dtype}")
    function.argtypes = _FUNCTIONS[name]
    function.restype = ctypes.c_int
    return function
