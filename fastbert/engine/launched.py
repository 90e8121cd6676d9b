"""This module launches the kernels of a model's layers one after the other, with one set of checks for each batch.

An operation of `fastbert.ops` checks its arguments and observers, chooses a backend, and goes through PyTorch's
dispatcher. On the host this takes longer than the kernel launch. In a model with its own modules, the checks have the
same result in each layer. So they run once a batch (`LaunchedLayers.obstacles`), and the values that depend on weights
are kept until a parameter changes. The kernels, and so the bits, are those of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.engine import layer_forms as forms
from fastbert.engine.block import Block, Linear, Norm, feature_obstacles
from fastbert.engine.listeners import observer_obstacle
from fastbert.engine.state import GRADIENTS, EncoderState
from fastbert.ops import attention, attention_plan, dispatch, gelu, gemm, recording, silent_writes
from fastbert.ops.gated import triton_obstacle as gate_obstacle
from fastbert.ops.gated_linear import takes as takes_gate
from fastbert.ops.launched import Product
from fastbert.ops.linear import splits as splits_k
from fastbert.ops.packing import PackedBatch
from fastbert.ops.training.choose import IN_TRAINING

# What layers may have beyond BERT's.
FEATURES = frozenset(
    ("pre_norm", "gate", "rotary", "position_bias", "window", "scale", "distances", "convolution", "query_norm",
     "second_norm")
)  # fmt: skip
ATTENTIONS = "attentions"  # The plan of a batch whose attention weights are kept.
Stack = forms.PostNormStack | forms.PreNormStack


class LaunchedLayers:
    """This class keeps the layers of one model until a parameter, the policy or a table of block sizes changes."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Stack | None] = None, None

    def clear(self) -> None:
        """Drops the weights."""
        self._kept = None, None

    def run(self, model: Any, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor] | None:
        """Returns the hidden states before the first layer and after each, or the last; None if modules must be called.

        x: (T, H), the input of the first layer.
        """
        if torch.compiler.is_compiling() or next(self.obstacles(model, x, batch), None) is not None:
            return None
        layers = self._layers(model, x)
        if layers is None:
            return None
        plan = attention_plan.triton_plan(batch, x.dtype, model.config.head_size, model.policy)
        return layers.run(x, batch, plan, keep_states)

    def obstacles(self, model: Any, x: Tensor, batch: PackedBatch) -> Iterator[str]:
        """Yields every reason why each operation must make its own checks, for this batch."""
        if torch.is_grad_enabled():
            yield GRADIENTS
        if IN_TRAINING.get():
            yield "a training pass is recomputed"
        if recording.on:
            yield "operations are recorded one by one"
        if batch.valid is not None or batch.has_plan(ATTENTIONS):
            yield "attention is plain PyTorch's"
        obstacle = attention.triton_obstacle(model.config.head_size, x) or dispatch.hidden_size_obstacle(x.shape[1])
        decision = dispatch.decide("attention", model.policy, x.device, obstacle)
        if decision.backend != "triton":
            yield decision.reason or f"the backend is {decision.backend!r}"
        plain = True
        for obstacle in model.engine.state.obstacles(model, x.device, batch.has_plan(forms.OUTPUT)):
            plain = False
            yield obstacle
        if plain:
            state: EncoderState = model.engine.state
            features = state.layer_features(model) if state.features is None else state.features
            yield from feature_obstacles(features, FEATURES, "the layers by kernels")

    def _layers(self, model: Any, x: Tensor) -> Stack | None:
        """Returns the layers, made again after a change; None if a weight does not suit the kernels."""
        from fastbert_kernels import launch, tables

        snapshot = model.engine.state.snapshot
        state = snapshot.state()
        # On a GPU a look at numbers waits: there the model looks, once for many batches.
        n_silent_writes = 0 if silent_writes.waits(x.device) else snapshot.silent_writes(state)
        weights = snapshot, state, snapshot.changes(), n_silent_writes, silent_writes.signs()
        choices = model.policy, x.dtype, x.device, launch.arch(x.device), tables.generation
        key, kept = (weights, choices), self._kept
        if key != kept[0]:
            if observer_obstacle(x.device) is not None:
                return None  # what is derived in a capture is there when the graph has run
            # Under what was read before the weights were: what changes meanwhile is looked at the next time.
            self._kept = kept = key, made(model, x)
        return kept[1]


def made(model: Any, x: Tensor) -> Stack | None:
    """Makes the layers of a model with its own modules; None if a weight does not suit kernels and rows like x."""
    if not model.engine.state.plain_parameters():
        return None
    blocks = list(model.blocks())
    if not all(_fits(block, x) for block in blocks):
        return None
    maker = _Maker(x, model.policy)
    if not any(block.pre_norm for block in blocks):
        return forms.PostNormStack([maker.post_norm(block) for block in blocks])
    if not all(block.pre_norm and block.convolution is None for block in blocks):
        return None
    last = blocks[-1].last_norm
    return forms.PreNormStack([maker.pre_norm(block) for block in blocks], None if last is None else _norm(last))


class _Maker:
    """A `_Maker` makes forms of layers from `Block`s, for rows like x."""

    def __init__(self, x: Tensor, policy: Any) -> None:
        self.x, self.policy = x, policy

    def product(self, of: Linear, activation: str = "none", residual: bool = False) -> Product:
        """Returns a linear with its chosen GEMM. residual: whether its operation has a residual and a LayerNorm."""
        n_cols, k_size = of.weight.shape
        policy = self.policy
        choice = self.x.device, policy.backend, policy.batch_invariant, None
        ours = gemm.takes_our_gemm(self.x.dtype, activation, k_size, n_cols, residual, *choice)
        splits = residual and splits_k(self.x, of.weight, policy)
        return Product(of.weight, of.bias, activation, ours, not policy.batch_invariant, splits)

    def join(self, of: Linear, norm: Norm, joins: bool) -> forms.Join:
        """Returns a product with its residual and a norm. joins: whether one operation of the modules has all three."""
        join = forms.Joined if joins else forms.MultipliedThenNormed
        return join(self.product(of, residual=joins), norm.arguments())

    def post_norm(self, block: Block) -> forms.PostNorm:
        assert block.attention_norm is not None
        joins = block.rotary is None
        out = self.join(block.out, block.attention_norm, joins)
        if block.second_norm is not None:
            out = forms.JoinedTwice(out, block.second_norm.arguments())
            joins = False  # the feed-forward module of such layers ends with its product
        layer = forms.PostNormLayer(
            self.product(block.fuse_qkv()),
            self.attention(block),
            out,
            self.feed(block),
            self.join(block.down, block.output_norm, joins),
        )
        return layer if block.convolution is None else self.convolved(block, layer)

    def convolved(self, block: Block, layer: forms.PostNorm) -> forms.PostNorm:
        """Returns the layer with its parallel convolution."""
        beside = block.convolution
        assert beside is not None
        size, norm = beside.weight.shape[-1], beside.norm.arguments()
        return forms.ConvolvedLayer(layer, self.product(beside.product()), size, beside.activation, norm)

    def pre_norm(self, block: Block) -> forms.PreNormLayer:
        before = None if block.attention_norm is None else _norm(block.attention_norm)
        return forms.PreNormLayer(
            before, self.product(block.fuse_qkv()), self.attention(block), self.product(block.out),
            _norm(block.output_norm), self.feed(block), self.product(block.down),
        )  # fmt: skip

    def attention(self, block: Block) -> forms.Attention:
        """Returns the form between the first two products of a layer."""
        heads = block.num_heads
        scale = block.head_size**-0.5 if block.scale is None else block.scale
        form: forms.Attention
        if block.distances is not None:
            positions = block.distances.project()
            form = forms.DisentangledAttention(heads, scale, positions, self.policy.batch_invariant)
        elif block.position_bias is not None:
            form = forms.BiasedAttention(heads, scale, block.position_bias)
        elif block.window is not None:
            form = forms.WindowedAttention(heads, scale, block.window)
        else:
            form = forms.PlainAttention(heads, scale)
        if block.query_norm is not None:
            return forms.NormedAttention(form, *block.attention_norms())
        if block.rotary is None:
            return form
        return forms.TurnedAttention(form, heads, (block.head_size, block.rotary, block.position_factor))

    def feed(self, block: Block) -> forms.Feed:
        """Returns the form before the last product of a layer."""
        if block.fuse_up is None:
            return forms.Activated(self.product(block.up, block.activation))
        up, policy = block.fuse_up(), self.policy
        if takes_gate(self.x.dtype, up.weight, self.x.device, policy):
            return forms.GatedAtOnce(Product(up.weight, up.bias, block.activation, True, not policy.batch_invariant))
        return forms.Gated(self.product(up), block.activation)


def _norm(norm: Norm) -> forms.PreNormalize:
    assert norm.weight is not None
    return norm.weight, norm.bias, norm.eps


def _fits(block: Block, x: Tensor) -> bool:
    """Tells whether all weights exist, with the dtype and device of x, and with matching sizes.

    If a bias of the family's modules is missing, the modules are called.
    """
    if gate_obstacle(x, block.activation) if block.gate else gelu.activation_obstacle(block.activation):
        return False
    h, i = x.shape[1], block.intermediate_size
    square = block.query, block.key, block.value, block.out
    wanted: list[tuple[Tensor | None, tuple[int, ...]]] = [
        *((part.weight, (h, h)) for part in square),
        (block.down.weight, (h, i)),
    ]
    biases: list[tuple[Tensor | None, tuple[int, ...]]] = [(part.bias, (h,)) for part in (*square, block.down)]
    if block.fuse_up is None:
        wanted.append((block.up.weight, (i, h)))
        biases.append((block.up.bias, (i,)))
    else:
        up = block.fuse_up()
        wanted.append((up.weight, (2 * i, h)))
        wanted += [] if up.bias is None else [(up.bias, (2 * i,))]
    of_queries = block.query_norm, block.key_norm
    if of_queries != (None, None) and (None in of_queries or block.rotary is not None or block.pre_norm):
        return False
    norms = [norm for norm in (block.attention_norm, block.output_norm, block.last_norm) if norm is not None]
    norms += [norm for norm in (*of_queries, block.second_norm) if norm is not None]
    wanted += [(norm.weight, (h,)) for norm in norms]
    if block.pre_norm:
        biases += [(norm.bias, (h,)) for norm in norms]
    else:
        wanted += [(norm.bias, (h,)) for norm in norms]
        if block.attention_norm is None or block.last_norm is not None:
            return False
    # Families with rotary positions have linears and norms without biases.
    wanted += biases if block.rotary is None else [bias for bias in biases if bias[0] is not None]
    if block.position_bias is not None and (block.window is not None or block.distances is not None):
        return False
    if block.distances is not None:
        wanted += [(part, (part.shape[0], h)) for part in block.distances.project()[:2] if part is not None]
    beside = block.convolution
    if beside is not None:
        if gelu.activation_obstacle(beside.activation) is not None or beside.activation == "none":
            return False
        wanted += [(beside.bias, (h,)), (beside.norm.weight, (h,)), (beside.norm.bias, (h,))]
        wanted.append((beside.product().weight, (h, beside.weight.shape[-1] * h)))
    return all(
        t is not None and t.shape == shape and t.dtype == x.dtype and t.device == x.device for t, shape in wanted
    )
