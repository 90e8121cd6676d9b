"""A `Block` is a layer of an encoder as data. Engines, explain, verify and tune read this one description of a layer.

The families have further features beyond BERT's. An engine that does not support a feature names it as an obstacle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastbert.ops.disentangled import Positions

# What a layer may have beyond BERT's, and how an obstacle says it.
FEATURES = {
    "pre_norm": "layers that normalise their input (pre-norm)",
    "gate": "a gated activation",
    "rotary": "rotary positions",
    "position_bias": "a position bias in attention",
    "window": "attention within a window",
    "scale": "its own attention scale",
    "distances": "disentangled attention",
    "convolution": "a convolution beside a layer",
    "query_norm": "normalised queries and keys",
    "second_norm": "a second norm after attention",
}


_NORMS = ("attention_norm", "output_norm", "last_norm", "query_norm", "key_norm", "second_norm")
_LINEARS = ("query", "key", "value", "out", "up", "down")


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. weight: (M, K). bias: (M,) or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> Linear:
        return cls(module.weight, module.bias)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Linear:
        """Returns the linear with the function applied to each tensor."""
        return Linear(function(self.weight), None if self.bias is None else function(self.bias))


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm. weight and bias: (H,), or None for ones and zeros."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        return cls(module.weight, module.bias, module.eps)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Norm:
        """Returns the norm with the function applied to each tensor."""
        weight, bias = (None if t is None else function(t) for t in (self.weight, self.bias))
        return Norm(weight, bias, self.eps)

    def arguments(self) -> tuple[Tensor, Tensor, float]:
        """Returns weight, bias and eps for kernels; the norm must have weight and bias."""
        assert self.weight is not None and self.bias is not None
        return self.weight, self.bias, self.eps

    def filled(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight and bias, (H,) each; missing ones are ones and zeros like `like`."""
        weight, bias, size = self.weight, self.bias, like.shape[-1]
        return (
            like.new_ones(size) if weight is None else weight,
            like.new_zeros(size) if bias is None else bias,
        )


@dataclass(frozen=True, eq=False)
class Convolution:
    """norm(y + activation(dropout(conv(x)))), with the input x and the output y of a layer; conv goes over columns.

    weight: (H, H / groups, k), k odd. bias: (H,). dropout: its probability in the present mode. product returns the
    convolution as a linear on the joined rows of k columns, (H, k * H), kept until a weight changes.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    norm: Norm
    activation: str
    dropout: float
    product: Callable[[], Linear]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Convolution:
        """Returns the convolution with the function applied to each tensor."""
        product = self.product
        return replace(
            self, weight=function(self.weight), bias=function(self.bias), norm=self.norm.mapped(function),
            product=lambda: product().mapped(function),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Distances:
    """A `Distances` holds the table of distances of disentangled attention (fastbert.ops.disentangled).

    table: (2R, H), normalised by norm, if there is one. key, query: the linears for its rows, (H, H), or None for a
    missing term. buckets: the map from distances to rows. project returns the two products, kept until a weight
    changes.
    """

    table: Tensor
    norm: Norm | None
    key: Linear | None
    query: Linear | None
    buckets: tuple[int, int]
    project: Callable[[], Positions]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Distances:
        """Returns the distances with the function applied to each tensor."""
        norm, key, query = (
            None if part is None else part.mapped(function) for part in (self.norm, self.key, self.query)
        )
        project = self.project

        def mapped() -> Positions:
            keys, queries, buckets = project()
            keys, queries = (None if part is None else function(part) for part in (keys, queries))
            return Positions(keys, queries, buckets)

        return replace(self, table=function(self.table), norm=norm, key=key, query=query, project=mapped)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class EmbeddingTables:
    """The tables whose rows are summed and normalised before the first layer.

    words: (V, E). token_types: (segments, E), positions: (positions, E); None in a family without them.
    """

    words: Tensor
    token_types: Tensor | None
    positions: Any
    norm: Norm


@dataclass(frozen=True, eq=False)
class Block:
    """One layer: attention and a feed-forward part, each with its residual and its norm.

    query, key, value, out: (H, H). up: (I, H). down: (H, I). fuse_qkv returns query, key and value as one linear,
    (3H, H), kept until one of them changes. attention_norm: None if attention reads the layer's input without a norm,
    as in ModernBERT's first layer. dropouts: the present probabilities for attention's probabilities, its output and
    the feed-forward part's output. gate: (I, H); its product multiplies the activation's. fuse_up returns up and gate
    as one linear, (2I, H), with up in the first rows. pre_norm: whether the norms are before each part. rotary: the
    base of the angles. position_factor: the divisor of positions. position_bias: (N, 2R + 1), added to the score of a
    key that is -R to R columns after the query, or further away (fastbert.ops.position_bias); layers may share it.
    window: the number of tokens on either side in attention. last_norm: the norm of the encoder's output, in its last
    layer. scale: the factor of the scores, or None for 1 / sqrt(D). distances: those of disentangled attention.
    convolution: a convolution parallel to the layer. query_norm, key_norm: norms over all heads of a query or a key,
    before attention. second_norm: the norm of the sum of attention_norm's output and the layer's input.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    attention_norm: Norm | None
    up: Linear
    down: Linear
    output_norm: Norm
    activation: str
    num_heads: int
    fuse_qkv: Callable[[], Linear]
    dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gate: Linear | None = None
    fuse_up: Callable[[], Linear] | None = None
    pre_norm: bool = False
    rotary: float | None = None
    position_bias: Tensor | None = None
    window: int | None = None
    position_factor: float = 1.0
    last_norm: Norm | None = None
    scale: float | None = None
    distances: Distances | None = None
    convolution: Convolution | None = None
    inner_dropout: float = 0.0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    second_norm: Norm | None = None

    @property
    def norms(self) -> tuple[Norm, Norm]:
        """Returns both norms of a layer with two norms."""
        assert self.attention_norm is not None
        return self.attention_norm, self.output_norm

    def attention_norms(self) -> tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]:
        """Returns weight, bias and eps of the norms of queries and of keys; the layer must have them."""
        assert self.query_norm is not None and self.key_norm is not None
        return self.query_norm.arguments(), self.key_norm.arguments()

    @property
    def hidden_size(self) -> int:
        return self.out.weight.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.up.weight.shape[0]

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def features(self) -> list[str]:
        """The names of FEATURES that this layer has."""
        values = (
            self.gate, self.rotary, self.position_bias, self.window, self.scale, self.distances, self.convolution,
            self.query_norm, self.second_norm,
        )  # fmt: skip
        names = [name for name, value in zip(list(FEATURES)[1:], values, strict=True) if value is not None]
        return ["pre_norm", *names] if self.pre_norm else names

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Block:
        """Returns the layer with the function applied to each tensor."""
        linears: dict[str, Any] = {name: getattr(self, name).mapped(function) for name in _LINEARS}
        norms: dict[str, Any] = {
            name: None if (norm := getattr(self, name)) is None else norm.mapped(function) for name in _NORMS
        }
        gate = None if self.gate is None else self.gate.mapped(function)
        bias = None if self.position_bias is None else function(self.position_bias)
        fuse, fuse_up, distances, beside = self.fuse_qkv, self.fuse_up, self.distances, self.convolution
        return replace(
            self, **linears, **norms, gate=gate, position_bias=bias, fuse_qkv=lambda: fuse().mapped(function),
            fuse_up=None if fuse_up is None else lambda: fuse_up().mapped(function),
            distances=None if distances is None else distances.mapped(function),
            convolution=None if beside is None else beside.mapped(function),
        )  # fmt: skip

    def products(self) -> dict[str, tuple[Linear, ...]]:
        """Returns the layer's matrix products by name, each a list of linears that are multiplied as one."""
        up = (self.up,) if self.gate is None else (self.up, self.gate)
        return {"qkv": (self.query, self.key, self.value), "out": (self.out,), "up": up, "down": (self.down,)}


def features_of(blocks: Sequence[Block]) -> list[str]:
    """Returns the names of FEATURES that at least one layer has."""
    names = {name for block in blocks for name in block.features()}
    return [name for name in FEATURES if name in names]


def product_shapes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, int]]:
    """Returns the shapes (M, K) of the weights in `Block.products`, without a gate, from a config alone."""
    h, i = hidden_size, intermediate_size
    return {"qkv": (3 * h, h), "out": (h, h), "up": (i, h), "down": (h, i)}


def feature_obstacles(features: list[str], supported: frozenset[str], engine: str) -> Iterator[str]:
    """Yields one reason for each feature of the layers that the engine does not support."""
    for name in features:
        if name not in supported:
            yield f"the model has {FEATURES[name]}, which {engine} does not support"
