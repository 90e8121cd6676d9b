"""The arithmetic with gradients runs each layer as one autograd node, whose kernels have a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.engine.block import Block, Linear, feature_obstacles
from fastbert.engine.interface import PackedInputs
from fastbert.engine.listeners import observer_obstacle
from fastbert.engine.state import EncoderState, first_parameter
from fastbert.ops import Policy, dropout, recording
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import rotations
from fastbert.ops.training import choose
from fastbert.ops.training.kernels import Attention, Kernels, Rotation
from fastbert.ops.training.layer import LayerParameters, LayerSettings, encoder_layer
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, INNER, OUTPUT, Dropout, site_of

# What layers may have beyond BERT's.
FEATURES = frozenset(("position_bias", "pre_norm", "gate", "rotary", "window", "scale", "distances"))


class Training:
    """This arithmetic runs layer by layer with gradients and dropout. state: the last seen state of the modules."""

    name = "layers with gradients"

    def __init__(self, state: EncoderState) -> None:
        self.state = state

    def wanted(self, model: Any, embedded: bool) -> bool:
        """Tells whether a batch may need gradients, or the model is in training mode (so that both passes agree)."""
        if torch.is_grad_enabled() and (embedded or any(p.requires_grad for p in model.parameters())):
            return True
        return bool(model.training)

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        device = first_parameter(model).device
        if not self.wanted(model, embedded):
            yield "no gradients are needed, and the model is in eval mode"
        if model.policy.batch_invariant:
            yield "batch_invariant: gradients and dropout depend on the whole batch"
        if model.precision is not None:
            yield f"precision={model.precision!r}"
        if model.__dict__.get("_is_replica", False):
            yield "the model is a replica of DataParallel"
        if recording.on and recording.is_on():
            yield "operations are recorded one by one"
        if (observer := observer_obstacle(device)) is not None:
            yield observer
        yield from self._module_obstacles(model)

    def kernel_obstacles(self, model: Any, policy: Policy, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
        """Yields every reason why no kernels have both passes for the layers. dtype: that of matrix products."""
        block = next(iter(model.blocks()), None)
        if block is not None and (obstacle := choose.obstacle(policy, device, dtype, **shape_of(block))) is not None:
            yield obstacle

    def _module_obstacles(self, model: Any) -> Iterator[str]:
        if not self.state.plain_layers(model):
            yield "a module of the encoder is an adapter, or has hooks or a forward of its own"
        elif not self.state.plain_parameters():
            yield "a parameter is not a plain tensor"
        else:
            features = self.state.layer_features(model) if self.state.features is None else self.state.features
            yield from feature_obstacles(features, FEATURES, "the arithmetic with gradients")

    def prepare(self, model: Any) -> None:
        """Does nothing, because weights change with every step."""

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor] | None:
        try:
            with choose.as_in_training():
                return self._run(model, model.embed(inputs, batch), batch, inputs.position_ids, keep_states)
        except RuntimeError as error:
            model.blame_dtypes(error)
            raise

    def _run(self, model: Any, x: Tensor, batch: PackedBatch, position_ids: Tensor, keep_states: bool) -> list[Tensor]:
        blocks = list(model.blocks())
        if not blocks:
            return [x]
        kernels = kernels_of(model, blocks[0], x)
        if kernels is None or not _one_dtype(blocks, x):
            return model.run_layers(x, batch, keep_states)
        states, rotations = [x], Rotations(position_ids)
        for i, block in enumerate(blocks):
            parameters, settings = parameters_of(block), settings_of(block, i, batch, kernels, x, rotations)
            if block.distances is not None:
                keys, queries, _ = block.distances.project()
                parameters = replace(parameters, position_keys=keys, position_queries=queries)
            recomputed = model.encoder.checkpoint_of(i)
            if recomputed is None:
                x = encoder_layer(x, parameters, settings)
            else:
                x = recomputed(encoder_layer, x, parameters, settings)
            states = [*states, x] if keep_states else [x]
        return states


def kernels_of(model: Any, block: Block, x: Tensor) -> Kernels | None:
    """Returns the passes for a model's layers on rows like x, or None if PyTorch runs them operation by operation."""
    return choose.kernels("encoder layer", model.policy, x.device, choose.product_dtype(x), **shape_of(block))


def shape_of(block: Block) -> dict[str, Any]:
    """Returns the sizes and settings of a layer for `choose.triton_obstacle`, by name."""
    return {
        "head_size": block.head_size,
        "sizes": (block.hidden_size, block.intermediate_size),
        "hidden_size": block.hidden_size,
        "activation": activation_of(block),
        "gated": block.gate is not None,
    }


def _one_dtype(blocks: list[Block], x: Tensor) -> bool:
    """Tells whether all parameters have x's dtype, or float32 under autocast; others raise PyTorch's own errors."""
    dtypes = {t.dtype for block in blocks for t in parameters_of(block).listed() if t is not None}
    return dtypes == {x.dtype}


def activation_of(block: Block) -> str:
    """Returns the kernels' name for a layer's activation."""
    return "silu" if block.gate is not None and block.activation == "swish" else block.activation


def parameters_of(block: Block) -> LayerParameters:
    """Returns the parameters of a layer in the order of its autograd node."""
    like = block.out.weight
    query, key, value = in_one((block.query, block.key, block.value))
    up, gate = in_one((block.up, block.gate or ABSENT))
    first, last = (ABSENT if n is None else Linear(*n.filled(like)) for n in (block.attention_norm, block.last_norm))
    return LayerParameters(
        query.weight, key.weight, value.weight, query.bias, key.bias, value.bias, block.out.weight, block.out.bias,
        first.weight, first.bias, up.weight, up.bias, block.down.weight, block.down.bias,
        *block.output_norm.filled(like), block.position_bias, gate.weight, gate.bias, last.weight, last.bias,
    )  # fmt: skip


ABSENT: Any = Linear(None, None)  # type: ignore[arg-type]


def in_one(linears: tuple[Linear, ...]) -> tuple[Any, ...]:
    """Returns the linears, or only the one linear of which they are views.

    Its gradient is then one tensor, and autograd does not join it from parts.
    """
    weight, bias = (whole(tuple(t)) for t in zip(*((each.weight, each.bias) for each in linears), strict=True))
    if weight is None or (bias is None and linears[0].bias is not None):
        return linears
    return Linear(weight, bias), *[ABSENT] * (len(linears) - 1)


def whole(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """Returns the parameter whose rows the parts are, in this order, or None."""
    base = None if parts[0] is None else parts[0]._base
    if not isinstance(base, nn.Parameter) or not all(part is not None and part._base is base for part in parts):
        return None
    if any(isinstance(part, nn.Parameter) for part in parts):
        return None
    sizes: list[int] = [part.numel() for part in parts]  # type: ignore[union-attr]
    offsets = [part.storage_offset() for part in parts]  # type: ignore[union-attr]
    expected = [base.storage_offset() + sum(sizes[:i]) for i in range(len(parts))]
    return base if base.is_contiguous() and offsets == expected and sum(sizes) == base.numel() else None


class Rotations:
    """A `Rotations` holds the angles of a batch's rows, for each base of the layers. position_ids: (T,) integers."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids
        self._made: dict[Any, Rotation] = {}

    def of(self, block: Block) -> Rotation | None:
        """Returns the angles of a layer, or None if it has no rotary positions."""
        if block.rotary is None:
            return None
        key = block.head_size, block.rotary, block.position_factor
        if key not in self._made:
            self._made[key] = Rotation(*(table.contiguous() for table in rotations(self.position_ids, *key)))
        return self._made[key]


def settings_of(
    block: Block, layer: int, batch: PackedBatch, kernels: Kernels, x: Tensor, angles: Rotations
) -> LayerSettings:
    """Returns the settings of a layer without its parameters. layer: its index, which its dropout masks depend on."""
    kinds, probabilities = (ATTENTION, ATTENTION_OUTPUT, OUTPUT, INNER), (*block.dropouts, block.inner_dropout)
    drops: list[Dropout | None] = [
        dropout.mask_of(dropout.of_batch(p, batch, site_of(layer, kind)))
        for p, kind in zip(probabilities, kinds, strict=True)
    ]
    scale, window = block.head_size**-0.5 if block.scale is None else block.scale, block.window
    if window is not None and batch.padded_length - 1 <= window:  # which is all of every text
        window = None
    columns = batch.columns if window is not None or block.position_bias is not None else None
    return LayerSettings(
        kernels=kernels,
        attention=Attention(batch, block.num_heads, scale, drops[0], columns, window),
        activation=activation_of(block),
        eps=(0.0 if block.attention_norm is None else block.attention_norm.eps, block.output_norm.eps),
        dropouts=(drops[1], drops[2]),
        dtype=choose.product_dtype(x),
        gated=block.gate is not None,
        inner_dropout=drops[3],
        rotation=angles.of(block),
        pre_norm=block.pre_norm,
        last_eps=0.0 if block.last_norm is None else block.last_norm.eps,
        buckets=None if block.distances is None else block.distances.buckets,
    )
