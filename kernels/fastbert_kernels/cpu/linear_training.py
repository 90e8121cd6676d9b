"""This module computes the gradients of a linear layer's weight and bias by the C++ kernels.

The gradient of its input is a product of `linear_forward` with a weight from `pack_transposed`.
"""

from __future__ import annotations

import torch

from fastbert_kernels.cpu import library


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, want_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes grad^T @ x and the sums of grad's columns: the gradients of x @ weight^T + bias.

    grad: (T, M), x: (T, K), of one dtype that `multiplies`, rows contiguous. dtype: of the first result, float32 or
    grad's. Returns (M, K), and (M,) float32, or None unless want_bias. Bits do not depend on the number of threads.
    """
    (n_rows, m_size), k_size = grad.shape, x.shape[1]
    weight = library.empty((m_size, k_size), like=grad, dtype=dtype)
    bias = library.empty((m_size,), like=grad, dtype=torch.float32) if want_bias else None
    sizes = n_rows, m_size, k_size
    scratch = library.scratch(
        library.load()[0].fastbert_weight_gradient_bytes(*sizes, grad.element_size(), dtype != torch.float32)
    )
    library.function("weight_gradient", grad.dtype, dtype)(
        grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(), library.address(bias),
        scratch.data_ptr(), *sizes,
    )  # fmt: skip
    return weight, bias
