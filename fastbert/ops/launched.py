"""This module launches the kernels of operations on the triton backend, for checked arguments, outside of any tracer.

The functions launch the same kernels as the operations of the same names. They leave out the checks, the choice of a
backend, recording, PyTorch's dispatcher and autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.attention import _kernel as attention_kernel
from fastbert.ops.attention_plan import Plan
from fastbert.ops.columns_around import ranges_of
from fastbert.ops.disentangled import by_kernel as disentangled_kernel
from fastbert.ops.gated import _kernel as gated_kernel
from fastbert.ops.gated_linear import _kernel as gated_linear_kernel
from fastbert.ops.gelu import _kernel as gelu_kernel
from fastbert.ops.layer_norm import _kernel as layer_norm_kernel
from fastbert.ops.linear import _kernel as linear_kernel
from fastbert.ops.linear import _kernel_layer_norm as split_kernel
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import _kernel as rotary_kernel
from fastbert.ops.window import _kernel as windowed_kernel


@dataclass(frozen=True, eq=False)
class Product:
    """A linear whose GEMM is chosen. weight: (M, K). bias: (M,) or None. ours: whether fastbert's GEMM runs, not
    PyTorch's.

    by_rows: whether few rows may have their own tile sizes. splits: whether a table splits K among programs for some
    number of rows, if a LayerNorm follows.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str
    ours: bool
    by_rows: bool = False
    splits: bool = False


def linear_activation(x: Tensor, product: Product) -> Tensor:
    """Computes activation(x @ weight^T + bias), (T, K) -> (T, M): see `fastbert.ops.linear`."""
    weight, bias, activation = product.weight, product.bias, product.activation
    if product.ours:
        return linear_kernel(x, weight, bias, activation, None, product.by_rows)
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
    """Computes LayerNorm(x @ weight^T + bias + residual), (T, K) -> (T, H): see `ops.linear_residual_layer_norm`.

    out: contiguous memory for the result, or None. A product with a split K does not use it.
    """
    if product.splits:
        kind = "fastbert" if product.ours else "library"
        return split_kernel(x, product.weight, product.bias, residual, weight, ln_bias, eps, kind)
    if product.ours:
        y = linear_kernel(x, product.weight, product.bias, "none", residual, product.by_rows)
        return bias_residual_layer_norm(y, None, None, weight, ln_bias, eps, out=out)
    y = F.linear(x, product.weight)
    return bias_residual_layer_norm(y, product.bias, residual, weight, ln_bias, eps, out=out)


# LayerNorm(x + bias + residual), (T, H) -> (T, H): see `fastbert.ops.bias_residual_layer_norm`.
bias_residual_layer_norm = layer_norm_kernel


def norm_queries_and_keys(
    qkv: Tensor, query_norm: tuple[Tensor, Tensor, float], key_norm: tuple[Tensor, Tensor, float]
) -> Tensor:
    """Normalises queries and keys in place, (T, 3H): see `fastbert.ops.norm_queries_and_keys`."""
    for part, norm in zip(qkv.chunk(3, 1), (query_norm, key_norm), strict=False):
        layer_norm_kernel(part, None, None, *norm, out=part)
    return qkv


# activation(first half) * second half, (T, 2 I) -> (T, I): see `fastbert.ops.gated`.
gated = gated_kernel


def gated_linear(x: Tensor, product: Product) -> Tensor:
    """Computes activation(first half) * second half of x @ weight^T + bias, (T, K) -> (T, I), in fastbert's GEMM."""
    return gated_linear_kernel(x, product.weight, product.bias, product.activation, product.by_rows)


# Disentangled attention within each sequence, (T, 3H) -> (T, H): see `fastbert.ops.disentangled_attention`.
disentangled_attention = disentangled_kernel


def activate(x: Tensor, activation: str) -> Tensor:
    """Computes activation(x), (T, H) -> (T, H): see `fastbert.ops.bias_gelu`."""
    return gelu_kernel(x, None, activation)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor | None, eps: float, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Returns x + residual and its LayerNorm, (T, H) each, equal to an addition and `bias_residual_layer_norm`.

    keep_sum: whether to return the sum, or None in its place.
    """
    from fastbert_kernels.sum_norm import sum_norm_forward

    return sum_norm_forward(x, residual, weight, ln_bias, eps, keep_sum)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotates queries and keys in place, (T, 3H): see `fastbert.ops.rotary`."""
    return rotary_kernel(qkv, cos, sin, num_heads, in_place=True)


def varlen_attention(
    qkv: Tensor, batch: PackedBatch, plan: Plan, num_heads: int, scale: float, table: Tensor | None = None
) -> Tensor:
    """Computes attention within each sequence, (T, 3H) -> (T, H): see `fastbert.ops.varlen_attention`.

    plan: the batch's plan from `attention_plan.triton_plan`. table: the table of a position bias.
    """
    columns = None if table is None else batch.columns
    return attention_kernel(
        qkv, batch.cu_seqlens, batch.cu_seqlens_cpu, plan[0], plan[1], num_heads, scale, plan[2], plan[3], table,
        columns,
    )  # fmt: skip


def windowed_attention(
    qkv: Tensor, batch: PackedBatch, plan: Plan, num_heads: int, scale: float, window: int
) -> Tensor:
    """Computes attention within a window of columns on either side."""
    return windowed_kernel(
        qkv, batch.cu_seqlens_cpu, plan[0], plan[1], num_heads, scale, window, plan[2], plan[3], batch.columns,
        ranges_of(batch, window),
    )  # fmt: skip
