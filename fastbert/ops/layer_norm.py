"""This module holds the operation bias + dropout + residual + LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops import dropout as masks
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.dropout import Drop, mask_of, probability_of
from fastbert.ops.kernel_modules import dense_rows, kernels_of
from fastbert.ops.library import register
from fastbert.ops.training import choose, functions
from fastbert_kernels.masks import Dropout

KERNELS = {"triton": "fastbert_kernels.layer_norm", "torch": "add, torch.nn.functional.layer_norm"}


def _eager(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    dropout: Drop = None,
) -> torch.Tensor:
    if bias is not None:
        x = x + bias
    x = masks.apply(x, dropout)
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, (tracing.length_of(weight),), weight, ln_bias, eps)


def _kernel(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    residual = None if residual is None else dense_rows(residual)
    result: torch.Tensor = kernels_of("layer_norm").bias_residual_layer_norm_forward(
        dense_rows(x), bias, residual, weight, ln_bias, eps, quantized, out
    )
    return result


register(
    "bias_residual_layer_norm(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor? ln_bias, float eps)"
    " -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, bias, residual, weight, ln_bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def triton_obstacle(hidden_size: int, *tensors: torch.Tensor | None, dropout_p: float = 0.0) -> str | None:
    """Tells why the triton backend cannot run this call, or returns None."""
    return (
        dispatch.dtype_obstacle(*tensors)
        or dispatch.hidden_size_obstacle(hidden_size)
        or dispatch.dropout_obstacle(dropout_p)
    )


def bias_residual_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    *,
    dropout: Drop = None,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """Computes LayerNorm(dropout(x + bias) + residual) * weight + ln_bias over the last axis.

    x, residual: (T, H) of one floating dtype; bias, weight, ln_bias: (H,); ln_bias None means zeros. Returns (T, H) in
    x's dtype. Raises ValueError for wrong shapes, BackendError under a strict policy.
    """
    hidden_size = x.shape[-1]
    if tracing.has_sizes():
        for name, tensor in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
            if tensor is not None and tensor.shape != (hidden_size,):
                raise ValueError(f"{name}: expected shape ({hidden_size},), got {tuple(tensor.shape)}")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    dropout_p = 0.0 if dropout is None else probability_of(dropout)
    trained = choose.perhaps(dropout, torch.compiler.is_compiling())
    trained = trained and choose.wanted(policy, dropout, x, bias, residual, weight, ln_bias)
    trained = trained and takes(x, residual, weight, *(() if ln_bias is None else (ln_bias,)))
    if trained or isinstance(dropout, Dropout):
        obstacle = choose.triton_obstacle(x.dtype, hidden_size=hidden_size)
    else:
        obstacle = triton_obstacle(hidden_size, x, bias, residual, weight, ln_bias, dropout_p=dropout_p)
    backend = dispatch.choose("layer_norm", policy.backend, policy.strict, x.device, obstacle)
    if backend != "triton":  # PyTorch on CPUs computes each row alone, with the same sums at any place
        dispatch.check_invariant("layer_norm", policy, backend, dispatch.training_obstacle(dropout_p))
    if recording.on:
        facts: dict[str, Any] = {"bias": bias is not None, "residual": residual is not None}
        if recording.note("layer_norm", backend, x.shape, x.shape, x.dtype, weight, **facts):
            return torch.empty_like(x)
    kernels = choose.kernels_of(backend, x.dtype, hidden_size=hidden_size) if trained else None
    if kernels is not None:
        x, ln_bias = x if bias is None else x + bias, torch.zeros_like(weight) if ln_bias is None else ln_bias
        return functions.residual_norm(x, residual, weight, ln_bias, eps, kernels, mask_of(dropout))
    if backend == "triton" and dropout is None:
        return torch.ops.fastbert.bias_residual_layer_norm(x, bias, residual, weight, ln_bias, eps)
    return _eager(x, bias, residual, weight, ln_bias, eps, dropout)


def norm_queries_and_keys(
    qkv: torch.Tensor,
    query_norm: tuple[torch.Tensor, torch.Tensor, float],
    key_norm: tuple[torch.Tensor, torch.Tensor, float],
    *,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """Applies LayerNorm to each row's query and key, over all heads together. Values are not changed.

    qkv: (T, 3H). query_norm, key_norm: weight and bias, (H,), and eps. Returns (T, 3H). Raises what
    `bias_residual_layer_norm` raises.
    """
    query, key, value = qkv.chunk(3, 1)
    query = bias_residual_layer_norm(query, None, None, *query_norm, policy=policy)
    key = bias_residual_layer_norm(key, None, None, *key_norm, policy=policy)
    return torch.cat([query, key, value], 1)


def takes(x: torch.Tensor, residual: torch.Tensor | None, *parameters: torch.Tensor) -> bool:
    """Tells whether the training passes take these dtypes: residual and parameters in x's dtype, or all in float32."""
    stream = x.dtype if residual is None else residual.dtype
    return stream in (x.dtype, torch.float32) and all(p.dtype == stream for p in parameters)
