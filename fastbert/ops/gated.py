"""The gated activation of a feed-forward layer: activation(x) * gate."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.gelu import bias_gelu
from fastbert.ops.rotary import cpu_obstacle
from fastbert_kernels import cpu

KERNELS = {
    "triton": "fastbert_kernels.gelu, multiply",
    "cpu": "fastbert_kernels.cpu",
    "torch": "torch.nn.functional.gelu, multiply",
}
COMPILED = ("gelu", "gelu_tanh", "relu", "silu")  # the activations of the C++ kernel


def gated(x: Tensor, activation: str = "gelu", *, policy: Policy = AUTO) -> Tensor:
    """activation(first half) * second half, of each row. x: (T, 2 I). Returns (T, I) in x's dtype.

    activation: as in `bias_gelu`, whose kernels activate, and PyTorch multiplies; on CPUs without gradients one C++
    kernel does both. Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202. Raises ValueError for
    an odd width or an unknown activation.
    """
    if tracing.has_sizes() and (x.dim() != 2 or x.shape[1] % 2):
        raise ValueError(f"x: expected shape (T, 2 I), got {tuple(x.shape)}")
    on_cpu = dispatch.decide("gated", policy, x.device, None).backend == "cpu"
    if on_cpu and activation in COMPILED and cpu_obstacle(x) is None and dispatch.direct(x):
        shape = x.shape[0], x.shape[1] // 2
        if recording.on and recording.note("gated", "cpu", x.shape, shape, x.dtype, activation=activation):
            return x.new_zeros(shape)
        return cpu.gated_forward(x if x.stride(-1) == 1 else x.contiguous(), activation)
    first, second = x.chunk(2, dim=-1)
    activated = bias_gelu(first, None, activation, policy=policy)
    if recording.on and recording.is_dry():
        return activated
    return torch.mul(activated, second)
