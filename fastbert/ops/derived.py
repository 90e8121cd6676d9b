"""`Derived` keeps tensors that are derived from parameters: a fused QKV matrix, 8-bit weights.

The kept tensors follow their parameters. Each use compares the parameters' addresses, PyTorch's counts of writes,
dtypes and devices, and checks for writes that PyTorch does not count (fastbert.ops.silent_writes). On a GPU a check of
numbers waits for the device, so the model makes it once a call. `invalidate` marks everything to be made again.

Other code may hold the addresses of kept tensors, as CUDA graphs do. So after `invalidate` alone, the new numbers are
written to the old memory. For other parameters there is new memory, and `changes` counts this, so that the holder of an
address can ask for it again.

No tensor is kept if it could be wrong later: if gradients flow to the parameters, if a compiler or an exporter traces,
if the parameters are inference tensors (which have no count of writes), and during the capture of a CUDA graph (in
which no kernel has run yet).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import silent_writes, tracing
from fastbert.ops.silent_writes import Writes

# Called with tensors whose numbers have been written anew in their old memory.
_on_rewrite: list[Callable[[Sequence[Tensor]], None]] = []


def on_rewrite(listener: Callable[[Sequence[Tensor]], None]) -> None:
    """Registers a listener, which is called with kept tensors that were written again in their old memory."""
    _on_rewrite.append(listener)


@dataclass(eq=False)
class _Entry:
    state: Any
    # An alias keeps the memory of a replaced parameter, so that no new parameter gets the same address.
    aliases: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    asked: int
    writes: Writes

    def fits(self, state: Any, asked: int, parameters: Sequence[Tensor]) -> bool:
        """Tells whether the entry is equal to a new one."""
        return self.asked == asked and self.state == state and self.writes.none_since(parameters)


class Derived:
    """A `Derived` keeps tensors by name. Copies and pickles of it are empty; threads may share it.

    changes: the number of times that a tensor was made, written, dropped or invalidated. While it and the parameters do
    not change, the addresses and the numbers do not change.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._asked = 0  # calls of invalidate
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.changes += 1

    def invalidate(self) -> None:
        """Marks everything to be made again at its next use, in its old memory if the parameters are the same."""
        self._asked += 1
        self.changes += 1

    def get(
        self,
        name: str,
        parameters: Sequence[Tensor],
        make: Callable[[], tuple[Tensor, ...]],
        key: Hashable = None,
    ) -> tuple[Tensor, ...]:
        """Returns the result of `make`, the same tuple until a parameter changes. `make` reads only the parameters.

        name: the name under which the tuple is kept. key: other values that it depends on. On a GPU the tensors are
        complete for every stream when this returns.
        """
        if tracing.observed() is not None:
            return make()
        tracked = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if tracked or any(p.is_inference() for p in parameters):
            return make()
        state = key, [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        entry = self._entries.get(name)
        if entry is not None and entry.fits(state, self._asked, parameters):
            return entry.tensors
        if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return make()
        with self._lock:
            return self._renewed(name, parameters, make, state)

    def _renewed(
        self, name: str, parameters: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]], state: Any
    ) -> tuple[Tensor, ...]:
        entry, asked = self._entries.get(name), self._asked
        if entry is not None and entry.fits(state, asked, parameters):
            return entry.tensors  # another thread has just made them
        with torch.inference_mode(False), torch.no_grad():
            aliases = tuple(p.detach() for p in parameters)
            # The samples are taken before `make` reads the parameters. On a GPU this would wait, and the model checks
            # instead.
            writes = Writes(parameters, sampled=not any(silent_writes.waits(p.device) for p in parameters))
            tensors = make()
            if entry is not None and entry.state == state and _alike(entry.tensors, tensors):
                for kept, fresh in zip(entry.tensors, tensors, strict=True):
                    kept.data.copy_(fresh)
                tensors = entry.tensors
                for listener in _on_rewrite:
                    listener(tensors)
        if tensors[0].is_cuda:
            torch.cuda.current_stream(tensors[0].device).synchronize()  # other streams may read the tensors
        self._entries[name] = _Entry(state, aliases, tensors, asked, writes)
        self.changes += 1
        return tensors

    def tensors(self) -> list[Tensor]:
        """Returns all kept tensors."""
        return [tensor for entry in tuple(self._entries.values()) for tensor in entry.tensors]

    def addresses(self, name: str, tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
        """Returns the addresses of tensors that `get` returned and keeps; none if they were made for one use."""
        entry = self._entries.get(name)
        return tuple(t.data_ptr() for t in tensors) if entry is not None and entry.tensors is tensors else ()

    def __reduce__(self) -> Any:
        return type(self), ()


def _alike(tensors: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Tells whether the numbers of `others` fit the memory of `tensors`. Only strided tensors do."""

    def form(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.dtype, tensor.device, tensor.layout

    strided = all(tensor.layout == torch.strided for tensor in tensors)
    return strided and list(map(form, tensors)) == list(map(form, others))
