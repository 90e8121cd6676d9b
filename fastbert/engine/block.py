"""A layer of an encoder as data: engines, explain, verify and tune read it, and no other description of a layer exists.

Families differ in what a `Block` has beyond BERT's: an engine that lacks it names it as an obstacle.
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
        """The same linear with the function's results in the place of its tensors."""
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
        """The same norm with the function's results in the place of its tensors."""
        weight, bias = (None if t is None else function(t) for t in (self.weight, self.bias))
        return Norm(weight, bias, self.eps)

    def arguments(self) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and eps of a norm that has both, as kernels take them."""
        assert self.weight is not None and self.bias is not None
        return self.weight, self.bias, self.eps

    def filled(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, (H,) each: ones and zeros, as `like`, where it has none."""
        weight, bias, size = self.weight, self.bias, like.shape[-1]
        return (
            like.new_ones(size) if weight is None else weight,
            like.new_zeros(size) if bias is None else bias,
        )


@dataclass(frozen=True, eq=False)
class Convolution:
    """norm(y + activation(dropout(conv(x)))): x, what a layer reads, convolved over columns; y, what it gives.

    weight: (H, H / groups, k), k odd. bias: (H,). dropout: its probability in the present mode. product gives the
    convolution as a linear of the rows of k columns beside one another, (H, k * H), kept until it changes.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    norm: Norm
    activation: str
    dropout: float
    product: Callable[[], Linear]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Convolution:
        """The same convolution with the function's results in the place of its tensors."""
        product = self.product
        return replace(
            self, weight=function(self.weight), bias=function(self.bias), norm=self.norm.mapped(function),
            product=lambda: product().mapped(function),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Distances:
    """What disentangled attention has for distances in columns (fastbert.ops.disentangled).

    table: (2R, H), normalised by norm, if there is one. key, query: the linears that its rows go through, (H, H), or
    None for a term that is not there. buckets: how distances become rows. project gives the two products, kept until
    a weight changes.
    """

    table: Tensor
    norm: Norm | None
    key: Linear | None
    query: Linear | None
    buckets: tuple[int, int]
    project: Callable[[], Positions]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Distances:
        """The same with the function's results in the place of its tensors."""
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

    query, key, value, out: (H, H). up: (I, H). down: (H, I). fuse_qkv gives query, key and value as one linear,
    (3H, H), which is kept until one of them changes. attention_norm: None where attention reads what the layer before
    gave, as in ModernBERT's first. dropouts: the probabilities, in the present mode, for attention's probabilities, its
    output and the feed-forward part's output. gate: (I, H), whose product multiplies the activation's; fuse_up gives up
    and gate as one linear, (2I, H), up above, as fuse_qkv does. pre_norm: whether the norms are of what each part
    reads. rotary: the base of the angles. position_factor: by what their positions are divided. position_bias:
    (N, 2R + 1), what is added to the score of a key that stands -R to R columns after the query, and of those beyond
    (fastbert.ops.position_bias); all layers may share it. window: tokens on either side that attention reaches.
    last_norm: of the encoder's output, in its last layer. scale: of the scores, or None for 1 / sqrt(D). distances: of
    disentangled attention. convolution: what stands beside the layer. query_norm, key_norm: of all heads of a query or
    a key together, before attention. second_norm: of the rows after attention_norm and what the layer reads, added.
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
        """Both norms, of a layer that has two."""
        assert self.attention_norm is not None
        return self.attention_norm, self.output_norm

    def attention_norms(self) -> tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]:
        """Weight, bias and eps of the norms of queries and of keys, of a layer that has them."""
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
        """The same layer with the function's results in the place of its tensors."""
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
        """The matrix products of the layer by name: the linears that are multiplied as one. See `product_shapes`."""
        up = (self.up,) if self.gate is None else (self.up, self.gate)
        return {"qkv": (self.query, self.key, self.value), "out": (self.out,), "up": up, "down": (self.down,)}


def features_of(blocks: Sequence[Block]) -> list[str]:
    """Returns the names of FEATURES that some of the layers have."""
    names = {name for block in blocks for name in block.features()}
    return [name for name in FEATURES if name in names]


def product_shapes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, int]]:
    """The shapes (M, K) of the weights in `Block.products`, without a gate, for layers that are not built."""
    h, i = hidden_size, intermediate_size
    return {"qkv": (3 * h, h), "out": (h, h), "up": (i, h), "down": (h, i)}


def feature_obstacles(features: list[str], supported: frozenset[str], engine: str) -> Iterator[str]:
    """Why an engine does not run such layers, one reason for each feature that it lacks."""
    for name in features:
        if name not in supported:
            yield f"the model has {FEATURES[name]}, which {engine} does not support"
