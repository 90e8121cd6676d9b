"""This module multiplies 8-bit operands by the C++ kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastbert_kernels.cpu import library
from fastbert_kernels.cpu.operations import ACTIVATIONS


@dataclass(frozen=True)
class Int8Weight:
    """An `Int8Weight` is a weight (M, K) in the form that `linear_int8_forward` reads."""

    packed: torch.Tensor
    columns: torch.Tensor  # (3, M, filled up) float32: scales, scales times the sums of the rows, bias
    shape: tuple[int, int]


def pack_int8(data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Int8Weight:
    """Packs a weight for `linear_int8_forward`.

    data: (M, K) int8, -127 to 127, K at most 66,000. scale: (M,) float32. bias: (M,) or None.
    """
    kernels, (n_columns, k) = library.load()[0], data.shape
    data = data.contiguous()
    packed = torch.empty(kernels.fastbert_packed_size_int8(n_columns, k), dtype=torch.int8, device="cpu")
    kernels.fastbert_pack_int8(data.data_ptr(), n_columns, k, packed.data_ptr())
    n_padded = kernels.fastbert_padded_columns_int8(n_columns)
    columns = torch.zeros(3, n_padded, dtype=torch.float32, device="cpu")
    columns[0, :n_columns] = scale
    columns[1, :n_columns] = scale * data.sum(1, dtype=torch.int64)
    if bias is not None:
        columns[2, :n_columns] = bias
    return Int8Weight(packed, columns, (n_columns, k))


def quantize_forward(x: torch.Tensor, rotated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises each row to 8 bits: x ~ affine[:, 0] * q + affine[:, 1].

    x: (T, K) float32 or bfloat16, rows contiguous. Returns q (T, K) uint8 and affine (T, 2) float32. rotated: whether x
    is multiplied with the Hadamard matrix first, in blocks of 32 columns; K is then a multiple of 32 up to MAX_HIDDEN.
    """
    n_rows, k = x.shape
    # The product reads rows in steps of four columns.
    q = torch.empty((n_rows, -(-k // 4) * 4), dtype=torch.uint8, device="cpu")
    affine = library.empty((n_rows, 2), like=x.new_empty(0, dtype=torch.float32))
    function = library.function("quantize", x.dtype)
    function(x.data_ptr(), x.stride(0), n_rows, k, rotated, q.data_ptr(), q.stride(0), affine.data_ptr())
    return q[:, :k], affine


def linear_int8_forward(
    q: torch.Tensor,
    affine: torch.Tensor,
    weight: Int8Weight,
    dtype: torch.dtype,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes activation(x @ weight^T + bias) + residual in dtype, for x = affine[:, 0] * q + affine[:, 1].

    q: (T, K) uint8, its row stride a multiple of 4. affine: (T, 2) float32. residual: (T, M) in dtype. Returns (T, M).
    """
    (n_columns, k), n_rows = weight.shape, q.shape[0]
    out = library.empty((n_rows, n_columns), like=affine.new_empty(0, dtype=dtype))
    library.function("linear_int8", dtype)(
        q.data_ptr(), q.stride(0), affine.data_ptr(), weight.packed.data_ptr(), weight.columns.data_ptr(),
        library.address(residual), 0 if residual is None else residual.stride(0),
        out.data_ptr(), n_columns, n_rows, k, n_columns, ACTIVATIONS[activation],
    )  # fmt: skip
    return out
