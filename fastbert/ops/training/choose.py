"""This module chooses the training passes of an operation, or gives the reason why it runs as plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import Policy
from fastbert.ops.dropout import Drop
from fastbert.ops.training.cpu import CpuKernels
from fastbert.ops.training.kernels import Kernels
from fastbert.ops.training.triton import TritonKernels
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout

CPU, TRITON = CpuKernels(), TritonKernels()
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
GATED = ("gelu", "gelu_tanh", "relu", "silu")
IN_TRAINING: ContextVar[bool] = ContextVar("fastbert passes of training", default=False)


@contextmanager
def as_in_training() -> Iterator[None]:
    """Lets operations run as in training even if no gradient is needed, so that both passes have the same bits."""
    token = IN_TRAINING.set(True)
    try:
        yield
    finally:
        IN_TRAINING.reset(token)


def perhaps(dropout: Drop, compiling: bool) -> bool:
    """Tells, at low cost, whether to call `wanted`. torch.compile cannot trace its context variable."""
    return not compiling and (torch.is_grad_enabled() or dropout is not None or IN_TRAINING.get())


def wanted(policy: Policy, dropout: Drop, *tensors: Tensor | None) -> bool:
    """Tells whether an operation on these tensors needs gradients or masks, and has no observer."""
    if policy.batch_invariant or torch.compiler.is_compiling():
        return False
    needed = isinstance(dropout, Dropout) or IN_TRAINING.get()
    if not needed and torch.is_grad_enabled():
        needed = any(t is not None and t.requires_grad for t in tensors)
    return needed and tracing.observed(*tensors) is None and not (recording.on and recording.is_dry())


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of products with x: its own, or autocast's."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def kernels(op: str, policy: Policy, device: torch.device, dtype: torch.dtype, **what: Any) -> Kernels | None:
    """Returns the passes of the backend that runs an operation, or None if plain PyTorch runs it.

    dtype: the dtype of products. what: the keywords of `triton_obstacle`. A fallback is logged once, or raised as
    BackendError under a strict policy.
    """
    backend = dispatch.choose(op, policy.backend, policy.strict, device, triton_obstacle(dtype, **what))
    return kernels_of(backend, dtype, **what)


def obstacle(policy: Policy, device: torch.device, dtype: torch.dtype, **what: Any) -> str | None:
    """Tells why an operation has no such passes under a policy, or returns None."""
    decision = dispatch.decide("", policy, device, triton_obstacle(dtype, **what))
    if decision.backend == "cpu":
        return cpu_obstacle(dtype, **what)
    if decision.backend == "torch":
        return decision.reason or "the backend is 'torch'"
    return None


def kernels_of(backend: str, dtype: torch.dtype, **what: Any) -> Kernels | None:
    """Returns the passes of a backend from `dispatch.choose`, or None if they are plain PyTorch."""
    if backend == "triton":
        return TRITON
    return CPU if backend == "cpu" and cpu_obstacle(dtype, **what) is None else None


def triton_obstacle(
    dtype: torch.dtype,
    *,
    head_size: int = 64,
    sizes: tuple[int, ...] = (),
    hidden_size: int = 0,
    activation: str = "none",
    gated: bool = False,
) -> str | None:
    """Tells why the Triton kernels have no such passes, or returns None.

    sizes: the numbers of features in products. hidden_size: the size of normalised rows. gated: whether the first half
    of the activation multiplies the second half.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no Triton kernels for {dtype}"
    if not 16 <= head_size <= 128:
        return f"head size {head_size} is not from 16 to 128"
    if activation not in (GATED if gated else ACTIVATIONS):
        return f"there is no Triton kernel for {activation!r}"
    return dispatch.hidden_size_obstacle(hidden_size)


def cpu_obstacle(
    dtype: torch.dtype,
    *,
    head_size: int = 64,
    sizes: tuple[int, ...] = (),
    hidden_size: int = 0,
    activation: str = "none",
    gated: bool = False,
) -> str | None:
    """Tells why the C++ kernels have no such passes, or returns None."""
    if not cpu.multiplies(dtype):
        return cpu.obstacle() or f"the C++ kernels do not multiply {dtype} on this processor"
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    if activation not in (GATED if gated else ACTIVATIONS):
        return f"there is no C++ kernel for {activation!r}"
    if hidden_size > cpu.MAX_HIDDEN:
        return f"hidden size {hidden_size} is above {cpu.MAX_HIDDEN}"
    if dtype == torch.bfloat16 and any(size % 2 for size in sizes):
        return "the C++ kernels multiply bfloat16 in pairs, and the number of features is odd"
    return None
