"""A snapshot holds the state of modules and the addresses of their parameters, to detect changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, contains, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.ops.derived import Derived
from fastbert.ops.silent_writes import LateSamples, Writes
from fastbert_kernels import cpu

_PRESENT = partial(is_not, None)  # of a parameter, which may be None


class ModuleSnapshot:
    """A `ModuleSnapshot` holds the children, hooks, forwards and modes of modules, and their parameters' addresses.

    It is compared before every replay of a graph, so it keeps the dictionaries with this state and calls no module.
    """

    def __init__(self, roots: tuple[nn.Module | None, ...], known_types: Collection[type[nn.Module]]) -> None:
        self.roots = roots
        modules = [module for root in roots if root is not None for module in root.modules()]
        self._children = [module._modules for module in modules if module._modules]
        self._children_before = [dict(children) for children in self._children]
        # Those of a ScriptModule are in no dict, and nothing is derived from them.
        held = [module._parameters for module in modules]
        self._parameters = tuple(each for each in held if isinstance(each, dict) and each)
        self._dicts = tuple(module.__dict__ for module in modules)
        self._deriving: tuple[Any, ...] = tuple(
            module for module in modules if isinstance(module.__dict__.get("derived"), Derived)
        )
        self._hooks = tuple(
            hooks
            for module in modules
            for hooks in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
            )
        )  # fmt: skip
        self._modules, self._types = modules, list(map(type, modules))
        self._norms = tuple(module.__dict__ for module in modules if isinstance(module, nn.LayerNorm))
        self._known = all(module_type in known_types for module_type in self._types)
        self._writes: tuple[Any, Writes] | None = None
        self._n_silent_writes = 0
        self._late: tuple[Any, LateSamples] | None = None

    def same_modules(self) -> bool:
        """Tells whether no module was replaced, added or removed, or changed its class."""
        return self._children == self._children_before and list(map(type, self._modules)) == self._types

    def plain(self) -> bool:
        """Tells whether every module is of a known class, in eval mode, and without hooks and patches."""
        return self.unheard() and not any(map(itemgetter("training"), self._dicts))

    def unheard(self) -> bool:
        """Tells whether every module is of a known class, and without hooks and patches."""
        return self._known and not any(self._hooks) and not any(map(contains, self._dicts, repeat("forward")))

    def parameter_types(self) -> set[type]:
        """The types of all parameters."""
        return set(map(type, chain.from_iterable(map(dict.values, self._parameters))))

    def changes(self) -> list[int]:
        """Counts the changes and invalidations of the modules' derived tensors."""
        return [module.__dict__["derived"].changes for module in self._deriving]

    def invalidate(self) -> None:
        """Marks the modules' derived tensors to be made again at their next use."""
        for module in self._deriving:
            module.__dict__["derived"].invalidate()

    def derived_addresses(self) -> list[tuple[int, ...]]:
        """Returns the addresses of the current derived tensors of every module with a `derived`."""
        return [module.derived_addresses() for module in self._deriving]

    def derived_tensors(self) -> list[Tensor]:
        """Returns the derived tensors that the modules keep."""
        return [tensor for module in self._deriving for tensor in module.__dict__["derived"].tensors()]

    def state(self) -> tuple[list[int], list[int], list[float]]:
        """Returns each parameter's address, PyTorch's count of its writes, and the norms' eps."""
        parameters: list[Any] = list(filter(_PRESENT, chain.from_iterable(map(dict.values, self._parameters))))
        try:
            versions = list(map(attrgetter("_version"), parameters))
        except RuntimeError:  # inference tensors have none
            versions = [-1 if p.is_inference() else p._version for p in parameters]
        try:
            places = list(map(Tensor.data_ptr, parameters))
        except RuntimeError:  # sparse tensors are at no address
            places = [p.data_ptr() if p.layout == torch.strided else id(p) for p in parameters]
        return places, versions, list(map(itemgetter("eps"), self._norms))

    def record(self, entries: Sequence[tuple[dict[str, Any], str]] = ()) -> Any:
        """Returns a `cpu.ObjectRecord`, which is equal while the methods above return the same values, or None.

        entries: further entries of the record. Returns None if it cannot be made, or if a module is not `plain`.
        """
        if not self.plain():
            return None
        modes = [(each, name) for each in self._dicts for name in ("training", "forward")]
        norms = [(each, "eps") for each in self._norms]
        derived = [(module.__dict__, "derived") for module in self._deriving]
        changes = [(module.__dict__["derived"].__dict__, "changes") for module in self._deriving]
        tensors = [p for each in self._parameters for p in each.values() if p is not None]
        try:
            return cpu.ObjectRecord(
                [*self._children, *self._parameters], self._hooks, [*modes, *norms, *derived, *changes, *entries],
                self._modules, tensors,
            )  # fmt: skip
        except RuntimeError:
            return None

    def silent_writes(self, state: tuple[list[Any], ...]) -> int:
        """Counts the detected silent writes to parameters. state: the result of `state`.

        On a GPU the host waits for it.
        """
        kept = self._writes
        parameters = [p for p in chain.from_iterable(map(dict.values, self._parameters)) if p is not None]
        if kept is None or kept[0] != state or not kept[1].none_since(parameters):
            self._n_silent_writes += kept is not None and kept[0] == state
            self._writes = state, Writes(parameters)
        return self._n_silent_writes

    def late_samples(self) -> LateSamples:
        """Returns the samples of the parameters from the last time without a write."""
        state = self.state()
        if self._late is None or self._late[0] != state:
            parameters = [p for p in chain.from_iterable(map(dict.values, self._parameters)) if p is not None]
            self._late = state, LateSamples(parameters)
        return self._late[1]

    def stepped(self) -> bool:
        """Tells whether an optimizer's hook has reported a write to a parameter since the last call."""
        return self._late is not None and self._late[1].stepped()

    def renew_late(self) -> None:
        """Makes derived tensors again after a write, and takes new samples."""
        self.invalidate()
        if self._late is not None:
            self._late[1].renew()
