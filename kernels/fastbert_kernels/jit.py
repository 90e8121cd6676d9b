"""This module has `jit`, Triton's decorator, for kernels whose cache key and first launch depend on no other kernel.

Cache keys. Triton hashes a kernel when it is first asked to, and mixes in the constants of the functions it calls only
if those were hashed before: the key of one kernel, and with it whether the cache on disk has it, would depend on which
other kernel a process launches first. So every function is hashed where it is defined, after those that it calls.

First launches. Triton makes a compiled kernel visible to other threads before its code is on the device, and one that
launches it then launches nothing. So a kernel is put where launches look for it when it is loaded, and one thread
compiles it while others wait. Launches that find it, all but the first ones, take no lock and no detour.

Later launches. A kernel that is guarded has `direct`, by which `launch.run` launches it again (see direct.py).
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
    """Says whether threads may launch the kernel at the same time, first launches included."""
    return "_guarded" in getattr(kernel, "__dict__", ())


class _Loaded(dict[Any, Any]):
    """This dictionary holds compiled kernels by specialisation. It loads each to the device before anyone finds it."""

    def __setitem__(self, key: Any, compiled: Any) -> None:
        load = getattr(compiled, "_init_handles", None)  # A kernel that is still being compiled elsewhere has none.
        if load is not None:
            load()
        super().__setitem__(key, compiled)


class _Devices(dict[Any, Any]):
    """This dictionary makes what Triton keeps of a kernel for a device at its first use, compiled kernels first."""

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
    """Lets one thread at a time compile and load. A Triton that works otherwise leaves the kernel unguarded."""
    if not all(hasattr(kernel, name) for name in ("device_caches", "create_binder", "_do_compile")):
        return
    lock = threading.RLock()

    def compile_once(key: Any, signature: Any, device: Any, *others: Any, **options: Any) -> Any:
        with lock:
            compiled = kernel.device_caches[device][0].get(key)
            if compiled is None:
                compiled = type(kernel)._do_compile(kernel, key, signature, device, *others, **options)
                # Triton compares them at every launch, which takes longer than all of `launch.run`: ours never change.
                kernel.used_global_vals = {}
            return compiled

    kernel.device_caches = _Devices(kernel, lock)
    kernel._do_compile = compile_once
    kernel._guarded = True
    kernel.direct = direct(kernel)
