"""This module launches a kernel again without Triton's own launch code, which takes the host twice as long.

At each launch Triton finds the compiled kernel by a description of all arguments and by the text of all options, reads
its knobs, and calls launch hooks even if there are none. `Direct` describes arguments with the same function of Triton
(dtype, whether an address or an integer is a multiple of 16, whether an integer is 1), and finds the compiled kernel by
this description and the options. The first launch of each kind goes through Triton, which compiles the kernel;
`remember` keeps it.

A launcher may give facts that determine its arguments. Then these are described only once: `repeat` launches the kernel
with new tensors and otherwise the same arguments, if dtypes, sizes and config are the same (`launch.again`).

Every launch goes through Triton while a debugger, an instrumentation or a hook is active (`Direct.watched`), and with a
Triton that works in another way (`direct`). Launch hooks are called as Triton calls them.

Source: `JITFunction.run` and `create_function_from_signature` of Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

LIMIT = 512  # The most compiled kernels that are kept for one function.
_FIRST, _LAST = (3, 6), (3, 9)  # The first and the last version of Triton whose launch code was checked.

# (device, *arguments by name, **options) -> a description of them, and the arguments in the order of the signature
Reader = Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]


class _Repeat(NamedTuple):
    """A `_Repeat` is a launch without the arguments that may change."""

    config: dict[str, int]
    compiled: Any  # a value of `Direct.compiled`
    rest: tuple[Any, ...]


class Direct:
    """A `Direct` holds the compiled kernels of one function by a description of the arguments. Threads may share it."""

    def __init__(self, kernel: Any, read: Reader) -> None:
        self.kernel, self.read = kernel, read
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.repeats: dict[tuple[Any, ...], _Repeat] = {}

    def watched(self) -> bool:
        """Tells whether a launch must go through Triton, because a hook or a knob is set."""
        kernel, runtime = self.kernel, knobs.runtime
        return bool(
            runtime.debug
            or knobs.compilation.instrumentation_mode
            or runtime.add_stages_inspection_hook is not None
            or kernel.pre_run_hooks
            or kernel.debug
        )

    def launch_again(
        self, grid: tuple[int, ...], config: dict[str, int], arguments: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Launches a kernel that was launched before. Returns None if it did, otherwise the key for `remember`."""
        active = driver.active
        device = active.get_current_device()
        key, values = self.read(device, **arguments, **config)
        known = self.compiled.get(key)
        if known is None:
            return key
        run, function, metadata, compiled = known
        stream = active.get_current_stream(device)
        enter, leave, told = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # An empty chain has no hook.
            told = compiled.launch_metadata(grid, stream, *values)
        else:
            enter = leave = None
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream, function, metadata, told, enter, leave, *values)
        return None

    def repeat(self, facts: Any, config: dict[str, int], grid: tuple[int, ...], first: torch.Tensor, head: Any) -> bool:
        """Launches the kernel as `keep` recorded it for these facts, with other first arguments.

        first: a tensor on the device of all tensors. Returns whether it launched.
        """
        active, runtime = driver.active, knobs.runtime
        device = active.get_current_device()
        known = self.repeats.get((device, facts))
        if known is None or (known.config is not config and known.config != config) or self.watched():
            return False
        enter, leave, index = runtime.launch_enter_hook, runtime.launch_exit_hook, first.get_device()
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or (index >= 0 and index != device):
            return False
        x, y, z = (*grid, 1, 1)[:3]
        run, function, metadata, _ = known.compiled
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *head, *known.rest)
        return True

    def keep(self, facts: Any, config: dict[str, int], n_head: int, arguments: dict[str, Any]) -> None:
        """Keeps the data of a launch for `repeat`. n_head: the number of first arguments, which may change."""
        device = driver.active.get_current_device()
        key, values = self.read(device, **arguments, **config)
        known, rest = self.compiled.get(key), values[n_head:]
        if known is None or any(hasattr(value, "data_ptr") for value in rest):
            return
        if len(self.repeats) >= LIMIT:
            self.repeats.clear()
        self.repeats[device, facts] = _Repeat(config, known, rest)

    def remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        """Keeps the kernel that Triton has just launched, under a key from `launch_again`."""
        if getattr(compiled, "module", None) is None:  # A hook kept Triton from compiling.
            return
        if len(self.compiled) >= LIMIT:
            self.compiled.clear()
        self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled


def direct(kernel: Any) -> Direct | None:
    """Returns the `Direct` of a kernel, or None if its launches might differ from Triton's."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not _FIRST <= version <= _LAST:
        return None
    try:
        from triton._C.libtriton import native_specialize_impl
        from triton.backends import BaseBackend
    except ImportError:
        return None
    plain = all(param.is_constexpr or (not param.annotation_type and not param.has_default) for param in kernel.params)
    return Direct(kernel, _reader(kernel, native_specialize_impl, BaseBackend)) if plain else None


def _reader(kernel: Any, specialize: Callable[..., Any], backend: Any) -> Reader:
    """Makes a function with the kernel's signature, as Triton does, so that one call binds all arguments."""
    names, described = [param.name for param in kernel.params], []
    defaults = {f"{param.name}_default": param.default for param in kernel.params if param.has_default}
    taken = [f"{name}={name}_default" if f"{name}_default" in defaults else name for name in names]
    for param in kernel.params:
        kinds = bool(param.is_const), not param.do_not_specialize, not param.do_not_specialize_on_alignment
        called = f"specialize(backend, {param.name}, {kinds[0]}, {kinds[1]}, {kinds[2]})"
        described.append(param.name if param.is_constexpr else called)
    code = (
        f"def read(device, *, {', '.join(taken)}, **options):\n"
        f"    return (device, {', '.join(described)}, *options.items()), ({', '.join(names)},)\n"
    )
    namespace = {"specialize": specialize, "backend": backend, **defaults}
    exec(code, namespace)
    read: Any = namespace["read"]
    return read
