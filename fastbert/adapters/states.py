"""What may change in a live module while its class stays: parameters and settings.

Each check is made before every call. It compares lists that C code collects, and looks closer where they differ.
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
# What these attributes of their modules are where an encoder computes what ours does.
_EXPECTED = {
    "is_decoder": False,
    "is_causal": False,
    "is_cross_attention": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
}


def unexpected_setting(module: nn.Module) -> str | None:
    """The name and the value of an attribute by which the module computes something else, or None."""
    for name, expected in _EXPECTED.items():
        value = getattr(module, name, expected)
        if value is not None and value != expected:
            return f"{name} = {value!r}"
    return None


def same_function(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules without parameters compute the same: their class, and the functions that they hold."""

    def form(value: Any) -> Any:
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        return getattr(value, "__func__", value)

    def settings(module: nn.Module) -> dict[str, Any]:
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        own.pop("forward", None)  # which is asked for elsewhere
        return {name: form(value) for name, value in own.items()}

    return type(one) is type(other) and settings(one) == settings(other)


class Settings:
    """The plain attributes of modules as they were when this was made."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._modules = modules
        self._kinds: list[Any] = list(map(type, modules))
        named = [(module.__dict__, _settings_of(module)) for module in modules]
        self._readers = [(itemgetter(*names), values) for values, names in named if names]
        self._values = [read(values) for read, values in self._readers]

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        if list(map(type, self._modules)) != self._kinds:
            return False
        try:
            return [read(values) for read, values in self._readers] == self._values
        except KeyError:  # an attribute was deleted
            return False


def _settings_of(module: nn.Module) -> list[str]:
    """The names of attributes that a forward may read. Linears and dropouts have none that matter."""
    if type(module) in (nn.Linear, nn.Dropout):
        return []
    own = module.__dict__.items()
    plain = [name for name, value in own if name[0] != "_" and (type(value) in _PLAIN or callable(value))]
    return [name for name in plain if name not in ("training", "forward", "layer_idx")]


@dataclass(frozen=True)
class Leaf:
    """A module whose parameters our path reads. like: the one of ours that it takes the place of."""

    path: str
    module: nn.Module
    like: nn.Module

    def obstacle(self) -> str | None:
        """Why its parameters cannot be read as those of a plain module, or None."""
        owned, expected = self.module._parameters, self.like._parameters
        if set(owned) != set(expected):
            return f"{self.path}: its parameters are {', '.join(owned) or 'none'}, expected {', '.join(expected)}"
        for name, ours in expected.items():
            parameter: Any = owned[name]
            if ours is None:
                continue
            if parameter is None:
                if name == "bias" and type(self.module) is nn.Linear:
                    continue  # which is called
                return f"{self.path} has no {name}"
            if parameter.layout != torch.strided:
                return f"{self.path}.{name} is {parameter.layout}"
            rows: Any = getattr(self.module, "num_embeddings", ours.shape[0])  # of tables any number
            if tuple(parameter.shape) != (rows, *ours.shape[1:]):
                return f"{self.path}.{name} has the shape {tuple(parameter.shape)}"
        return None


class Parameters:
    """The parameters of the leaves that our path reads."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._dicts = tuple(leaf.module._parameters for leaf in leaves)
        self._checked: list[int] | None = None

    def obstacle(self) -> str | None:
        """Why our path cannot read them, or None."""
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
        except (RuntimeError, NotImplementedError):  # sparse ones, and wrappers around others
            places = None
        if places is None or places != self._checked:
            for leaf in self._leaves:
                if (reason := leaf.obstacle()) is not None:
                    return reason
            self._checked = places
        return None


class Called:
    """A module that our path calls in the place of a linear or of the word embeddings: an adapter, a quantised linear.

    width: of its input; None where that is ids. n_ids: how many ids it knows. Our path calls it with the rows of the
    tokens, (T, K), where transformers calls it with (B, S, K) and what stands at padding. `obstacle` tries once
    whether that is the same; classes of PEFT, and linears that differ in their weight alone, are known to do it.
    """

    def __init__(self, path: str, module: nn.Module, like: nn.Module) -> None:
        self.path, self.module = path, module
        self._width = like.in_features if isinstance(like, nn.Linear) else None
        self._out = like.out_features if isinstance(like, nn.Linear) else like.embedding_dim
        self._n_ids: Any = getattr(module, "num_embeddings", getattr(like, "num_embeddings", 1))
        forward = getattr(type(module), "forward", None)  # which scripted modules have in their objects
        by_weight_alone = forward in (nn.Linear.forward, nn.Embedding.forward)
        self._asked = by_weight_alone or type(module).__module__.split(".")[0] == "peft"
        self._reason: str | None = None

    def obstacle(self, like: Tensor) -> str | None:
        """Why it cannot be called with rows, or None. like: has the dtype and the device of its input."""
        if not self._asked:
            devices = [like.device] if like.device.type == "cuda" else []
            try:
                with torch.no_grad(), torch.random.fork_rng(devices):
                    same = self._works_by_rows(like)
                self._reason = None if same else "does not work row by row"
            except Exception as error:
                self._reason = f"cannot be called with rows ({type(error).__name__})"
            self._asked = True
        return None if self._reason is None else f"{self.path}, a {type(self.module).__qualname__}, {self._reason}"

    def _works_by_rows(self, like: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        if self._width is None:
            x = torch.randint(max(int(self._n_ids), 1), (2, 3), generator=generator).to(like.device)
        else:  # of rows that differ in size, which scales that are taken from all of them would mix
            sizes = torch.tensor([1.0, 8.0, 0.25, 2.0, 30.0, 0.5]).view(2, 3, 1)
            x = (torch.randn(2, 3, self._width, generator=generator) * sizes).to(like.device, like.dtype)
        padded, rows = self.module(x), self.module(x.flatten(0, 1))
        some = self.module(x.flatten(0, 1)[2:4])
        if padded.shape != (2, 3, self._out) or rows.shape != (6, self._out) or some.shape != (2, self._out):
            return False
        exact = padded.flatten(0, 1).double()
        bound = exact.abs().amax(1, keepdim=True) * _rounding(like.dtype)
        return bool(((rows.double() - exact).abs() <= bound).all()) and bool(
            ((some.double() - exact[2:4]).abs() <= bound[2:4]).all()
        )


def _rounding(dtype: torch.dtype) -> float:
    """What two orders of summation may differ by, of the largest number: TF32 and a few units of the last place."""
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(dtype, 16 * torch.finfo(dtype).eps)
