"""accelerate and restore: the class of the object is exchanged for one derived from it, and nothing else of it.

The derived class has the name and the module of the original, which transformers goes by (architectures in config.json,
supported models of a pipeline, the recorders of hidden states). It is not found under that name, so its objects are
pickled as objects of the original class that are to be accelerated again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fastbert.adapters import calls, mapping
from fastbert.adapters.calls import State
from fastbert.adapters.live import Options

Model = TypeVar("Model")
STATE = "_fastbert"  # in the __dict__ of an accelerated module


class Accelerated:
    """What the derived classes share. An object of such a class that has no state is as one of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        original = originals.get(type(self))
        if original is None or not isinstance(reduced, tuple):  # somebody has derived a class of his own from ours
            return reduced
        kind, bases = original
        return (_blank, (kind, bases), *reduced[2:])


class AcceleratedEncoder(Accelerated):
    """Before the encoder's class in the order of methods."""

    def train(self, mode: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None:
            state.forget() if mode else state.look_again()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None:
            state.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


originals: dict[type, tuple[type, str]] = {}  # a derived class -> the original, and the name of the mixin
_derived: dict[tuple[type, str], type] = {}


def derive(original: type, mixin: type, method: str, replacement: Any) -> type:
    """The class of accelerated objects of the class `original`: its `method` calls `replacement(self, state, original
    method, args, kwargs)` where the object has a state. The signature stays."""
    key = original, mixin.__name__
    if key not in _derived:
        before = getattr(original, method)

        @functools.wraps(before)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = self.__dict__.get(STATE)
            if state is None:
                return before(self, *args, **kwargs)
            return replacement(self, state, before, args, kwargs)

        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        kind = type(original.__name__, (mixin, original), {method: call, **names})
        _derived[key], originals[kind] = kind, key
    return _derived[key]


def _blank(original: type, mixin: str) -> Any:
    """An object of the derived class, for pickle and copy to fill."""
    kind: Any = derive_encoder(original)
    return kind.__new__(kind)


def derive_encoder(original: type) -> type:
    return derive(original, AcceleratedEncoder, "forward", calls.forward)


def parts(model: Any) -> Iterator[nn.Module]:
    """The accelerated modules in a module, in what wraps one (a pipeline), or none."""
    root = _module_of(model)
    if root is not None:
        yield from (module for module in root.modules() if STATE in module.__dict__)


def _module_of(model: Any) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def accelerate(model: Model, *, backend: str = "auto", strict: bool = False, cuda_graphs: bool = True) -> Model:
    """Lets fastbert run the BERT encoders in a live model of another library; the same object comes back.

    model: a `BertModel` of transformers, a `BertFor...`, what an `AutoModel...` gave, a pipeline, a wrapper (PEFT,
    DataParallel) around one, a `SentenceTransformer` or a `CrossEncoder`. Arguments, outputs, state dict and parameters
    stay; rows of outputs at padding positions are zero, where transformers leaves unspecified values, and the pooler
    reads the first token that the mask leaves. What is not known (training mode, requested attentions, masks of pairs
    of tokens, caches, decoders, hooks inside ...) goes to the original forward: counted by reason, logged once each,
    shown by `fastbert.explain(model)`. strict=True makes a BackendError of it. backend: "auto", "triton", "cpu" or
    "torch". cuda_graphs: on a GPU, launch short batches as CUDA graphs.

    Doing it again changes nothing but the options. `restore` undoes it. Raises TypeError for what is no model,
    ValueError for a model without an encoder that is covered; both say what is.
    """
    options = Options(backend, strict, cuda_graphs)
    _ = options.policy  # raises ValueError for a backend that does not exist
    root = _module_of(model)
    if root is None:
        raise TypeError(f"model: got {type(model).__name__}, which is no model; covered: {mapping.covered()}")
    found = False
    for module in list(root.modules()):
        state = module.__dict__.get(STATE)
        if isinstance(state, State):
            found = True
            if state.options != options:
                state.options = options
                state.forget()
            continue
        family = mapping.find(type(module))
        if family is not None:
            found = True
            module.__class__ = derive_encoder(type(module))
            module.__dict__[STATE] = State(options, family)
    if not found:
        raise ValueError(
            f"model: found no encoder to accelerate in {type(model).__name__}; covered: {mapping.covered()}"
        )
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in copies and unpickled models too, and gives the same object back."""
    for module in list(parts(model)):
        original = originals.get(type(module))
        if original is None:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"model: {name} was derived from the accelerated class; undo that first")
        module.__class__ = original[0]
        del module.__dict__[STATE]
    return model


def counts(model: Any) -> dict[str, int]:
    """How many calls ran here ("fastbert"), and how many by the original code, by reason."""
    total: dict[str, int] = {}
    for module in parts(model):
        for reason, n in module.__dict__[STATE].counts.items():
            total[reason] = total.get(reason, 0) + n
    return total


@torch.no_grad()
def encoder_of(module: nn.Module) -> Any:
    """Our BertModel on the modules of an accelerated encoder. Raises fastbert.adapters.live.Unsupported."""
    return module.__dict__[STATE].encoder(module).model
