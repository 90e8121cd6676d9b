"""The layers of a model by kernels, launched one after the other, for which everything was checked once a batch.

An operation of `fastbert.ops` checks its arguments, asks who watches, chooses a backend, and goes through PyTorch's
dispatcher, which takes the host longer than to launch its kernel. In a model whose modules are its own, all answers are
the same in each layer. So they are asked once a batch (`LaunchedLayers.obstacles`), and what depends on the weights is
kept until a parameter changes. The kernels, and with them the bits, are those of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.engine.block import Block, Linear, feature_obstacles
from fastbert.engine.listeners import observer_obstacle
from fastbert.engine.state import GRADIENTS, EncoderState
from fastbert.ops import attention, attention_plan, dispatch, gelu, gemm, launched, recording, silent_writes
from fastbert.ops.launched import Product
from fastbert.ops.packing import PackedBatch
from fastbert.ops.training.choose import IN_TRAINING

FEATURES: frozenset[str] = frozenset()  # What layers may have beyond BERT's.
ATTENTIONS = "attentions"  # The plan of a batch whose attention weights are kept.
OUTPUT = "output"  # The plan of a batch that says where its last hidden state goes: (T, H), contiguous.

Normalize = tuple[Tensor, Tensor, float]  # weight (H,), bias (H,) and eps


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as kernels read it."""

    qkv: Product
    out: Product
    attention_norm: Normalize
    up: Product
    down: Product
    output_norm: Normalize
    num_heads: int
    scale: float

    def run(self, x: Tensor, batch: PackedBatch, plan: attention_plan.Plan, out: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), written to `out` where it is given."""
        qkv = launched.linear_activation(x, self.qkv)
        context = launched.varlen_attention(qkv, batch, plan, self.num_heads, self.scale)
        x = launched.linear_residual_layer_norm(context, self.out, x, *self.attention_norm)
        inner = launched.linear_activation(x, self.up)
        return launched.linear_residual_layer_norm(inner, self.down, x, *self.output_norm, out=out)


class LaunchedLayers:
    """The layers of one model, kept until a parameter, the policy or a table of block sizes changes."""

    def __init__(self) -> None:
        self._kept: tuple[Any, list[Layer] | None] = None, None

    def clear(self) -> None:
        """Lets the weights go."""
        self._kept = None, None

    def run(self, model: Any, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor] | None:
        """The hidden states before the first layer and after each, or the last; None where the modules must be called.

        x: (T, H), the input of the first layer.
        """
        if torch.compiler.is_compiling() or next(self.obstacles(model, x, batch), None) is not None:
            return None
        layers = self._layers(model, x)
        if layers is None:
            return None
        plan = attention_plan.triton_plan(batch, x.dtype, model.config.head_size, model.policy)
        states, last = [x], len(layers) - 1
        for i, layer in enumerate(layers):
            x = layer.run(x, batch, plan, batch.known_plan(OUTPUT) if i == last and not keep_states else None)
            states = [*states, x] if keep_states else [x]
        return states

    def obstacles(self, model: Any, x: Tensor, batch: PackedBatch) -> Iterator[str]:
        """Every reason why each operation must be asked for itself, on this batch."""
        if torch.is_grad_enabled():
            yield GRADIENTS
        if IN_TRAINING.get():
            yield "a pass of training runs again"
        if recording.on:
            yield "operations are recorded one by one"
        if batch.valid is not None or batch.has_plan(ATTENTIONS):
            yield "attention is plain PyTorch's"
        obstacle = attention.triton_obstacle(model.config.head_size, x) or dispatch.hidden_size_obstacle(x.shape[1])
        decision = dispatch.decide("attention", model.policy, x.device, obstacle)
        if decision.backend != "triton":
            yield decision.reason or f"the backend is {decision.backend!r}"
        plain = True
        for obstacle in model.engine.state.obstacles(model, x.device, batch.has_plan(OUTPUT)):
            plain = False
            yield obstacle
        if plain:
            state: EncoderState = model.engine.state
            features = state.layer_features(model) if state.features is None else state.features
            yield from feature_obstacles(features, FEATURES, "the layers by kernels")

    def _layers(self, model: Any, x: Tensor) -> list[Layer] | None:
        """The layers, made anew where something has changed; None where a weight is not as the kernels want it."""
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


def made(model: Any, x: Tensor) -> list[Layer] | None:
    """The layers of a model whose modules are its own; None where not all weights suit kernels and rows like x."""
    if not model.engine.state.plain_parameters():
        return None
    layers = []
    for block in model.blocks():
        if not _fits(block, x) or gelu.activation_obstacle(block.activation) is not None:
            return None
        layers.append(_layer(block, x, model.policy))
    return layers


def _layer(block: Block, x: Tensor, policy: Any) -> Layer:
    def product(linear: Linear, activation: str = "none", residual: bool = False) -> Product:
        n_cols, k_size = linear.weight.shape
        choice = x.device, policy.backend, policy.batch_invariant, None
        ours = gemm.takes_our_gemm(x.dtype, activation, k_size, n_cols, residual, *choice)
        assert linear.bias is not None
        return Product(linear.weight, linear.bias, activation, ours)

    return Layer(
        product(block.fuse_qkv()), product(block.out, residual=True), block.norms[0].arguments(),
        product(block.up, block.activation), product(block.down, residual=True), block.output_norm.arguments(),
        block.num_heads, block.head_size**-0.5,
    )  # fmt: skip


def _fits(block: Block, x: Tensor) -> bool:
    """Tells whether all weights are there, of x's dtype, on its device, and of sizes that belong together."""
    h, i = x.shape[1], block.intermediate_size
    square = block.query, block.key, block.value, block.out
    wanted: list[tuple[Tensor | None, tuple[int, ...]]] = [
        *((linear.weight, (h, h)) for linear in square),
        (block.up.weight, (i, h)),
        (block.down.weight, (h, i)),
        (block.up.bias, (i,)),
        *((linear.bias, (h,)) for linear in (*square, block.down)),
        *((t, (h,)) for norm in block.norms for t in (norm.weight, norm.bias)),
    ]
    return all(
        t is not None and t.shape == shape and t.dtype == x.dtype and t.device == x.device for t, shape in wanted
    )
