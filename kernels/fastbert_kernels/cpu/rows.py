"""This module runs the operations between the products of a training step by the C++ kernels, forward and backward.

C is the dtype of products, S that of the residual stream: both float32, both bfloat16, or C bfloat16 and S float32.
Parameters are float32 or bfloat16. Rows may have a stride; columns are contiguous. H is at most MAX_HIDDEN. Sums over
rows have a fixed order, so that their bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.cpu import dropout as masks
from fastbert_kernels.cpu import library
from fastbert_kernels.cpu.encoder import MAX_HIDDEN
from fastbert_kernels.cpu.operations import ACTIVATIONS
from fastbert_kernels.masks import Dropout

_BLOCK = 32  # Rows of a partial sum, BLOCK in column_sums.h.
_POINTER, _SIZE, _MASK = ctypes.c_void_p, ctypes.c_int64, masks.ARGUMENTS
_ROWS = (_POINTER, _SIZE)  # An address and a stride.
_PARAMETER = (_POINTER, _SIZE)  # An address, and 1 for bfloat16.
_SHAPE = (_SIZE, _SIZE)
_NORM_OUT = (*_PARAMETER, *_PARAMETER, ctypes.c_float, *_MASK, *_SHAPE, *[_POINTER] * 5)
_TYPES = {
    "residual_norm": (*_ROWS, *_PARAMETER, *_ROWS, *_NORM_OUT),
    "residual_norm_backward": (
        *_ROWS, *_ROWS, *[_POINTER] * 3, *_PARAMETER, *_MASK, *_MASK, *_SHAPE, *[_POINTER] * 4,
    ),
    "embedding_norm": (*[_POINTER] * 3, *_ROWS, *_ROWS, *_ROWS, *_NORM_OUT),
    "activation_backward": (*_ROWS, *_ROWS, _POINTER, _POINTER, *_SHAPE, _SIZE, _POINTER, _POINTER),
    "dropout": (*_ROWS, *_MASK, *_SHAPE, _POINTER),
}  # fmt: skip


class NormForward(NamedTuple):
    """`NormForward` holds normalised rows, and the data for their backward pass."""

    y: Tensor  # (T, H) S
    y_low: Tensor | None  # (T, H), y rounded to C.
    total: Tensor  # (T, H), the normalised sum, rounded to C.
    mean: Tensor  # (T,) float32, as is rstd. Both are those of the sum before rounding.
    rstd: Tensor


class NormBackward(NamedTuple):
    """`NormBackward` holds the gradients of a residual and its LayerNorm."""

    grad_x: Tensor | None  # (T, H) C
    grad_residual: Tensor | None  # (T, H) S
    grad_weight: Tensor  # (H,) float32, as are the others.
    grad_ln_bias: Tensor
    grad_bias: Tensor


@functools.lru_cache(64)
def _function_of(loaded: Any, name: str, suffix: str) -> Any:
    function = getattr(loaded, f"fastbert_{name}_{suffix}")
    function.argtypes, function.restype = _TYPES[name], None
    return function


def _function(name: str, compute: torch.dtype, stream: torch.dtype) -> Any:
    suffixes = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    suffix = suffixes.get(compute) if compute == stream else None
    if (compute, stream) == (torch.bfloat16, torch.float32):
        suffix = "mixed"
    if suffix is None:
        raise TypeError(f"{name}: expected float32, bfloat16, or bfloat16 beside float32, got {compute}, {stream}")
    return _function_of(library.load()[0], name, suffix)


def _rows(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _parameter(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.dtype == torch.bfloat16)


def _check_width(width: int) -> None:
    if width > MAX_HIDDEN:
        raise ValueError(f"H: expected at most {MAX_HIDDEN}, got {width}")


def _float32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return library.empty(shape, like=like, dtype=torch.float32)


def _partials(n_rows: int, n_sums: int, like: Tensor) -> Tensor:
    return _float32((-(-n_rows // _BLOCK), n_sums), like)


def _norm_forward(
    shape: tuple[int, int], stream: Tensor, compute: torch.dtype, low: bool
) -> tuple[NormForward, list[int | None]]:
    """Allocates results. Returns them and their addresses."""
    _check_width(shape[1])
    y_low = library.empty(shape, like=stream, dtype=compute) if low and compute != stream.dtype else None
    total = library.empty(shape, like=stream, dtype=compute)
    mean, rstd = _float32(shape[:1], stream), _float32(shape[:1], stream)
    out = NormForward(library.empty(shape, like=stream), y_low, total, mean, rstd)
    return out, [library.address(each) for each in out]


def residual_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout: Dropout | None,
    low: bool,
) -> NormForward:
    """Computes LayerNorm(dropout(x + bias) + residual) * weight + ln_bias.

    x: (T, H) C. residual: (T, H) S; without one, S is C. bias, weight, ln_bias: (H,). low: whether to return y in C
    too, if C is not S.
    """
    stream = x if residual is None else residual
    out, addresses = _norm_forward((x.shape[0], x.shape[1]), stream, x.dtype, low)
    _function("residual_norm", x.dtype, stream.dtype)(
        *_rows(x), *_parameter(bias), *_rows(residual), *_parameter(weight), *_parameter(ln_bias), eps,
        *masks.arguments(dropout), *x.shape, *addresses,
    )  # fmt: skip
    return out


def residual_norm_backward(
    grad: Tensor,
    grad_low: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout: Dropout | None,
    out_dropout: Dropout | None,
    want_residual: bool,
    want_x: bool = True,
) -> NormBackward:
    """Computes the gradients of `residual_norm_forward`.

    grad: (T, H) S, of y. grad_low: (T, H) C, of y_low. total, mean, rstd: from the forward pass, contiguous. dropout:
    the forward pass's. out_dropout: the dropout of y. grad_x and grad_residual are one tensor if they are equal:
    without dropout, and if C is S. Each is None if it is not requested.
    """
    _check_width(total.shape[1])
    (n_rows, width), same = total.shape, dropout is None and total.dtype == grad.dtype
    first = library.empty((n_rows, width), like=total) if want_x or (want_residual and same) else None
    second = library.empty((n_rows, width), like=grad) if want_residual and not same else None
    vectors, partials = _float32((3, width), total), _partials(n_rows, 3 * width, total)
    _function("residual_norm_backward", total.dtype, grad.dtype)(
        *_rows(grad), *_rows(grad_low), total.data_ptr(), mean.data_ptr(), rstd.data_ptr(), *_parameter(weight),
        *masks.arguments(dropout), *masks.arguments(out_dropout), n_rows, width,
        library.address(first), library.address(second), partials.data_ptr(), vectors.data_ptr(),
    )  # fmt: skip
    return NormBackward(first if want_x else None, first if want_residual and same else second, *vectors.unbind())


def embedding_norm_forward(
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> NormForward:
    """Computes dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Ids: (T,) int64, contiguous, within their tables. Tables: (V, H), (types, H), (P, H) S. Without input_ids, word is
    (T, H) and read row by row. Without a table token_type, its term is left out. dtype: C. If C is not S, there is a
    y_low. The backward pass is `residual_norm_backward` with this dropout as out_dropout.
    """
    out, addresses = _norm_forward((position_ids.shape[0], word.shape[1]), word, dtype, True)
    ids = map(library.address, (input_ids, token_type_ids, position_ids))
    _function("embedding_norm", dtype, word.dtype)(
        *ids, *_rows(word), *_rows(token_type), *_rows(position), *_parameter(weight), *_parameter(ln_bias), eps,
        *masks.arguments(dropout), *out.y.shape, *addresses,
    )  # fmt: skip
    return out


def embedding_scatter(
    grad_rows: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Adds up the rows (T, E) of each id (T,) in float32, in order. Returns a table (n_rows, E) of dtype, or of theirs.

    padding_idx: the id whose row stays 0. PyTorch's operation also has a fixed order of its sums, and is as fast as the
    memory of the table. It adds up in the dtype of the rows, so bfloat16 is converted to float32 here.
    """
    scatter, padding = torch.ops.aten.embedding_dense_backward, -1 if padding_idx is None else padding_idx
    dtype, rows = dtype or grad_rows.dtype, grad_rows.float()
    if dtype == torch.float32 or n_rows <= len(ids):
        return scatter(rows, ids, n_rows, padding, False).to(dtype)
    present, places = ids.unique(return_inverse=True)
    sums = scatter(rows, places, len(present), -1, False)
    sums[present == padding] = 0.0
    return sums.new_zeros((n_rows, sums.shape[1]), dtype=dtype).index_copy_(0, present, sums.to(dtype))


def activation_backward(grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Computes grad * act'(pre), act(pre), and the column sums of the first, (I,) float32.

    grad, pre: (T, I) C, where pre includes the bias. activation: "gelu", "gelu_tanh" or "relu".
    """
    n_rows, width = pre.shape
    grad_pre, activated = library.empty((n_rows, width), like=pre), library.empty((n_rows, width), like=pre)
    grad_bias, partials = _float32((width,), pre), _partials(n_rows, width, pre)
    _function("activation_backward", pre.dtype, grad.dtype)(
        *_rows(grad), *_rows(pre), grad_pre.data_ptr(), activated.data_ptr(), n_rows, width, ACTIVATIONS[activation],
        partials.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_pre, activated, grad_bias


def dropout_forward(x: Tensor, dropout: Dropout) -> Tensor:
    """Sets elements of rows (T, H), float32 or bfloat16, to zero and scales the others. It is its own backward pass."""
    out = library.empty((x.shape[0], x.shape[1]), like=x)
    _function("dropout", x.dtype, x.dtype)(*_rows(x), *masks.arguments(dropout), *x.shape, out.data_ptr())
    return out
