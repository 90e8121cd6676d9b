"""This module holds the operation bias + activation, such as GELU."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.checkpoint.activations import ACTIVATIONS as ACTIVATIONS
from fastbert.checkpoint.activations import OTHERS, activate
from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.elementwise import in_rows
from fastbert.ops.library import register

KERNELS = {"triton": "fastbert_kernels.gelu", "torch": "add, torch.nn.functional.gelu"}


def _eager(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return activate(x if bias is None else x + bias, activation)


def _kernel(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    from fastbert_kernels.gelu import bias_gelu_forward

    return bias_gelu_forward(x if x.stride(-1) == 1 else x.contiguous(), bias, activation)


register(
    "bias_gelu(Tensor x, Tensor? bias, str activation) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, bias, activation: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def activation_obstacle(activation: str) -> str | None:
    """Tells why the triton backend cannot apply this activation, or returns None."""
    return None if activation in ("none", "gelu", "gelu_tanh") else f"there is no Triton kernel for {activation!r}"


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str = "gelu", *, policy: Policy = AUTO
) -> torch.Tensor:
    """Computes activation(x + bias). x: (T, I), bias: (I,) or None.

    activation: "gelu" (erf), "gelu_tanh", "relu" or one of fastbert.checkpoint.activations.OTHERS, for which there is
    no kernel.

    Returns (T, I) in x's dtype. Raises ValueError for a bias that does not fit or an unknown activation.
    """
    if activation not in ("gelu", "gelu_tanh", "relu") and activation not in OTHERS:
        raise ValueError(f"activation: expected 'gelu', 'gelu_tanh' or 'relu', got {activation!r}")
    if bias is not None and tracing.differ(bias.shape, (x.shape[-1],)):
        raise ValueError(f"bias: expected shape ({x.shape[-1]},), got {tuple(bias.shape)}")
    obstacle = dispatch.dtype_obstacle(x, bias) or activation_obstacle(activation)
    backend = dispatch.choose("bias_gelu", policy.backend, policy.strict, x.device, obstacle)
    if backend != "triton":
        dispatch.check_invariant("bias_gelu", policy, backend)
    if recording.on:
        facts: dict[str, Any] = {"bias": bias is not None, "activation": activation}
        if recording.note("bias_gelu", backend, x.shape, x.shape, x.dtype, **facts):
            return torch.empty_like(x)
    if backend == "triton":
        return torch.ops.fastbert.bias_gelu(x, bias, activation)
    return in_rows(lambda x: _eager(x, bias, activation), x, policy)
