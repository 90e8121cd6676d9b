"""The forms of layers are small objects that launch the kernels of a layer one after the other.

T tokens, H hidden, I intermediate. A form makes no decisions: `fastbert.engine.launched` makes it from a `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastbert.ops import launched
from fastbert.ops.angles import rotations_of
from fastbert.ops.attention_plan import Plan
from fastbert.ops.columns_around import beside
from fastbert.ops.disentangled import Positions
from fastbert.ops.launched import Product
from fastbert.ops.packing import PackedBatch

Normalize = tuple[Tensor, Tensor, float]  # weight (H,), bias (H,) and eps
OUTPUT = "output"  # The plan of a batch that says where its last hidden state goes: (T, H), contiguous.
PreNormalize = tuple[Tensor, Tensor | None, float]  # the same of a norm that may lack the bias


# Attention: (T, 3H) -> (T, H)


class Attention(Protocol):
    """This form runs between the product for queries, keys and values, and the product after attention."""

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PlainAttention:
    num_heads: int
    scale: float

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        return launched.varlen_attention(qkv, batch, plan, self.num_heads, self.scale)


@dataclass(frozen=True, eq=False)
class BiasedAttention:
    """table: (N, 2R + 1), the bias of the scores for each distance in columns."""

    num_heads: int
    scale: float
    table: Tensor

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        return launched.varlen_attention(qkv, batch, plan, self.num_heads, self.scale, self.table)


@dataclass(frozen=True, eq=False)
class WindowedAttention:
    num_heads: int
    scale: float
    window: int

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        return launched.windowed_attention(qkv, batch, plan, self.num_heads, self.scale, self.window)


@dataclass(frozen=True, eq=False)
class DisentangledAttention:
    """invariant: True if the bits must not depend on the batch."""

    num_heads: int
    scale: float
    positions: Positions
    invariant: bool

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        return launched.disentangled_attention(qkv, self.positions, batch, self.num_heads, self.scale, self.invariant)


@dataclass(frozen=True, eq=False)
class TurnedAttention:
    """This form rotates queries and keys by their positions before attention. angles: head size, base and factor."""

    attention: Attention
    num_heads: int
    angles: tuple[int, float, float]

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        cos, sin = rotations_of(batch).tables(*self.angles)
        return self.attention.run(launched.rotary(qkv, cos, sin, self.num_heads), batch, plan)


@dataclass(frozen=True, eq=False)
class NormedAttention:
    """This form normalises queries and keys before attention, all heads of a row together."""

    attention: Attention
    query_norm: Normalize
    key_norm: Normalize

    def run(self, qkv: Tensor, batch: PackedBatch, plan: Plan) -> Tensor:
        return self.attention.run(launched.norm_queries_and_keys(qkv, self.query_norm, self.key_norm), batch, plan)


# The feed-forward part before its second product: (T, H) -> (T, I)


class Feed(Protocol):
    def run(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Activated:
    up: Product

    def run(self, x: Tensor) -> Tensor:
        return launched.linear_activation(x, self.up)


@dataclass(frozen=True, eq=False)
class Gated:
    """up: (2I, H), the activated rows above the gate's rows."""

    up: Product
    activation: str

    def run(self, x: Tensor) -> Tensor:
        return launched.gated(launched.linear_activation(x, self.up), self.activation)


@dataclass(frozen=True, eq=False)
class GatedAtOnce:
    """up: (2I, H), as in `Gated`, with the activation; one kernel multiplies and gates."""

    up: Product

    def run(self, x: Tensor) -> Tensor:
        return launched.gated_linear(x, self.up)


# A product, the residual and a norm: (T, K), (T, H) -> (T, H)


class Join(Protocol):
    """out: memory for the result, or None."""

    def run(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Joined:
    """This form passes the bias and the residual to the kernels that accept them."""

    product: Product
    norm: Normalize

    def run(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        return launched.linear_residual_layer_norm(x, self.product, residual, *self.norm, out=out)


@dataclass(frozen=True, eq=False)
class MultipliedThenNormed:
    """This form rounds the product with its bias, as in families whose attention module ends with it."""

    product: Product
    norm: Normalize

    def run(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        y = launched.linear_activation(x, self.product)
        return launched.bias_residual_layer_norm(y, None, residual, *self.norm, out=out)


@dataclass(frozen=True, eq=False)
class JoinedTwice:
    """This form adds the residual to the output of `join` again, and normalises again."""

    join: Join
    norm: Normalize

    def run(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        y = self.join.run(x, residual)
        return launched.bias_residual_layer_norm(y, None, residual, *self.norm, out=out)


# Layers


class PostNorm(Protocol):
    """This layer has its norms after the residuals: (T, H) -> (T, H). out: memory for the result, or None."""

    def run(self, x: Tensor, batch: PackedBatch, plan: Plan, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PostNormLayer:
    qkv: Product
    attention: Attention
    out: Join
    feed: Feed
    down: Join

    def run(self, x: Tensor, batch: PackedBatch, plan: Plan, out: Tensor | None = None) -> Tensor:
        context = self.attention.run(launched.linear_activation(x, self.qkv), batch, plan)
        x = self.out.run(context, x)
        return self.down.run(self.feed.run(x), x, out)


@dataclass(frozen=True, eq=False)
class ConvolvedLayer:
    """norm(layer(x) + activation(product)), of the rows of `size` columns around each token, (H, size * H)."""

    layer: PostNorm
    product: Product
    size: int
    activation: str
    norm: Normalize

    def run(self, x: Tensor, batch: PackedBatch, plan: Plan, out: Tensor | None = None) -> Tensor:
        y = self.layer.run(x, batch, plan)
        convolved = launched.linear_activation(beside(x, batch, self.size), self.product)
        convolved = launched.activate(convolved, self.activation)
        return launched.bias_residual_layer_norm(y + convolved, None, None, *self.norm, out=out)


@dataclass(frozen=True, eq=False)
class PreNormLayer:
    """This layer normalises the input of each part. attention_norm: None if attention reads the rows without a norm."""

    attention_norm: PreNormalize | None
    qkv: Product
    attention: Attention
    out: Product
    feed_norm: PreNormalize
    feed: Feed
    down: Product


class PostNormStack:
    """This stack runs layers one after the other."""

    def __init__(self, layers: list[PostNorm]) -> None:
        self.layers = layers

    def run(self, x: Tensor, batch: PackedBatch, plan: Plan, keep_states: bool) -> list[Tensor]:
        """(T, H) -> the hidden states before the first layer and after each layer, or only the last."""
        states, out = [x], None if keep_states else batch.known_plan(OUTPUT)
        for i, layer in enumerate(self.layers, 1):
            x = layer.run(x, batch, plan, out if i == len(self.layers) else None)
            states = [*states, x] if keep_states else [x]
        return states


class PreNormStack:
    """This stack runs pre-norm layers: the kernel of the norm that reads a sum also adds the residual."""

    def __init__(self, layers: list[PreNormLayer], last_norm: PreNormalize | None) -> None:
        self.layers = layers
        # Of the layer after each, or of what the encoder gives.
        self.norms_after = [*(layer.attention_norm for layer in layers[1:]), last_norm]

    def run(self, x: Tensor, batch: PackedBatch, plan: Plan, keep_states: bool) -> list[Tensor]:
        """(T, H) -> the hidden states before the first layer and after each layer, or only the last, normalised one."""
        states = [x]
        first = self.layers[0].attention_norm
        normed = x if first is None else launched.bias_residual_layer_norm(x, None, None, *first)
        n_layers = len(self.layers)
        for i, (layer, norm_after) in enumerate(zip(self.layers, self.norms_after, strict=True), 1):
            context = layer.attention.run(launched.linear_activation(normed, layer.qkv), batch, plan)
            y = launched.linear_activation(context, layer.out)
            x, normed = launched.add_layer_norm(y, x, *layer.feed_norm)  # type: ignore[assignment]
            y = launched.linear_activation(layer.feed.run(normed), layer.down)
            if norm_after is None:
                x = normed = torch.add(x, y)
            else:
                x, normed = launched.add_layer_norm(y, x, *norm_after, keep_sum=i < n_layers)  # type: ignore[assignment]
            states = [*states, x if i < n_layers else normed] if keep_states else [normed]
        return states
