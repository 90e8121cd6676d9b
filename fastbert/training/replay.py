"""This module replays a recorded call module by module, to find the first output that is not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import adapters


@dataclass(frozen=True)
class Call:
    """A `Call` holds one call of a model in training: its arguments, and its random and autocast state."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    generators: tuple[Tensor, Tensor | None]  # of the CPU, and of the device if it is a GPU
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def about_to_run(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> Call:
        """Records a call that begins now."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        # A SentenceTransformer writes its outputs into the dictionary of its inputs.
        args, kwargs = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
        return cls(args, kwargs, device, (torch.get_rng_state(), own), autocast)

    @contextmanager
    def state(self) -> Iterator[None]:
        """Sets the recorded state for the duration of the context; afterwards the previous state returns."""
        enabled, dtype = self.autocast
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.generators[0])
            if self.generators[1] is not None:
                torch.cuda.set_rng_state(self.generators[1], self.device)
            with torch.enable_grad(), torch.autocast(self.device.type, dtype, enabled=enabled):
                yield


class _NotFinite(Exception):
    """This exception ends a replay at the first output that is not finite. name: the name of its module."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__(source)
        self.name = name


def first_in_forward(model: nn.Module, call: Call) -> str | None:
    """Replays the call; returns a text about the module with the first output that is not finite, or None.

    The order is that in which calls end: a module comes after the modules inside it. A hook on some modules of fastbert
    models and accelerated models changes how they run, and so their dropout masks. So the call is replayed twice: with
    hooks on modules that run the same with a hook, and with hooks on all modules. The second result is more precise,
    and is returned if it names the same place.
    """
    inputs = _not_finite((call.args, dict(call.kwargs)))
    if inputs is not None:
        return f"an input of the model is the first that is not finite: {inputs}"
    coarse, fine = _replay(model, call, _where_nothing_changes(model)), _replay(model, call, _everywhere(model))
    if coarse is not None and fine is not None and fine.name.startswith(coarse.name):
        return str(fine)
    return None if coarse is fine is None else str(coarse or fine)


def _everywhere(model: nn.Module) -> dict[nn.Module, str]:
    """Returns all modules and their names, except dropout modules, which are never the source."""
    return {module: name for name, module in model.named_modules() if not isinstance(module, nn.Dropout)}


def _where_nothing_changes(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules, with their names, that give the same results with a hook.

    fastbert's modules run the steps after a matrix product (dropout, sum, norm) as one fused operation. With a hook on
    one of these parts, PyTorch draws the dropout masks instead. For an accelerated encoder, the result has the modules
    of its twin.
    """
    modules = _everywhere(model)
    names = dict(modules)
    for module in names:
        if type(module).__module__.startswith("fastbert."):
            for child in module.children():
                if isinstance(child, (nn.LayerNorm, nn.Embedding)):
                    modules.pop(child, None)
    for live, twin in adapters.twins(model):
        for inside in list(live.modules())[1:]:
            modules.pop(inside, None)
        prefix = f"{names[live]}." if names[live] else ""
        for name, module in twin.named_modules():
            if name and type(module).__module__.startswith("fastbert."):
                modules[module] = prefix + name
    return modules


def _replay(model: nn.Module, call: Call, modules: Mapping[nn.Module, str]) -> _NotFinite | None:
    """Replays the call with hooks that check the outputs of the given modules."""

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        wrong = _not_finite(output)
        if wrong is not None:
            name, kind = modules[module], type(module).__name__
            before = _not_finite((args, kwargs))
            hint = "its inputs were finite" if before is None else f"of its inputs, {before}"
            subject = f"{name} ({kind})" if name else kind
            source = f"the output of {subject} is the first that is not finite in the forward pass: {wrong}; {hint}"
            raise _NotFinite(name, source)

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    try:
        with call.state(), adapters.lenient(model):
            model(*map(_copied, call.args), **call.kwargs)
    except _NotFinite as source:
        return source
    finally:
        for handle in handles:
            handle.remove()
    return None


def first_parameter(model: nn.Module) -> str | None:
    """Returns a text about the first parameter that is not finite, or None if all are finite."""
    for name, parameter in model.named_parameters():
        if (wrong := counts_of(parameter)) is not None:
            return f"the parameter {name} is not finite: {wrong}"
    return None


def counts_of(tensor: Tensor) -> str | None:
    """Returns a text with the number of values of a tensor that are not finite, or None if all are finite."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return None
    n_nan, n_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    counts = [f"{n:,} {kind}" for n, kind in ((n_nan, "NaN"), (n_inf, "infinite")) if n]
    return f"{' and '.join(counts)} of {tensor.numel():,} values" if counts else None


def _not_finite(value: Any) -> str | None:
    """Returns the text of `counts_of` for the first tensor of a structure with a value that is not finite, or None."""
    return next((wrong for tensor in _tensors(value) if (wrong := counts_of(tensor)) is not None), None)


def _copied(value: Any) -> Any:
    """Returns a shallow copy of a container; it holds the same tensors. Returns other values unchanged."""
    return copy.copy(value) if isinstance(value, (Mapping, list)) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
