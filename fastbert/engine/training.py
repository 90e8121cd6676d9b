"""The arithmetic with gradients: each layer is one node of autograd, whose kernels have a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.engine.block import Block, feature_obstacles
from fastbert.engine.interface import PackedInputs
from fastbert.engine.listeners import observer_obstacle
from fastbert.engine.state import EncoderState, first_parameter
from fastbert.ops import Policy, dropout, recording
from fastbert.ops.packing import PackedBatch
from fastbert.ops.training import choose
from fastbert.ops.training.kernels import Attention, Kernels
from fastbert.ops.training.layer import LayerParameters, LayerSettings, encoder_layer
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, OUTPUT, Dropout, site_of

FEATURES = frozenset(("position_bias",))  # What layers may have beyond BERT's.


class Training:
    """Layer by layer with gradients and dropout. state: the model's modules as they were last seen."""

    name = "layers with gradients"

    def __init__(self, state: EncoderState) -> None:
        self.state = state

    def wanted(self, model: Any, embedded: bool) -> bool:
        """Tells whether a batch may need gradients, or the model trains, whose passes without gradients agree then."""
        if torch.is_grad_enabled() and (embedded or any(p.requires_grad for p in model.parameters())):
            return True
        return bool(model.training)

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        device = first_parameter(model).device
        if not self.wanted(model, embedded):
            yield "no gradients are wanted, and the model is in eval mode"
        if model.policy.batch_invariant:
            yield "batch_invariant: gradients and dropout go through a whole batch"
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
        """Every reason why no kernels have both passes of this model's layers. dtype: of products."""
        block = next(iter(model.blocks()), None)
        if block is not None and (obstacle := choose.obstacle(policy, device, dtype, **shape_of(block))) is not None:
            yield obstacle

    def _module_obstacles(self, model: Any) -> Iterator[str]:
        if not self.state.plain_layers(model):
            yield "a module of the encoder is an adapter, or has hooks or a forward of its own"
        elif not self.state.plain_parameters():
            yield "a parameter is a tensor of another kind"
        else:
            features = self.state.layer_features(model) if self.state.features is None else self.state.features
            yield from feature_obstacles(features, FEATURES, "the arithmetic with gradients")

    def prepare(self, model: Any) -> None:
        """Makes nothing: weights change with every step."""

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor] | None:
        try:
            with choose.as_in_training():
                return self._run(model, model.embed(inputs, batch), batch, keep_states)
        except RuntimeError as error:
            model.blame_dtypes(error)
            raise

    def _run(self, model: Any, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor]:
        blocks = list(model.blocks())
        if not blocks:
            return [x]
        kernels = kernels_of(model, blocks[0], x)
        if kernels is None or not _one_dtype(blocks, x):
            return model.run_layers(x, batch, keep_states)
        states = [x]
        for i, block in enumerate(blocks):
            parameters, settings = parameters_of(block), settings_of(block, i, batch, kernels, x)
            recomputed = model.encoder.checkpoint_of(i)
            if recomputed is None:
                x = encoder_layer(x, parameters, settings)
            else:
                x = recomputed(encoder_layer, x, parameters, settings)
            states = [*states, x] if keep_states else [x]
        return states


def kernels_of(model: Any, block: Block, x: Tensor) -> Kernels | None:
    """The passes that run a model's layers on rows like x, or None where PyTorch runs them operation by operation."""
    return choose.kernels("encoder layer", model.policy, x.device, choose.product_dtype(x), **shape_of(block))


def shape_of(block: Block) -> dict[str, Any]:
    """What kernels want to know of a layer, by the names of `choose.triton_obstacle`."""
    return {
        "head_size": block.head_size,
        "sizes": (block.hidden_size, block.intermediate_size),
        "hidden_size": block.hidden_size,
        "activation": block.activation,
    }


def _one_dtype(blocks: list[Block], x: Tensor) -> bool:
    """Tells whether all parameters are of x's dtype, or float32 under autocast: others raise PyTorch's own errors."""
    dtypes = {t.dtype for block in blocks for t in parameters_of(block).listed() if t is not None}
    return dtypes == {x.dtype}


def parameters_of(block: Block) -> LayerParameters:
    """The parameters of a layer in the order of its node of autograd."""
    first, last = block.norms
    like = block.out.weight
    return LayerParameters(
        block.query.weight, block.key.weight, block.value.weight,
        block.query.bias, block.key.bias, block.value.bias,
        block.out.weight, block.out.bias, *first.filled(like),
        block.up.weight, block.up.bias, block.down.weight, block.down.bias, *last.filled(like), block.position_bias,
    )  # fmt: skip


def settings_of(block: Block, layer: int, batch: PackedBatch, kernels: Kernels, x: Tensor) -> LayerSettings:
    """What a layer is beside its parameters. layer: its place, which its masks depend on."""
    kinds = ATTENTION, ATTENTION_OUTPUT, OUTPUT
    drops: list[Dropout | None] = [
        dropout.mask_of(dropout.of_batch(p, batch, site_of(layer, kind)))
        for p, kind in zip(block.dropouts, kinds, strict=True)
    ]
    return LayerSettings(
        kernels=kernels,
        attention=Attention(batch, block.num_heads, block.head_size**-0.5, drops[0], batch.columns),
        activation=block.activation,
        eps=(block.norms[0].eps, block.output_norm.eps),
        dropouts=(drops[1], drops[2]),
        dtype=choose.product_dtype(x),
    )
