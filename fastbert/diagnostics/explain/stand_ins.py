"""This module makes a model of stand-ins, which replaces the original model in a dry run.

Its modules copy the original ones, without hooks and caches. Its tensors are stand-ins of the requested dtype. An
adapter, a module with hooks, or a module of another library becomes a `CalledModule`, and only its call is recorded. So
no user code runs, and the original model does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.rotary import RotaryLayer
from fastbert.diagnostics.explain.report import MODULE
from fastbert.engine.listeners import is_bare, is_plain, is_plain_norm
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import AUTO, Policy, recording
from fastbert.ops.disentangled import Positions
from fastbert.ops.recording import Record, Recorder
from fastbert.pipelines import modules

# The attributes that a stand-in may share with the original module: values that nothing changes.
_VALUES = (bool, int, float, str, tuple, frozenset, type(None), BertConfig, Policy, RotaryLayer)
_AFTER_POOLING: tuple[type[nn.Module], ...] = (modules.Dense, modules.LayerNorm, modules.Normalize, nn.Dropout)
_BESIDE = "the module is called as it is: a module beside it is an adapter, or has hooks"
_ALTERED = "the module is called as it is: it is an adapter, or has hooks"


class Part(NamedTuple):
    """A `Part` describes a module that may be called as it is.

    op: its operation, "" if reports do not show it. width: the width of its output, None for the width of its input.
    """

    name: str
    op: str
    width: int | None
    class_name: str
    reason: str | None
    bias: bool = False


class DryRun(Recorder):
    """A `DryRun` records a dry run on stand-ins, with the names of the model's parts."""

    def __init__(self, device: torch.device, arch: int | None, dtype: torch.dtype, cast: torch.dtype | None) -> None:
        super().__init__(dry=True, device=device, arch=arch)
        self.dtype, self.cast = dtype, cast
        self.parts: dict[int, Part] = {}

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Assigns the operations inside the context to the module of this name, unless their weight has another."""
        before, self.place = self.place, name
        try:
            yield
        finally:
            self.place = before

    def called(self, module: Any, x: Tensor) -> Tensor:
        """Records the call of a module, and returns a stand-in for its output."""
        part, is_ids = self.parts[id(module)], not x.is_floating_point()
        rows = x.shape if is_ids else x.shape[:-1]
        width = x.shape[-1] if part.width is None else part.width
        _, raises = self.take_reason("")
        if part.op:
            before, after = None if is_ids else (rows.numel(), x.shape[-1]), (rows.numel(), width)
            facts = {"class": part.class_name, "bias": part.bias}
            self.records.append(Record(part.op, MODULE, part.reason, raises, before, after, x.dtype, facts, part.name))
        return recording.stand_in((*rows, width), self.dtype if is_ids else x.dtype)

    def tensor(self, parameter: Tensor | None, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Returns a stand-in for a parameter of the module of this name."""
        if parameter is None:
            return None
        if dtype is None:
            dtype = self.cast if self.cast is not None and parameter.is_floating_point() else parameter.dtype
        tensor = recording.stand_in(tuple(parameter.shape), dtype)
        tensor.inference = parameter.is_inference()
        self.names[id(tensor)] = name
        return tensor

    def tensors(self, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        return {key: self.tensor(value, name, dtype) for key, value in module._parameters.items()}


class CalledModule(nn.Module):
    """A `CalledModule` replaces an unknown module. Its call is recorded, and no hooks are called."""

    def __call__(self, *rows: Any, **others: Any) -> Tensor:
        return self.__dict__["dry"].called(self, next(x for x in (*rows, *others.values()) if x is not None))


class _Named(nn.Module):
    """A `_Named` is a module of this library that reports its name when it runs, and calls no hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["dry"].inside(self.__dict__["place"]):
            return self.forward(*args, **kwargs)


class _Fused(_Named):
    """A `_Fused` is a module that multiplies several of its linears as one."""

    projections: tuple[str, ...]

    def fused_qkv(self) -> tuple[Tensor, Tensor | None]:
        dry, place, module = self.__dict__["dry"], self.__dict__["place"], self
        linears: list[Any] = [module.get_submodule(name) for name in module.projections]
        n_rows, weight = sum(linear.weight.shape[0] for linear in linears), linears[0].weight
        fused = recording.stand_in((n_rows, weight.shape[1]), weight.dtype)
        dry.names[id(fused)] = f"{place}.{'+'.join(module.projections)}"
        self.__dict__["fused"] = fused  # its id identifies it while it exists
        without_bias = all(linear.bias is None for linear in linears)
        return fused, None if without_bias else recording.stand_in((n_rows,), weight.dtype)


class _Disentangled(_Fused):
    """This is attention with projections of distances. They run once for all batches, and no report shows them."""

    num_heads: int
    table_rows: int

    def positions(self, table: Tensor, policy: Policy = AUTO) -> Positions:
        module: Any = self
        keys, queries = (
            recording.stand_in((self.table_rows, table.shape[1]), table.dtype) if name else None
            for name in (module.position_keys, module.position_queries)
        )
        return Positions(keys, queries, module.buckets)


class _WithTable(_Named):
    """This is an encoder whose layers share a table of distances."""

    def table(self, policy: Policy = AUTO) -> Tensor | None:
        module: Any = self
        return module.rel_embeddings.weight if module.has_terms else None


class _Convolved(_Named):
    """This is a convolution that runs as a matrix product."""

    def product(self) -> tuple[Tensor, Tensor]:
        dry, place = self.__dict__["dry"], self.__dict__["place"]
        conv: Any = self.get_submodule("conv")
        n_out, n_in, k = conv.weight.shape
        product = recording.stand_in((n_out, n_in * conv.groups * k), conv.weight.dtype)
        dry.names[id(product)] = f"{place}.conv"
        self.__dict__["product_weight"] = product  # its id identifies it while it exists
        return product, conv.bias


class _Biased(_Named):
    """This is an encoder whose layers share a position bias."""

    bias_columns: int

    def position_bias(self, policy: Policy) -> Tensor:
        weight: Any = self.get_submodule("relative_attention_bias").weight
        return recording.stand_in((weight.shape[1], self.bias_columns), weight.dtype)


# Stand-in classes by the attributes of the original class; the first match counts.
_BASES: dict[str, Any] = {
    "positions": _Disentangled,
    "projections": _Fused,
    "position_bias": _Biased,
    "has_table": _WithTable,
    "product": _Convolved,
}


@functools.cache
def _named(cls: Any) -> type[nn.Module]:
    base = next((base for name, base in _BASES.items() if hasattr(cls, name)), _Named)
    return type(cls.__name__, (base, cls), {"__module__": cls.__module__})


def stand_in_for(module: Any, name: str, dry: DryRun, config: BertConfig, parent: type | None = None) -> Any:
    """Makes a copy of a module and its submodules from stand-ins. name: its name in the report."""
    cls: Any = _own_class(module)
    if cls is None:
        return _leaf(module, name, dry, config, parent)
    clone: Any = _empty_like(module, cls if cls is nn.ModuleList else _named(cls))
    clone.__dict__ |= {"dry": dry, "place": name}
    clone._parameters = dry.tensors(module, name)
    for key, child in module._modules.items():
        below = f"{name}.{key}" if name else key
        clone._modules[key] = None if child is None else stand_in_for(child, below, dry, config, type(module))
    return clone


def _own_class(module: nn.Module) -> type[nn.Module] | None:
    """Returns the class of this library whose forward the module has, or nn.ModuleList; None for any other class."""
    if isinstance(module, nn.ModuleList):
        return nn.ModuleList
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("fastbert.")]
    if isinstance(module, PreTrainedModel):  # a forward of its own does not matter
        return classes[0]
    own = bool(classes) and getattr(type(module).forward, "__module__", "").startswith("fastbert.")
    return classes[0] if own else None


def _empty_like(module: nn.Module, cls: type[nn.Module]) -> Any:
    clone: Any = cls.__new__(cls)
    nn.Module.__init__(clone)
    clone.__dict__ |= {key: value for key, value in module.__dict__.items() if isinstance(value, _VALUES)}
    return clone


def _leaf(module: Any, name: str, dry: DryRun, config: BertConfig, parent: type | None) -> nn.Module:
    kind, (op, width) = type(module), _place(module, name, config, parent)
    plain = is_plain(module) or is_plain_norm(module) or any(is_bare(module, k) for k in _WITHOUT_BIAS)
    plain = plain or (getattr(parent, "without_bias", False) and _is_bare_product(module))
    clone = _empty_like(module, kind if plain else CalledModule)
    clone._parameters = dry.tensors(module, name)
    if plain:
        clone.training = clone.training and kind is not nn.Dropout  # dropout would draw random numbers
        reason = _BESIDE
    else:
        clone.__dict__["dry"], reason = dry, _ALTERED
        if op == "linear":
            reason = "the module is called as it is: it is not a plain torch.nn.Linear"
            if kind is nn.Linear:
                reason = "the module is called as it is: it is without a bias, has hooks or a forward of its own"
    bias = op == "linear" and getattr(module, "bias", True) is not None
    dry.parts[id(clone)] = Part(name, op, width, class_name(module), reason, bias)
    dry.names[id(clone)] = name
    return clone


def _is_bare_product(module: nn.Module) -> bool:
    return is_bare(module, nn.Linear) or is_bare(module, nn.LayerNorm)


_WITHOUT_BIAS = (nn.Embedding, nn.Dropout, nn.Identity, nn.Conv1d)


def after_pooling(module: Any, name: str, dry: DryRun) -> nn.Module:
    """Makes a stand-in of a module on sentence vectors, or a `CalledModule` if it is not of this library."""
    cls = next((cls for cls in _AFTER_POOLING if isinstance(module, cls)), None)
    stand_in = _empty_like(module, CalledModule if cls is None else cls)
    if cls is None:
        stand_in.__dict__["dry"] = dry
    else:
        for key, child in module._modules.items():
            stand_in._modules[key] = _empty_like(child, type(child))
            stand_in._modules[key]._parameters = dry.tensors(child, name)
    settings: dict[str, Any] = getattr(module, "settings", dict)()
    width = settings.get("out_features")
    dry.parts[id(stand_in)] = Part(name, type(module).__name__.lower(), width, class_name(module), None)
    dry.names[id(stand_in)] = name
    return stand_in


def class_name(module: Any) -> str:
    """Returns the name of the module's class, with the module that defines it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _place(module: nn.Module, name: str, config: BertConfig, parent: type | None) -> tuple[str, int | None]:
    """Returns a module's operation, and the width of its output, None for the width of its input."""
    last = name.rpartition(".")[2]
    if last in ("dropout", "drop", "out_drop"):
        return "", None
    if last == "LayerNorm" or last.endswith("norm"):
        return "layer_norm", None
    if last.endswith("embeddings"):
        return "embedding", config.embedding_width
    if last.isdigit():
        return "layer", None
    above = "" if parent is None else parent.__name__
    if last == "dense":
        widths = {"BertIntermediate": config.intermediate_size, "BertPredictionHeadTransform": config.embedding_width}
        return "linear", widths.get(above, config.hidden_size)
    if last == "relative_attention_bias":
        return "", config.num_attention_heads
    if last in ("query", "key", "value", "embeddings_project", "q", "k", "v", "o"):
        return "linear", config.hidden_size
    width = getattr(module, "out_features", None)
    if not isinstance(width, int):
        width = config.vocab_size if last == "decoder" else config.num_labels
    return "linear", width
