"""This module makes a fastbert.BertModel on the modules of a live model of another library, without a copy of weights.

The live model stays the only owner of the weights. Every call first checks that its modules are the same, without
hooks, and of one dtype. A replaced module (an adapter, resized embeddings) is used, and modes and dropouts are copied.
After an unsupported change the original forward runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from operator import contains
from typing import Any

import torch
from torch import nn

from fastbert.adapters import versions
from fastbert.adapters.called_module import CalledModule
from fastbert.adapters.covered import Mapping
from fastbert.adapters.live_modes import DropoutSite, Modes
from fastbert.adapters.live_values import (
    Leaf,
    Parameters,
    Settings,
    same_function,
    unexpected_setting,
)
from fastbert.adapters.patches import Watch
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.rotary import gated_rotary_layer, layer_types, modernbert_layers
from fastbert.engine import Options
from fastbert.models.bert import BertModel
from fastbert.ops.rotary import inverse_frequencies


class Unsupported(ValueError):
    """An `Unsupported` says why fastbert does not support a live model."""


class LiveEncoder:
    """A `LiveEncoder` holds fastbert's model on the modules of a live model; `is_current` tells if they are the same.

    Raises Unsupported for an unknown part of the live model.
    """

    def __init__(self, live: nn.Module, mapping: Mapping, options: Options) -> None:
        layers: Any = _get(live, mapping.layers)
        embeddings = _get(live, "embeddings")
        try:
            config = mapping.sized(mapping.config(live.config, embeddings), len(layers))
        except ValueError as error:
            raise Unsupported(f"the config: {error}") from error
        if mapping.family.pooler and not hasattr(live, "pooler"):
            raise Unsupported("the pooler is missing")
        if getattr(live, "z_steps", 0) > 1:
            raise Unsupported(f"z_steps is {live.z_steps}: the last layer runs again")
        with torch.device("meta"):
            with_pooler = getattr(live, "pooler", None) is not None
            model = BertModel(config, with_pooler, options)
        leaves = list(mapping.leaves(model))
        containers = _containers(live, mapping, [theirs for _, theirs in leaves])
        for path, module in containers.items():
            _check_container(path, module, mapping)
            _check_settings(path, module)
        _check_tanh(live, mapping)

        model.eval()  # The live modules are not in it yet.
        own = list(model.modules())
        direct: list[Leaf] = []
        called: list[CalledModule] = []
        sites: list[DropoutSite] = []
        looked_at = list(containers.values())
        for ours, theirs in leaves:
            parent, _, name = ours.rpartition(".")
            expected, leaf = model.get_submodule(ours), _get(live, theirs)
            looked_at.append(leaf)
            if isinstance(expected, nn.Dropout):
                _check_dropout(theirs, leaf)
                sites.append(_site(ours, theirs, expected, leaf, live, mapping))
                continue
            if _reads(ours, theirs, expected, leaf):
                direct.append(Leaf(theirs, leaf, expected))
            else:
                called.append(CalledModule(theirs, leaf, expected))
            model.get_submodule(parent)._modules[name] = leaf
            own.remove(expected)
        for path in map(mapping.layer, range(len(layers))):
            name = getattr(live.config, mapping.hidden_act)
            looked_at.append(_check_layer(path, _get(live, path), mapping, config, name))
        self.model, self._leaves = model, tuple(_get(live, theirs) for _, theirs in leaves)
        self._counted_from = mapping.counted_from(embeddings)
        self._count_from = partial(mapping.counted_from, embeddings)
        self._kinds = list(map(type, self._leaves))
        self._children = tuple((m._modules, dict(m._modules)) for m in (live, *containers.values()))
        self._looked_at, self._dicts = tuple(looked_at), tuple(module.__dict__ for module in looked_at)
        self._hooks = tuple(hooks for module in looked_at for hooks in _hooks_of(module))
        followed = {id(module.module) for module in called}
        self._settings = Settings(module for module in looked_at if id(module) not in followed)
        self._parameters, self._called = Parameters(direct), tuple(called)
        self._buffers = _default_ids(live, mapping)
        self._buffers_checked: Any = None
        self._watch = _watch(live, mapping)
        above = mapping.layers.rpartition(".")[0]
        around = _get(live, above) if above else live
        in_order = [layers[i] for i in config.layer_order]
        self.modes = Modes(live, model, own, sites, around, in_order)
        self.modes.follow()

    def is_current(self) -> bool:
        """Tells whether no module of the live model was replaced, added or removed, and no setting changed."""
        same_modules = all(children == before for children, before in self._children)
        same_modules = same_modules and list(map(type, self._leaves)) == self._kinds
        return same_modules and self._count_from() == self._counted_from and self._settings.unchanged()

    def obstacle(self) -> str | None:
        """Says why fastbert must not replace the original forward in the modules' present state, or returns None."""
        if (patch := self._watch.obstacle()) is not None:
            return patch
        if (obstacle := self.modes.obstacle()) is not None:
            return obstacle
        if any(map(contains, self._dicts, repeat("forward"))) and not self._own_forwards():
            return "a module inside the encoder has its own forward"
        if any(self._hooks) and not all(map(versions.is_harmless, _callables(self._hooks))):
            return "a module inside has hooks"
        if (obstacle := self._parameters.obstacle()) is not None:
            return obstacle
        for module in self._called:
            if (obstacle := module.obstacle(self.model.embeddings.LayerNorm.weight)) is not None:
                return obstacle
        return self._buffer_obstacle()

    def _own_forwards(self) -> bool:
        return all(versions.is_own_forward(m) for m in self._looked_at if "forward" in m.__dict__)

    def _buffer_obstacle(self) -> str | None:
        """Checks the buffers with the default ids of transformers 5, which other code may have changed."""
        present = [
            (path, buffers[name], kind) for path, buffers, name, kind in self._buffers if buffers.get(name) is not None
        ]
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.shape) for _, t, _ in present]
        if state != self._buffers_checked:
            for path, tensor, kind in present:
                if kind == "frequencies":
                    expected: Any = self._frequencies(path).to(tensor.device)
                else:
                    expected = torch.arange(tensor.shape[-1], device=tensor.device) if kind == "columns" else 0
                if tensor.device.type == "meta" or not bool((tensor == expected).all()):
                    return f"{path} differs from that of a new model"
            self._buffers_checked = state
        return None

    def _frequencies(self, path: str) -> torch.Tensor:
        """Returns the frequencies of the layers of a kind, which the name of their buffer begins with."""
        config: Any = self.model.config
        if config.family.text == "gated_rotary_bert":
            layer = gated_rotary_layer(config)
            return inverse_frequencies(config.head_size, layer.base, layer.factor)
        kind = path.rpartition(".")[2].removesuffix("_inv_freq")
        layers = dict(zip(layer_types(config), modernbert_layers(config), strict=True))
        return inverse_frequencies(config.head_size, layers[kind].base, layers[kind].factor)

    def invalidate(self) -> None:
        """Marks derived tensors to be made again, because weights may have been written to through `.data`."""
        self.model.renew(self.model.training)


def _watch(live: nn.Module, mapping: Mapping) -> Watch:
    """Watches the classes of the model and its parts, except classes of other libraries, whose modules are called."""
    kinds = [mapping.original(type(live)), *map(type, list(live.modules())[1:])]
    known = [kind for kind in kinds if kind.__module__.startswith(("torch.nn.", "transformers."))]
    return Watch(known, importlib.import_module(mapping.module), live.config)


def _get(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            raise Unsupported(f"{path} is missing")
        module = child
    return module


def _containers(live: nn.Module, mapping: Mapping, leaves: list[str]) -> dict[str, nn.Module]:
    """Returns the modules between the root and the leaves, by path. Raises Unsupported for an unknown child."""
    paths: dict[str, set[str]] = {}  # A path, and its children on the way to a leaf.
    stored = map(mapping.layer, range(len(_get(live, mapping.layers))))
    others = [f"{path}.{name}" for path in stored for name in (mapping.activation, *mapping.unread)]
    for leaf in (*leaves, *others, *([mapping.angles] if mapping.angles else [])):
        names = leaf.split(".")
        for i, name in enumerate(names):
            paths.setdefault(".".join(names[:i]), set()).add(name)
    tanh, _, name = mapping.tanh.rpartition(".")
    if tanh in paths:
        paths[tanh].add(name)
    for path, known in paths.items():
        children = (_get(live, path) if path else live)._modules
        if unknown := [name for name, child in children.items() if name not in known and child is not None]:
            raise Unsupported(f"{path or 'the model'} has a module {unknown[0]!r}")
    return {path: _get(live, path) for path in paths if path}


def _check_container(path: str, module: nn.Module, mapping: Mapping) -> None:
    kind = type(module)
    known = kind.__module__ == mapping.module and kind.__name__ in mapping.containers
    if not known and not (kind is nn.ModuleList and mapping.is_list(path)):
        raise Unsupported(f"{path} is a {kind.__module__}.{kind.__qualname__}")


def _check_tanh(live: nn.Module, mapping: Mapping) -> None:
    path, _, name = mapping.tanh.rpartition(".")
    if live._modules.get("pooler") is not None:
        holder = _get(live, path) if path else live
        if type(holder._modules.get(name)) is not nn.Tanh:
            raise Unsupported(f"{mapping.tanh} is not Tanh")


def _check_dropout(theirs: str, leaf: nn.Module) -> None:
    if type(leaf) not in (nn.Dropout, nn.Identity):
        raise Unsupported(f"{theirs} is a {type(leaf).__qualname__}")


def _site(
    ours: str, theirs: str, dropout: nn.Dropout, leaf: nn.Module, live: nn.Module, mapping: Mapping
) -> DropoutSite:
    """Makes the site of one of fastbert's dropouts. A layer's attention reads its probability in its own way."""
    if mapping.attention_p and ours.endswith(f".{mapping.heads}.dropout"):
        attention = _get(live, mapping.family.to_theirs(ours.removesuffix(".dropout")))
        return DropoutSite(theirs, dropout, attention, mapping.attention_p, attention)
    layer, _, name = ours.partition(".attention.self.")
    if name != "dropout":
        return DropoutSite.of(theirs, dropout, leaf)
    attention = _get(live, f"{mapping.family.to_theirs(layer)}.{mapping.heads}")
    return DropoutSite(theirs, dropout, *versions.attention_dropout(attention, leaf))


def _reads(ours: str, theirs: str, expected: nn.Module, leaf: nn.Module) -> bool:
    """Tells whether fastbert reads the leaf's parameters; otherwise it calls the leaf."""
    kind = type(leaf)
    if kind is type(expected):
        if kind is nn.Embedding:
            for name in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(leaf, name) not in (None, False):
                    raise Unsupported(f"{theirs} has {name}")
        return True
    # Our path calls any module that works row by row, as an adapter, in the place of a linear or the word embeddings.
    if isinstance(expected, nn.Linear) or ours == "embeddings.word_embeddings":
        return False
    raise Unsupported(f"{theirs} is a {kind.__qualname__}")


def _check_settings(path: str, module: nn.Module) -> None:
    if (setting := unexpected_setting(module)) is not None:
        raise Unsupported(f"{path} has {setting}")


def _check_layer(path: str, layer: nn.Module, mapping: Mapping, config: BertConfig, name: str) -> nn.Module:
    """Returns the activation of a layer. Raises Unsupported if it, or the attention, differs from the config."""
    from transformers.activations import ACT2FN

    activation: nn.Module = _get(layer, mapping.activation)
    if not same_function(activation, ACT2FN[name]):
        raise Unsupported(f"{path}.{mapping.activation} is not {name!r}, which the config names")
    attention = _get(layer, mapping.heads)
    if getattr(attention, mapping.n_heads, config.num_attention_heads) != config.num_attention_heads:
        raise Unsupported(f"{path}: heads were pruned")
    if getattr(attention, "attention_head_size", config.head_size) != config.head_size:
        raise Unsupported(f"{path}.{mapping.heads}.attention_head_size was changed")
    if getattr(attention, "head_dim", config.head_size) != config.head_size:
        raise Unsupported(f"{path}.{mapping.heads}.head_dim was changed")
    if mapping.angles and getattr(attention, "sliding_window", None) != _their_window(config, path):
        raise Unsupported(f"{path}.{mapping.heads}.sliding_window is not what the config says")
    scaling = getattr(attention, "scaling", None)
    if scaling is not None and scaling != config.head_size**-0.5:
        raise Unsupported(f"{path}.{mapping.heads}.scaling was changed")
    return activation


def _their_window(config: BertConfig, path: str) -> int | None:
    """Returns what a layer's attention has as sliding_window: the first column that it does not reach."""
    if config.family.text != "modernbert":
        return None
    window = modernbert_layers(config)[int(path.rpartition(".")[2])].window
    return None if window is None else window + 1


def _default_ids(live: nn.Module, mapping: Mapping) -> list[tuple[str, dict[str, Any], str, str]]:
    """Lists the buffers of default ids as (path, the dictionary that has it, its key there, "columns" or "zeros")."""
    split = [(path, *path.rpartition(".")[::2], kind) for path, kind in mapping.buffers.items()]
    return [(path, _get(live, parent)._buffers, name, kind) for path, parent, name, kind in split]


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _callables(hooks: tuple[dict[int, Any], ...]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, hooks))
