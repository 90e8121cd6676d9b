"""This module has `jit`, Triton's decorator, for kernels whose cache key and first launch depend on no other kernel.

Cache keys: Triton hashes a kernel at its first use. The hash includes the constants of called functions only if those
were hashed before. So the key of a kernel in the cache on disk would depend on the kernel that a process launches
first. Here every function is hashed at its definition, after the functions that it calls.

First launches: Triton makes a compiled kernel visible to other threads before its code is on the device. A launch by
another thread then does nothing. Here a kernel becomes visible after it is loaded. One thread compiles it while others
wait. All later launches take no lock.

Later launches: a guarded kernel has an attribute `direct`, by which `launch.run` launches it again (see direct.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from fastbert_kernels.direct import direct


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a kernel as `triton.jit` does. The functions that the kernel calls must be defined above it.

    Under the interpreter it does nothing else.
    """
    if function is None:
        return partial(jit, **options)
    kernel = triton.jit(**options)(function)
    if isinstance(kernel, JITFunction):
        hash(kernel)
        _guard(kernel)
    return kernel


def guarded(kernel: Any) -> bool:
    """Tells whether threads may launch the kernel at the same time, first launches included."""
    return "_guarded" in getattr(kernel, "__dict__", ())


class _Loaded(dict[Any, Any]):
    """This dictionary holds compiled kernels by specialisation. Each is loaded to the device before it is visible."""

    def __setitem__(self, key: Any, compiled: Any) -> None:
        load = getattr(compiled, "_init_handles", None)  # A kernel that another thread still compiles has none.
        if load is not None:
            load()
        super().__setitem__(key, compiled)


class _Devices(dict[Any, Any]):
    """This dictionary makes Triton's data of a kernel for a device at its first use, compiled kernels first."""

    def __init__(self, kernel: Any, lock: threading.RLock) -> None:
        super().__init__()
        self.kernel, self.lock = kernel, lock

    def __missing__(self, device: Any) -> Any:
        with self.lock:
            if device not in self:
                compiled, *others = self.kernel.create_binder()
                self[device] = _Loaded(compiled), *others
            return self[device]


def _guard(kernel: Any) -> None:
    """Lets one thread at a time compile and load. With a Triton that works differently, the kernel stays unguarded."""
    if not all(hasattr(kernel, name) for name in ("device_caches", "create_binder", "_do_compile")):
        return
    lock = threading.RLock()

    def compile_once(key: Any, signature: Any, device: Any, *others: Any, **options: Any) -> Any:
        with lock:
            compiled = kernel.device_caches[device][0].get(key)
            if compiled is None:
                compiled = type(kernel)._do_compile(kernel, key, signature, device, *others, **options)
                # Triton compares them at every launch, which takes longer than `launch.run`. They never change here.
                kernel.used_global_vals = {}
            return compiled

    kernel.device_caches = _Devices(kernel, lock)
    kernel._do_compile = compile_once
    kernel._guarded = True
    kernel.direct = direct(kernel)
