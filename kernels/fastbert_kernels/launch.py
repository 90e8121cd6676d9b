"""This module launches kernels, or records their launches, and holds the facts of the device they run on.

Kernels do not specialise on the number of tokens (`do_not_specialize`), so no new length makes a kernel compile while
serving.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels import disk_cache, events, interpreter
from fastbert_kernels.jit import guarded

MIN_ARCH = 80
# Tensor cores up to this architecture keep about 14 bits of a sum of float8 products: see `quantized_linear`.
LAST_ARCH_WITH_SHORT_FLOAT8_SUMS = 90

# Shared memory that one thread block may use, in bytes: CUDA C++ Programming Guide, "Technical specifications per
# compute capability", maximum amount of shared memory per thread block.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Launch:
    """A `Launch` holds the arguments of one call of `run`."""

    kernel: Any
    grid: tuple[int, ...]
    config: dict[str, int]
    arguments: dict[str, Any]


events.listen()

recorded: list[Launch] | None = None  # The launches so far, inside `recording`.
_recorded_arch: int | None = None
_one_at_a_time = threading.RLock()  # Launches in the interpreter and of unguarded kernels hold it.


def interpreted() -> bool:
    """Tells whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return interpreter.ACTIVE


def arch(device: torch.device) -> int:
    """Returns the compute capability of the device as one integer, 90 for 9.0, and 80 under the interpreter."""
    if _recorded_arch is not None:
        return _recorded_arch
    if device.type != "cuda":
        return MIN_ARCH
    return _device_arch(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def n_multiprocessors(device: torch.device) -> int:
    """Returns the number of the GPU's multiprocessors; 2 under the interpreter, and if launches are recorded."""
    if recorded is not None or device.type != "cuda":
        return 2
    return _n_multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _n_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def empty(shape: tuple[int, ...], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocates the output of a kernel. Tests replace this function, and fill every output with NaN first."""
    return like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)


def cdiv(n: int, block: int) -> int:
    """Returns n / block, rounded up. `triton.cdiv` does the same in six more Python calls."""
    return -(-n // block)


def run(kernel: Any, grid: tuple[int, ...], config: dict[str, int], **arguments: Any) -> None:
    """Launches the kernel on the device of its tensors, even if another device is current.

    If Triton's cache on disk cannot be used, `disk_cache` gives this process another folder.
    """
    if recorded is not None:
        recorded.append(Launch(kernel, grid, config, arguments))
        return
    for argument in arguments.values():
        # A tensor descriptor has its tensor as `base`.
        tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
        if isinstance(tensor, torch.Tensor):
            device = tensor.device
            break
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, config, arguments)
    else:
        _launch(kernel, grid, config, arguments)


_run = run


def alike(*tensors: torch.Tensor | None) -> tuple[Any, ...] | None:
    """Returns the data besides sizes that decide a kernel's description of the tensors: dtypes, None for None.

    Returns None unless the tensors are contiguous, at addresses that are multiples of 16, as they almost always are.
    Callers must not use it for tensors of one row, because their strides do not follow from sizes.
    """
    dtypes: list[torch.dtype | None] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        elif tensor.is_contiguous():
            addresses |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
        else:
            return None
    return None if addresses % 16 else tuple(dtypes)


def again(kernel: Any, grid: tuple[int, ...], config: dict[str, int], facts: Any, *head: Any) -> bool:
    """Launches a kernel as `run_first` did before with the same facts. Returns whether it did.

    facts: hashable data that decide all arguments except the first ones, and the description of these; or None. head:
    the first arguments of the kernel, the first of them a tensor or its descriptor.
    """
    direct = getattr(kernel, "direct", None)
    if facts is None or direct is None or recorded is not None or run is not _run:  # a test may count launches
        return False
    first = head[0]
    answer: bool = direct.repeat(facts, config, grid, getattr(first, "base", first), head)
    return answer


def run_first(
    kernel: Any, grid: tuple[int, ...], config: dict[str, int], facts: Any, n_head: int, **arguments: Any
) -> None:
    """Does what `run` does, and keeps the launch for `again`. n_head: the number of arguments in `head` of `again`."""
    run(kernel, grid, config, **arguments)
    direct = getattr(kernel, "direct", None)
    if facts is not None and direct is not None and recorded is None:
        direct.keep(facts, config, n_head, arguments)


def _launch(kernel: Any, grid: tuple[int, ...], config: dict[str, int], arguments: dict[str, Any]) -> None:
    direct, key = getattr(kernel, "direct", None), None
    if direct is not None and not direct.watched():
        key = direct.launch_again(grid, config, arguments)
        if key is None:
            return
    if guarded(kernel):
        compiled = _through_triton(kernel, grid, config, arguments)
    else:
        with _one_at_a_time:
            compiled = _through_triton(kernel, grid, config, arguments)
    if direct is not None and key is not None:
        direct.remember(key, compiled)


def _through_triton(kernel: Any, grid: tuple[int, ...], config: dict[str, int], arguments: dict[str, Any]) -> Any:
    """Launches the kernel as Triton does, compiles it if necessary, and returns the compiled kernel."""
    # The default of FP fusion, and with it the bits of the results, differ between versions of Triton.
    try:
        return kernel[grid](**arguments, **config, enable_fp_fusion=True)
    except OSError as error:
        disk_cache.replace(error)
        return kernel[grid](**arguments, **config, enable_fp_fusion=True)


@contextmanager
def recording(for_arch: int) -> Iterator[list[Launch]]:
    """Lists the launches inside the context, and runs none. They are configured for `for_arch`, on any device."""
    global recorded, _recorded_arch
    if recorded is not None:
        raise RuntimeError("launch.recording() does not nest")
    recorded, _recorded_arch = [], for_arch
    try:
        yield recorded
    finally:
        recorded, _recorded_arch = None, None


def dot_precision(dtype: torch.dtype) -> str:
    """Returns the precision of tl.dot's inputs: "tf32" if PyTorch's switch allows it, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Before PyTorch 2.9 there is only allow_tf32. Since then, reading it raises if the newer switch was used.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
