"""This module holds shared code of layers: parameters, settings, and the passes of attention and feed-forward.

The two forms of a layer, by the place of its norms, are in `post_norm.py` and `pre_norm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.training import disentangled
from fastbert.ops.training.kernels import Attention, Kernels, Rotation, Weights
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels.masks import Dropout


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """A `LayerSettings` holds the settings of a layer.

    eps: of both norms. dropouts: of both sums. dtype: of the products. gated: whether the first half of the activation
    multiplies the second half. inner_dropout: of the input of down. rotation: the rotation of queries and keys.
    pre_norm: whether attention and feed-forward normalise their inputs. last_eps: of the norm of the layer's output, if
    there is one. buckets: how distances become rows of position_keys and position_queries (fastbert.ops.disentangled).
    """

    kernels: Kernels
    attention: Attention
    activation: str
    eps: tuple[float, float]
    dropouts: tuple[Dropout | None, Dropout | None]
    dtype: torch.dtype
    gated: bool = False
    inner_dropout: Dropout | None = None
    rotation: Rotation | None = None
    pre_norm: bool = False
    last_eps: float = 0.0
    buckets: tuple[int, int] | None = None

    @property
    def distances(self) -> disentangled.Settings:
        """Returns the settings of disentangled attention."""
        batch, num_heads, scale, dropout = self.attention[:4]
        assert self.buckets is not None
        return disentangled.Settings(batch, num_heads, scale, self.buckets, dropout)

    @property
    def drops_out(self) -> bool:
        return any(d is not None for d in (self.attention.dropout, self.inner_dropout, *self.dropouts))


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """A `LayerParameters` holds a layer's parameters, in the order of its autograd node's arguments. Biases may be
    None.

    query: (H, H), or all three projections in one, (3 H, H); key and value are then None. attention_norm: None if
    attention does not normalise the layer's input. up: (I, H), or together with the gate (2 I, H); gate is then None.
    position_bias: (N, 2R + 1), added to attention's scores: see fastbert.ops.position_bias. last_norm: the norm of the
    output, in a pre-norm layer. position_keys, position_queries: (2R, H), the vectors of distances.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    attention_norm: Tensor | None
    attention_norm_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    output_norm: Tensor
    output_norm_bias: Tensor
    position_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    last_norm: Tensor | None = None
    last_norm_bias: Tensor | None = None
    position_keys: Tensor | None = None
    position_queries: Tensor | None = None

    def listed(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    @property
    def qkv(self) -> Weights:
        return _those_there(self.query, self.key, self.value)

    @property
    def qkv_biases(self) -> tuple[Tensor | None, ...]:
        return (self.query_bias, self.key_bias, self.value_bias)[: len(self.qkv)]

    @property
    def inner(self) -> Weights:
        """Returns the weights for the activation's input: up, and the gate."""
        return _those_there(self.up, self.gate)

    @property
    def inner_biases(self) -> tuple[Tensor | None, ...]:
        return (self.up_bias, self.gate_bias)[: len(self.inner)]


NAMES = tuple(field.name for field in fields(LayerParameters))


def _those_there(*weights: Tensor | None) -> Weights:
    return tuple(weight for weight in weights if weight is not None)


class Wanted:
    """Computes the gradients of parameters that need one. needed: for the layer's input, then for each parameter."""

    def __init__(self, kernels: Kernels, p: LayerParameters, needed: Sequence[bool]) -> None:
        self.kernels, self.parameters, self.x = kernels, p, needed[0]
        self.needed = dict(zip(NAMES, needed[1:], strict=True))
        self.grads: dict[str, Tensor | None] = {}

    def listed(self) -> tuple[Tensor | None, ...]:
        return tuple(self.grads.get(name) for name in NAMES)

    def before(self, name: str) -> bool:
        """Tells whether x, a term of attention's scores, or a parameter before this one needs a gradient."""
        of_scores = ("position_bias", "position_keys", "position_queries")
        return self.x or any(self.needed[n] for n in (*of_scores, *NAMES[: NAMES.index(name)]))

    def vectors(self, **sums: Tensor) -> None:
        """Stores sums over rows as the gradients of parameters, by name."""
        for name, total in sums.items():
            parameter = getattr(self.parameters, name)
            if parameter is not None and self.needed[name]:
                self.grads[name] = total.to(parameter.dtype)

    def product(self, names: Sequence[str], grad: Tensor, x: Tensor, biases: bool = True) -> None:
        """Computes the gradients of weights from grad, that of their product, (T, M), and of biases if requested.

        names: the weights, one above the other. If all need a gradient, one product computes all.
        """
        names = [name for name in names if getattr(self.parameters, name) is not None]
        if all(self.needed[name] for name in names):
            self._product(names, grad, x, biases)
            return
        first = 0
        for name in names:
            n_rows = getattr(self.parameters, name).shape[0]
            self._product([name], grad[:, first : first + n_rows], x, biases)
            first += n_rows

    def _product(self, names: Sequence[str], grad: Tensor, x: Tensor, biases: bool) -> None:
        summed = biases and any(self.needed[f"{name}_bias"] for name in names)
        if not summed and not any(self.needed[name] for name in names):
            return
        parameters = [getattr(self.parameters, name) for name in names]
        weight, bias = self.kernels.weight_gradient(grad, x, parameters[0].dtype, summed)
        first = 0
        for name, parameter in zip(names, parameters, strict=True):
            rows = slice(first, first + parameter.shape[0])
            if self.needed[name]:
                self.grads[name] = weight if len(names) == 1 else weight[rows]
            if bias is not None and self.needed[f"{name}_bias"]:
                self.grads[f"{name}_bias"] = bias if len(names) == 1 else bias[rows]
            first = rows.stop


def drop(kernels: Kernels, x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else kernels.drop(x, dropout)


def attend(
    x: Tensor, p: LayerParameters, settings: LayerSettings, kernels: Kernels
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Computes attention and its linear, (T, H) -> (T, H). Returns also qkv, context and lse for the backward pass."""
    qkv = kernels.linear(x, p.qkv, p.qkv_biases)
    if settings.rotation is not None:
        qkv = kernels.rotate(qkv, settings.rotation, settings.attention.num_heads)
    lse: Tensor | None
    if settings.buckets is None:
        context, lse = kernels.attention_forward(qkv, settings.attention, p.position_bias)
    else:
        passes = disentangled.KERNELS[kernels.name]
        context, lse = passes.forward(qkv, p.position_keys, p.position_queries, settings.distances)
    return kernels.linear(context, (p.out,), (p.out_bias,)), (qkv, context, lse)


def attend_backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    p: LayerParameters,
    settings: LayerSettings,
    wanted: Wanted,
    out_bias: bool,
) -> Tensor | None:
    """Returns the gradient of qkv, (T, 3 H), from that of `attend`'s result; None if nothing before out needs one.

    out_bias: whether to compute the gradient of out's bias here.
    """
    kernels, (qkv, context, lse) = settings.kernels, kept
    wanted.product(("out",), grad, context, out_bias)
    if not wanted.before("out"):
        return None
    d_context = kernels.input_gradient(grad, (p.out,))
    if settings.buckets is None:
        d_qkv, d_bias = kernels.attention_backward(d_context, qkv, context, lse, settings.attention, p.position_bias)
        if d_bias is not None:
            wanted.vectors(position_bias=d_bias)
    else:
        passes, tables = disentangled.KERNELS[kernels.name], (p.position_keys, p.position_queries)
        d_qkv, *d_tables = passes.backward(d_context, qkv, *tables, context, lse, settings.distances)
        for name, d_table in zip(("position_keys", "position_queries"), d_tables, strict=True):
            if d_table is not None:
                wanted.vectors(**{name: d_table})
    del d_context
    if settings.rotation is not None:
        d_qkv = kernels.rotate_back(d_qkv, settings.rotation, settings.attention.num_heads)
    wanted.product(("query", "key", "value"), d_qkv, x)
    return d_qkv


def feed_forward(x: Tensor, p: LayerParameters, settings: LayerSettings, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Computes the feed-forward part, (T, H) -> (T, H), and its activation's input, (T, I) or with a gate (T, 2 I)."""
    if settings.gated:
        pre = kernels.linear(x, p.inner, p.inner_biases)
        activated = kernels.gated(pre, settings.activation)
    else:
        activated, pre = kernels.activated_linear(x, p.up, p.up_bias, settings.activation)
    activated = drop(kernels, activated, settings.inner_dropout)
    return kernels.linear(activated, (p.down,), (p.down_bias,)), pre


def feed_backward(
    grad: Tensor,
    x: Tensor,
    pre: Tensor,
    p: LayerParameters,
    settings: LayerSettings,
    wanted: Wanted,
    down_bias: bool,
) -> Tensor:
    """Returns the gradient of pre, from that of `feed_forward`'s result. down_bias: whether to compute its gradient."""
    kernels = settings.kernels
    d_activated = drop(kernels, kernels.input_gradient(grad, (p.down,)), settings.inner_dropout)
    if settings.gated:
        d_pre, activated = kernels.gated_backward(d_activated, pre, settings.activation)
    else:
        d_pre, activated, d_up_bias = kernels.activation_backward(d_activated, pre, settings.activation)
        wanted.vectors(up_bias=d_up_bias)
    del d_activated
    wanted.product(("down",), grad, drop(kernels, activated, settings.inner_dropout), down_bias)
    del activated
    wanted.product(("up", "gate"), d_pre, x, settings.gated)
    return d_pre


def plain_attend(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes the same as `attend`, in plain, differentiable PyTorch."""
    return attend(x, p, settings, PLAIN)[0]


def plain_feed_forward(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes the same as `feed_forward`, in plain, differentiable PyTorch."""
    return feed_forward(x, p, settings, PLAIN)[0]


def plain_norm(
    x: Tensor, residual: Any, weight: Tensor, bias: Any, eps: float, dropout: Dropout | None = None
) -> Tensor:
    """Computes LayerNorm(dropout(x) + residual), in plain, differentiable PyTorch."""
    return PLAIN.norm_forward(x, residual, weight, bias, eps, dropout, False).y
