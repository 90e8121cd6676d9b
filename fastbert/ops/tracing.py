"""This module detects observers of running operations: compilers, tracers, transforms, modes.

It imports no compiler.

Code that bypasses PyTorch's dispatcher must first ask one of two questions:

`transformed`: does the program run on other objects than numbers, so that no value may be read on the host? A tracer
would treat a value as a constant. A transform of torch.func has no values. fastbert's registered operations have no
rules for transforms. A model then runs plain operations of PyTorch on padded rows (`packing.in_place`).

`observed`: must every operation go through the dispatcher? The answer is yes in all of these cases, under
torch.compile, and under a mode that counts or changes operations. Then no C++ kernel bypasses the dispatcher, and no
tensor derived from weights is kept.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad

from fastbert.ops.recording import StandIn

logger = logging.getLogger("fastbert")

Function = TypeVar("Function", bound=Callable)

# The types of tensors whose address holds their numbers, and the stand-in for a tensor.
PLAIN = (torch.Tensor, torch.nn.Parameter, StandIn)
_TRANSFORM = "a transform of torch.func (grad, jvp, vmap ...) is active"
# PyTorch's internal modes that run a program on other objects than numbers.
_INFRA = tuple(
    key
    for name in ("FAKE", "FUNCTIONAL", "PROXY")
    if (key := getattr(torch._C._TorchDispatchModeKey, name, None)) is not None
)


def untraced(function: Function) -> Function:
    """Applies `torch.compiler.disable` when a compiler first reaches the function."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def constant(function: Function) -> Function:
    """Does what `torch.compiler.assume_constant_result` does: the tracer calls the function and keeps its result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _traced_transform() -> bool:
    """Tells whether a compiler traces a transform of torch.func. The compiler cannot trace this call itself."""
    return torch._C._functorch.maybe_current_level() is not None


def transformed(*tensors: Any) -> str | None:
    """Tells why no value may be read on the host and no operation of fastbert may run, or returns None.

    tensors: inputs, whose types are checked too; other objects are skipped. torch.compile and torch.export are no
    reason: they support fastbert's operations, and do not trace into code that reads values.
    """
    if torch.compiler.is_compiling():
        if _traced_transform():
            return _TRANSFORM
        return "torch.onnx.export records the operations" if _exports_to_onnx() else None
    return _reason(False, tensors)


def observed(*tensors: Any) -> str | None:
    """Tells why every operation must go through PyTorch's dispatcher, without kept tensors, or returns None.

    tensors: as for `transformed`.
    """
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export traces the operations"
    return _reason(True, tensors)


def differentiated() -> bool:
    """Tells whether a transform of torch.func or forward-mode AD is active. Fused attention has no rule for it."""
    if torch.compiler.is_compiling():
        return _traced_transform()
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def has_sizes() -> bool:
    """Tells whether sizes are numbers that can be compared. Under torch.jit.trace they are tensors."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is None


def differ(shape: Any, expected: Any) -> bool:
    """Tells whether a shape, or a size, is not the expected one. It returns False if sizes cannot be compared."""
    return has_sizes() and bool(shape != expected)


def length_of(weight: torch.Tensor) -> int:
    """Returns the size of a vector of parameters, as an int even under torch.jit.trace, as ONNX export requires."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return weight.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the size of a weight is constant
        return int(weight.shape[0])


def recorded(*tensors: Any) -> bool:
    """Tells whether a tracer records the operations for a later program, so that nothing may be counted or logged."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or _exports_to_onnx()
    if torch._C._get_tracing_state() is not None or _exports_to_onnx():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 and _infra_mode() is not None:
        return True
    return any(map(_is_proxy, tensors))


def _is_proxy(tensor: Any) -> bool:
    return type(tensor) not in PLAIN and isinstance(tensor, torch.fx.Proxy)


def _exports_to_onnx() -> bool:
    # A compiler supports PyTorch's own function, and cannot trace another one.
    flags = None if torch.compiler.is_compiling() else _onnx_flags()
    if flags is None:
        return torch.onnx.is_in_onnx_export()
    return flags[0].in_onnx_export or flags[1]._is_onnx_exporting


# The names in `torch.onnx.is_in_onnx_export`. Its two imports in each call take longer than all other checks.
_ONNX_FLAGS = {
    "torch.onnx._internal.exporter", "_flags", "_is_onnx_exporting",
    "torch.onnx._internal.torchscript_exporter._globals", "GLOBALS", "in_onnx_export",
}  # fmt: skip


@functools.cache
def _onnx_flags() -> tuple[Any, Any] | None:
    """Returns the flags that this function reads, or None if its code reads something else."""
    code = getattr(torch.onnx.is_in_onnx_export, "__code__", None)
    if code is None or set(code.co_names) != _ONNX_FLAGS:
        return None
    from torch.onnx._internal.exporter import _flags
    from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

    return GLOBALS, _flags


def _reason(modes: bool, tensors: tuple[Any, ...]) -> str | None:
    """Returns the reason in the thread's state or in a tensor. modes: include modes that run on real numbers."""
    n_modes, n_function_modes = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    quiet = (
        torch._C._get_tracing_state() is None
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and n_modes == 0
        and n_function_modes == 0
    )
    if not quiet and (reason := _at_work(modes, n_modes, n_function_modes)) is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            if not isinstance(tensor, (torch.Tensor, torch.fx.Proxy)):
                continue
            return f"the inputs are not plain tensors ({type(tensor).__name__})"
        if tensor.is_meta:
            return "the inputs are on the meta device, without numbers"
    return None


def _at_work(modes: bool, n_modes: int, n_function_modes: int) -> str | None:
    """Returns the reason in the thread's state."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records the operations"
    if torch._C._functorch.maybe_current_level() is not None:
        return _TRANSFORM
    if forward_ad._current_level >= 0:
        return "forward-mode AD is on"
    if n_modes and (name := _infra_mode()) is not None:
        return f"a mode of fake, functional or traced tensors is on ({name})"
    if not modes:
        return None
    if n_modes:
        return "a dispatch mode observes every operation"
    for i in range(n_function_modes):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not torch.utils._device.DeviceContext:  # torch.device(...) and torch.set_default_device
            return f"a mode of torch functions is on ({type(mode).__name__})"
    return None


def _infra_mode() -> str | None:
    for key in _INFRA:
        mode = torch._C._get_dispatch_mode(key)
        if mode is not None:
            return type(mode).__name__
    return None


def note(subject: str, reason: str) -> None:
    """Logs once that `subject` runs in plain operations of PyTorch on padded rows."""
    if not torch.compiler.is_compiling():
        _note_once(subject, reason)


@functools.cache
def _note_once(subject: str, reason: str) -> None:
    logger.warning("%s: runs in plain operations of PyTorch, on padded rows: %s", subject, reason)
