"""This module runs rotary positions, gated activations and attention within a window by the C++ kernels.

Rotary positions and gated activations have a backward pass here; `attention_training` has that of attention.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.cpu import library
from fastbert_kernels.cpu.operations import ACTIVATIONS, PositionBias, varlen_attention_forward

_FAR = -1e30  # the score of keys outside of a window: its exponential is 0
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_TYPES = {
    "rotary": (_POINTER, _SIZE, *[_POINTER] * 3, *[_SIZE] * 4),
    "gated": (_POINTER, _SIZE, _POINTER, *[_SIZE] * 3),
    "gated_backward": (*[_POINTER, _SIZE] * 2, *[_POINTER] * 2, *[_SIZE] * 3),
}


@functools.lru_cache(8)
def _function_of(loaded: Any, name: str, dtype: torch.dtype) -> Any:
    function = getattr(loaded, f"fastbert_{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = _TYPES[name], None
    return function


def rotary_forward(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotates queries and keys: elements i and i + D / 2 of a head rotate together by the row's angle i.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous. cos, sin: (T, D / 2) float32, contiguous.
    Returns a new tensor like qkv, with unchanged values v.
    """
    return _rotate(qkv, library.empty((qkv.shape[0], qkv.shape[1]), like=qkv), cos, sin, num_heads, False)


def rotary_backward(grad: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotates the gradient of `rotary_forward`'s result back in place, and returns it. It must be contiguous."""
    assert grad.is_contiguous()
    return _rotate(grad, grad, cos, sin, num_heads, True)


def _rotate(qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, num_heads: int, back: bool) -> Tensor:
    _function_of(library.load()[0], "rotary", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), qkv.shape[0], num_heads,
        cos.shape[1], back,
    )  # fmt: skip
    return out


def gated_forward(x: Tensor, activation: str) -> Tensor:
    """Computes activation(first half) * second half of each row.

    x: (T, 2 * I), float32 or bfloat16, rows contiguous. activation: a key of ACTIVATIONS but "none". Returns (T, I).
    """
    n_rows, width = x.shape[0], x.shape[1] // 2
    out = library.empty((n_rows, width), like=x)
    _function_of(library.load()[0], "gated", x.dtype)(
        x.data_ptr(), x.stride(0), out.data_ptr(), n_rows, width, ACTIVATIONS[activation]
    )
    return out


def gated_backward(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Computes the gradient of x, (T, 2 I), and the result of `gated_forward`, (T, I), again, from the gradient of the
    result.

    Both have one dtype, rows contiguous.
    """
    (n_rows, width), activation_id = grad.shape, ACTIVATIONS[activation]
    d_x, out = library.empty((n_rows, 2 * width), like=x), library.empty((n_rows, width), like=x)
    _function_of(library.load()[0], "gated_backward", x.dtype)(
        grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), d_x.data_ptr(), out.data_ptr(), n_rows, width,
        activation_id,
    )  # fmt: skip
    return d_x, out


@functools.lru_cache(16)
def window_bias(num_heads: int, window: int) -> Tensor:
    """Returns the table of a `PositionBias` for a window of W columns on either side, (N, 2W + 3) float32.

    It is 0 for keys inside of the window. For keys beyond, its exponential is 0.
    """
    with torch.inference_mode(False), torch.no_grad():
        table = torch.zeros(num_heads, 2 * window + 3, device="cpu")
        table[:, [0, -1]] = _FAR
        return table


def windowed_attention_forward(
    qkv: Tensor, cu_seqlens_cpu: Tensor, num_heads: int, scale: float, window: int, columns: Tensor | None
) -> Tensor:
    """Does the same as `varlen_attention_forward` over the keys that are at most `window` columns from the query.

    columns: (T,) int32, contiguous, or None if the tokens of each sequence are neighbours. A block of queries reads the
    keys that one of them can see. The time grows with the window, and not with the square of the length.
    """
    bias = PositionBias(window_bias(num_heads, window), columns)
    return varlen_attention_forward(qkv, cu_seqlens_cpu, num_heads, scale, bias, window)
