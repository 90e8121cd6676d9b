"""This module packs weights in the order in which `linear_forward` reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from fastbert_kernels.cpu import library


def pack_weight(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Packs a weight (M, K) for x @ weight^T.

    dtype: the product's, which `multiplies`: the weight's, or bfloat16 for a weight of float32, which is rounded.
    """
    return pack_weights((weight,), dtype)


def pack_transposed(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Packs a weight (M, K) for x @ weight, a product with K columns: the gradient of a linear layer's input."""
    return pack_weights((weight,), dtype, transposed=True)


def pack_weights(
    weights: Sequence[torch.Tensor], dtype: torch.dtype | None = None, transposed: bool = False
) -> torch.Tensor:
    """Packs weights (M_i, K) of one dtype as one weight, with their rows one after the other.

    transposed: whether for x @ weight, instead of x @ weight^T. dtype: as for `pack_weight`.
    """
    weights = [weight if weight.stride(-1) == 1 else weight.contiguous() for weight in weights]
    dtype, n_rows, k_size = dtype or weights[0].dtype, [len(weight) for weight in weights], weights[0].shape[1]
    sizes = (k_size, sum(n_rows)) if transposed else (sum(n_rows), k_size)
    packed = torch.empty(library.load()[0].fastbert_packed_size(*sizes), dtype=dtype, device="cpu")
    addresses = (ctypes.c_void_p * len(weights))(*map(library.address, weights))
    strides, heights = (_integers(values) for values in ([weight.stride(0) for weight in weights], n_rows))
    library.function("pack", weights[0].dtype, dtype)(
        addresses, strides, heights, len(weights), k_size, transposed, packed.data_ptr()
    )
    return packed


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
