"""This module decides which backend runs an operation, and gives the reason.

`triton`: the kernels of fastbert_kernels, on CUDA devices (and on the CPU in Triton's interpreter, for tests). `cpu`:
PyTorch on packed tokens, and C++ kernels for some operations, on CPUs. `torch`: plain PyTorch on any device. `auto`
selects triton on CUDA and cpu on CPUs. If the selected backend does not support an operation, this raises under
`strict`; otherwise another backend runs it, and the reason is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastbert.ops import recording, tracing
from fastbert.ops.tracing import constant
from fastbert_kernels import cpu

logger = logging.getLogger("fastbert")

BACKENDS = ("auto", "triton", "cpu", "torch")


class BackendError(RuntimeError):
    """This error says that a backend does not support an operation and no fallback is allowed."""


@dataclass(frozen=True)
class Policy:
    """A `Policy` is the user's choice of a backend, and whether a fallback is allowed (`strict=False`).

    batch_invariant: a row's bits must not depend on other rows. Only the Triton kernels and, on CPUs, the C++ kernels
    support it, so it excludes the backend "torch" and allows no fallback.
    """

    backend: str = "auto"
    strict: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.batch_invariant:
            if self.backend == "torch":
                raise ValueError("batch_invariant: expected backend 'auto', 'triton' or 'cpu', got 'torch'")
            object.__setattr__(self, "strict", True)


AUTO = Policy()


@dataclass(frozen=True)
class Decision:
    """A `Decision` names the backend that runs `op`, and the reason if it is not the selected one."""

    op: str
    backend: str
    reason: str | None = None


def decide(op: str, policy: Policy, device: torch.device, obstacle: str | None) -> Decision:
    """Selects the backend. obstacle: the reason why the triton backend cannot run this call on any machine, or None.

    It does not raise or log; `choose` does.
    """
    return Decision(op, *_decided(policy.backend, device, obstacle))


def wants_triton(backend: str, device: torch.device) -> bool:
    """Tells whether this choice of backend selects the triton backend if there is no obstacle."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _decided(wanted: str, device: torch.device, obstacle: str | None) -> tuple[str, str | None]:
    """Returns the backend and the reason of a Decision."""
    elsewhere = "cpu" if device.type == "cpu" else "torch"
    if wanted == "auto" and device.type != "cuda":
        wanted = elsewhere
    if wants_triton(wanted, device):
        reason = triton_obstacle(device) or obstacle
        return ("triton", None) if reason is None else (elsewhere, reason)
    if wanted == "cpu" and device.type != "cpu":
        return "torch", f"the tensors are on {device}"
    return wanted, None


@constant
def choose(op: str, backend: str, strict: bool, device: torch.device, obstacle: str | None) -> str:
    """Calls `decide`, logs a fallback once, or raises BackendError under strict. Returns the backend's name."""
    chosen, reason = _decided(backend, device, obstacle)
    if recording.on and recording.note_reason(op, reason, strict):
        return chosen
    if reason is not None:
        if strict:
            raise BackendError(f"{op}: the backend {backend!r} cannot run it, and strict=True: {reason}")
        _log_once(op, backend, chosen, reason)
    return chosen


@functools.cache
def _log_once(op: str, wanted: str, chosen: str, reason: str) -> None:
    logger.warning("%s: backend %r falls back to %r: %s", op, wanted, chosen, reason)


def check_batch_invariant(policy: Policy, device: torch.device, precision: str | None = None) -> None:
    """Raises BackendError if the policy requires batch invariance and the device has no kernels that support it."""
    if not policy.batch_invariant:
        return
    if device.type == "cpu" and policy.backend != "triton":
        kernels, reason = "C++ kernels for CPUs", cpu.obstacle()
        if reason is None and precision is not None:
            reason = cpu.int8_obstacle()
    elif precision is not None:
        kernels, reason = "C++ kernels for CPUs", f"no other 8-bit kernels support it, and the device is {device}"
    elif policy.backend == "cpu":
        kernels, reason = "Triton kernels", f"backend 'cpu' is set, but the device is {device}"
    else:
        kernels, reason = "Triton kernels", triton_obstacle(device)
    if reason is not None:
        raise BackendError(
            f"batch_invariant: needs the {kernels}, because the bits of PyTorch's matrix products depend on the "
            f"number of rows: {reason}"
        )


def check_invariant(op: str, policy: Policy, backend: str, obstacle: str | None = None) -> None:
    """Raises BackendError if the policy requires batch invariance, and `backend`, not "triton", does not support it.

    obstacle: the reason why the C++ kernels (or an invariant PyTorch operation) cannot run this call, or None.
    """
    if policy.batch_invariant:
        reason = obstacle if backend == "cpu" else "the tensors are neither on a GPU nor on a CPU"
        if torch.compiler.is_compiling():
            reason = "torch.compile and torch.export would replace it by their own operations"
        elif reason is None:
            reason = tracing.observed()
        if reason is not None:
            refuse(op, reason)


def refuse(op: str, reason: str) -> None:
    """Raises BackendError: a batch-invariant policy does not allow the operation, or the call of a module (op "")."""
    if not (recording.on and recording.note_refusal(op, f"batch_invariant: {reason}")):
        _raise(f"batch_invariant: {op}: {reason}" if op else f"batch_invariant: {reason}")


@constant  # otherwise a compiler would skip the function at an exception
def _raise(message: str) -> None:
    raise BackendError(message)


def interpreting() -> bool:
    """Tells whether Triton kernels run under its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_obstacle(device: torch.device) -> str | None:
    """Tells why no Triton kernel can run on this device, or returns None."""
    assumed = recording.assumed_arch() if recording.on else None
    if assumed is not None and device.type == "cuda":  # a dry run needs no GPU
        return _package_obstacle(importlib.util.find_spec) or _arch_obstacle(assumed)
    if device.type == "cpu":
        if not interpreting():
            return "the tensors are on the CPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    elif device.type != "cuda":
        return f"there are no Triton kernels for devices of type {device.type!r}"
    reason = _package_obstacle(importlib.util.find_spec)
    if reason is None and device.type == "cuda":
        return _gpu_obstacle(device.index if device.index is not None else torch.cuda.current_device())
    return reason


@functools.cache  # every operation calls it
def _package_obstacle(find_spec: Callable[[str], object]) -> str | None:
    return "the package triton is not installed" if find_spec("triton") is None else None


@functools.cache
def _gpu_obstacle(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    return _arch_obstacle(10 * major + minor)


def _arch_obstacle(arch: int) -> str | None:
    return None if arch >= 80 else f"the kernels need compute capability 8.0, and this GPU has {arch / 10}"


def arch_of(device: torch.device) -> int:
    """Returns the compute capability of the device, or of the GPU in a dry run, as one integer."""
    from fastbert_kernels import launch

    assumed = recording.assumed_arch() if recording.on else None
    return launch.arch(device) if assumed is None else assumed


def dtype_obstacle(*tensors: torch.Tensor | None) -> str | None:
    """Tells why the triton backend does not support these tensors, or returns None. They must have one dtype."""
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no Triton kernels for {dtype}"
    if len({t.dtype for t in present}) > 1:
        return f"mixed dtypes: {', '.join(sorted({str(t.dtype) for t in present}))}"
    if (transformed := tracing.transformed(*present)) is not None:
        return transformed
    return "autocast is on" if torch.is_autocast_enabled(present[0].device.type) else None


def dropout_obstacle(dropout_p: float) -> str | None:
    """Tells why the triton backend does not support this dropout, or returns None."""
    return f"dropout (p = {dropout_p:.4g}) that PyTorch draws has no Triton kernel" if dropout_p > 0.0 else None


def training_obstacle(dropout_p: float) -> str | None:
    """Tells why a batch-invariant policy does not allow dropout, or returns None."""
    return f"dropout (p = {dropout_p:.4g}) is drawn for the whole batch" if dropout_p > 0.0 else None


def direct(x: torch.Tensor) -> bool:
    """Tells whether a C++ kernel may get x's address: there is no tracer, no observer, and no gradient is needed."""
    if type(x) not in (torch.Tensor, recording.StandIn) or tracing.observed() is not None:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def hidden_size_obstacle(hidden_size: int) -> str | None:
    """Tells why the row-wise kernels do not support rows of this size, or returns None."""
    return f"hidden size {hidden_size} is above 4096" if hidden_size > 4096 else None


def tf32_allowed() -> bool:
    """Tells whether CUDA may multiply float32 in TF32, by PyTorch's switch, which has a new name from 2.9 on."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
