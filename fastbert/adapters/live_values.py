"""This module detects changes in a live module of the same class: changes of parameters and of settings.

Every call makes each check. A check compares lists that C code collects, and makes further checks if they differ.
(`patches.py` detects changes of code: of methods and functions.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, tuple, type(None))
# Attributes of their modules, and their values in an encoder that computes what ours does.
_EXPECTED = {
    "is_decoder": False,
    "is_causal": False,
    "is_cross_attention": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
}


def unexpected_setting(module: nn.Module) -> str | None:
    """Names an attribute, with its value, that changes the module's result, or returns None."""
    for name, expected in _EXPECTED.items():
        value = getattr(module, name, expected)
        if value is not None and value != expected:
            return f"{name} = {value!r}"
    return None


def same_function(one: nn.Module, other: nn.Module) -> bool:
    """Tells whether two modules without parameters compute the same, by their classes and functions."""

    def form(value: Any) -> Any:
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        return getattr(value, "__func__", value)

    def settings(module: nn.Module) -> dict[str, Any]:
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        own.pop("forward", None)  # Another check looks at it.
        return {name: form(value) for name, value in own.items()}

    return type(one) is type(other) and settings(one) == settings(other)


class Settings:
    """A `Settings` holds the plain attributes of modules at the time of its construction."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._modules = modules
        self._kinds: list[Any] = list(map(type, modules))
        named = [(module.__dict__, _settings_of(module)) for module in modules]
        self._readers = [(itemgetter(*names), values) for values, names in named if names]
        self._values = [read(values) for read, values in self._readers]

    def unchanged(self) -> bool:
        """Tells whether all attributes are unchanged."""
        if list(map(type, self._modules)) != self._kinds:
            return False
        try:
            return [read(values) for read, values in self._readers] == self._values
        except KeyError:  # An attribute was deleted.
            return False


def _settings_of(module: nn.Module) -> list[str]:
    """Lists the names of attributes that a forward may read. Those of linears and dropouts do not matter."""
    if type(module) in (nn.Linear, nn.Dropout):
        return []
    own = module.__dict__.items()
    plain = [name for name, value in own if name[0] != "_" and (type(value) in _PLAIN or callable(value))]
    return [name for name in plain if name not in ("training", "forward", "layer_idx")]


@dataclass(frozen=True)
class Leaf:
    """A `Leaf` is a module whose parameters fastbert reads."""

    path: str
    module: nn.Module
    like: nn.Module  # Our module in the same place.

    def obstacle(self) -> str | None:
        """Says why the parameters cannot be read as those of a plain module, or returns None."""
        owned, expected = self.module._parameters, self.like._parameters
        if set(owned) != set(expected):
            return f"{self.path}: its parameters are {', '.join(owned) or 'none'}, expected {', '.join(expected)}"
        for name, ours in expected.items():
            parameter: Any = owned[name]
            if ours is None:
                continue
            if parameter is None:
                if name == "bias" and type(self.module) is nn.Linear:
                    continue  # Our path calls it.
                return f"{self.path} has no {name}"
            if parameter.layout != torch.strided:
                return f"{self.path}.{name} is {parameter.layout}"
            rows: Any = getattr(self.module, "num_embeddings", ours.shape[0])  # A table may have any number of rows.
            if tuple(parameter.shape) != (rows, *ours.shape[1:]):
                return f"{self.path}.{name} has the shape {tuple(parameter.shape)}"
        return None


class Parameters:
    """A `Parameters` holds the parameters of the leaves that fastbert reads."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._dicts = tuple(leaf.module._parameters for leaf in leaves)
        self._checked: list[int] | None = None

    def obstacle(self) -> str | None:
        """Says why fastbert cannot read the parameters, or returns None."""
        parameters = [p for p in chain.from_iterable(map(dict.values, self._dicts)) if p is not None]
        if not all(kind is nn.Parameter or kind is Tensor for kind in set(map(type, parameters))):
            return "parameters are tensors of another kind"
        if len(set(map(attrgetter("dtype"), parameters))) > 1:
            return "parameters are of more than one dtype"
        devices = set(map(attrgetter("device"), parameters))
        if len(devices) > 1:
            return "parameters are on more than one device"
        if any(device.type == "meta" for device in devices):
            return "parameters are on the meta device"
        try:
            places = list(map(Tensor.data_ptr, parameters))
        except (RuntimeError, NotImplementedError):  # Sparse parameters, and wrappers around others, have none.
            places = None
        if places is None or places != self._checked:
            for leaf in self._leaves:
                if (obstacle := leaf.obstacle()) is not None:
                    return obstacle
            self._checked = places
        return None
