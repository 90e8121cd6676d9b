"""Operations on the triton backend by their kernels alone: for arguments that were checked, outside of any tracer.

They compute what the operations of the same names compute on this backend, in the same kernels, and leave out the
checks, the choice of a backend, recording, PyTorch's dispatcher and autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.attention import _kernel as attention_kernel
from fastbert.ops.attention_plan import Plan
from fastbert.ops.gelu import _kernel as gelu_kernel
from fastbert.ops.layer_norm import _kernel as layer_norm_kernel
from fastbert.ops.linear import _kernel as linear_kernel
from fastbert.ops.packing import PackedBatch


@dataclass(frozen=True, eq=False)
class Product:
    """A linear whose GEMM is chosen. weight: (M, K). bias: (M,). ours: whether the GEMM is ours, or PyTorch's."""

    weight: Tensor
    bias: Tensor
    activation: str
    ours: bool


def linear_activation(x: Tensor, product: Product) -> Tensor:
    """activation(x @ weight^T + bias), (T, K) -> (T, M): see `fastbert.ops.linear`."""
    weight, bias, activation = product.weight, product.bias, product.activation
    if product.ours:
        return linear_kernel(x, weight, bias, activation)
    if activation == "none":
        return F.linear(x, weight, bias)
    return gelu_kernel(F.linear(x, weight), bias, activation)


def linear_residual_layer_norm(
    x: Tensor,
    product: Product,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x @ weight^T + bias + residual), (T, K) -> (T, H): see `fastbert.ops.linear_residual_layer_norm`.

    out: where to write the result, contiguous, or None for new memory.
    """
    if product.ours:
        y = linear_kernel(x, product.weight, product.bias, "none", residual)
        return bias_residual_layer_norm(y, None, None, weight, ln_bias, eps, out=out)
    y = F.linear(x, product.weight)
    return bias_residual_layer_norm(y, product.bias, residual, weight, ln_bias, eps, out=out)


# LayerNorm(x + bias + residual), (T, H) -> (T, H): see `fastbert.ops.bias_residual_layer_norm`.
bias_residual_layer_norm = layer_norm_kernel


def varlen_attention(qkv: Tensor, batch: PackedBatch, plan: Plan, num_heads: int, scale: float) -> Tensor:
    """Attention within each sequence, (T, 3H) -> (T, H): see `fastbert.ops.varlen_attention`.

    plan: what `attention_plan.triton_plan` gave for the batch.
    """
    return attention_kernel(qkv, batch.cu_seqlens, batch.cu_seqlens_cpu, plan[0], plan[1], num_heads, scale, plan[2])
