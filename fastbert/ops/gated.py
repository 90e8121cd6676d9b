"""This module holds the gated activation of a feed-forward layer: activation(x) * gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.gelu import activate, bias_gelu
from fastbert.ops.library import register
from fastbert.ops.rotary import cpu_obstacle
from fastbert_kernels import cpu

KERNELS = {
    "triton": "fastbert_kernels.gated",
    "cpu": "fastbert_kernels.cpu",
    "torch": "torch.nn.functional.gelu, multiply",
}
COMPILED = ("gelu", "gelu_tanh", "relu", "silu")  # the activations of the C++ kernel
GATED = ("gelu", "gelu_tanh", "relu", "silu", "swish")  # those of the Triton kernel


def _eager(x: Tensor, activation: str) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return activate(first, activation) * second


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def kernel_name(activation: str) -> str:
    """Returns the Triton kernels' name of an activation."""
    return "silu" if activation == "swish" else activation


def _kernel(x: Tensor, activation: str) -> Tensor:
    from fastbert_kernels.gated import gated_forward

    return gated_forward(_rows(x), kernel_name(activation))


def _backward_kernel(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    from fastbert_kernels.gated import gated_backward

    return gated_backward(_rows(grad), _rows(x), kernel_name(activation))


def _eager_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    again = torch.is_grad_enabled()
    x = x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad():
        out = _eager(x, activation)
    return torch.autograd.grad(out, x, grad, create_graph=again)[0]


def _backward(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, None]:
    return torch.ops.fastbert.gated_backward(grad, x, activation), None


register(
    "gated(Tensor x, str activation) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, activation: x.new_empty(x.shape[0], x.shape[1] // 2),
    backward=_backward,
)
register(
    "gated_backward(Tensor grad, Tensor x, str activation) -> Tensor",
    kernel=_backward_kernel,
    eager=_eager_backward,
    fake=lambda grad, x, activation: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def triton_obstacle(x: Tensor, activation: str) -> str | None:
    """Tells why the triton backend cannot compute this gated activation in one kernel, or returns None."""
    return activation_obstacle(activation) or dispatch.dtype_obstacle(x)


def activation_obstacle(activation: str) -> str | None:
    """Tells why the Triton kernels do not support this activation in a gate, or returns None."""
    return None if activation in GATED else f"there is no Triton kernel for {activation!r}"


def gated(x: Tensor, activation: str = "gelu", *, policy: Policy = AUTO) -> Tensor:
    """Computes activation(first half) * second half of each row. x: (T, 2 I). Returns (T, I) in x's dtype.

    activation: as in `bias_gelu`. On the triton backend one kernel computes both, and another the gradients. On CPUs
    without gradients one C++ kernel computes both. Otherwise `bias_gelu` applies the activation, and PyTorch
    multiplies. Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202. Raises ValueError for an
    odd width or an unknown activation.
    """
    if tracing.has_sizes() and (x.dim() != 2 or x.shape[1] % 2):
        raise ValueError(f"x: expected shape (T, 2 I), got {tuple(x.shape)}")
    backend = dispatch.decide("gated", policy, x.device, triton_obstacle(x, activation)).backend
    compiled = backend == "cpu" and activation in COMPILED and cpu_obstacle(x) is None and dispatch.direct(x)
    if compiled or backend == "triton":
        shape = x.shape[0], x.shape[1] // 2
        facts: dict[str, Any] = {"activation": activation}
        if recording.on and recording.note("gated", backend, x.shape, shape, x.dtype, **facts):
            return x.new_zeros(shape)
        if compiled:
            return cpu.gated_forward(_rows(x), activation)
        return torch.ops.fastbert.gated(x, activation)
    first, second = x.chunk(2, dim=-1)
    activated = bias_gelu(first, None, activation, policy=policy)
    if recording.on and recording.is_dry():
        return activated
    return torch.mul(activated, second)
