"""This module reports, for training mode, how layers train and how much they keep for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastbert.diagnostics.explain.dry_run import Question, recorder_for
from fastbert.diagnostics.explain.model import backbone
from fastbert.models.encoder import EncoderModel
from fastbert.ops import recording

FLOAT32 = 4


def notes(question: Question) -> Iterator[str]:
    """Yields a report's notes on training, for a model in training mode."""
    bert = backbone(question.model)
    if not question.model.training:
        return
    obstacles = "; ".join(layer_obstacles(bert, question))
    if obstacles:
        yield f"training: operation by operation: {obstacles}"
        return
    per_token = kept_by_a_layer(bert, product_itemsize(question))
    hidden = bert.config.hidden_size
    yield (
        "training: each layer is one node of autograd, with kernels for both passes; for the backward pass it keeps "
        f"{per_token:,} bytes a token, {per_token / hidden:.1f} H" + _checkpointed(bert)
    )


def _checkpointed(bert: EncoderModel) -> str:
    if not bert.encoder.gradient_checkpointing:
        return ""
    every = bert.encoder.checkpointed_every
    return ", and with gradient checkpointing its input alone" + (f", in one layer of {every}" if every > 1 else "")


def layer_obstacles(bert: EncoderModel, question: Question) -> Iterator[str]:
    """Yields every reason why the layers would train operation by operation."""
    with torch.enable_grad():
        obstacles = list(bert.engine.training.obstacles(bert, None, False, False))
    if obstacles:
        yield from obstacles
        return  # layers with other modules have no `Block`
    dtype = torch.get_autocast_dtype(question.device.type) if _autocasts(question) else question.dtype
    with recording.recorded(recorder_for(question)):  # the GPU need not be present
        yield from bert.engine.training.kernel_obstacles(bert, question.policy, question.device, dtype)


def _autocasts(question: Question) -> bool:
    return torch.is_autocast_enabled(question.device.type)


def product_itemsize(question: Question) -> int:
    """Returns the bytes of a number in products. Autocast decides it if it is on."""
    if _autocasts(question):
        return torch.get_autocast_dtype(question.device.type).itemsize
    return question.dtype.itemsize


def kept_by_a_layer(bert: EncoderModel, itemsize: int) -> int:
    """Counts the bytes that a layer keeps for each token: see fastbert.ops.training.layer.

    These are 8 H + I numbers in the dtype of products, and float32 numbers: the sum of exponentials for each head, and
    mean and deviation of both norms.
    """
    config = bert.config
    numbers = 8 * config.hidden_size + config.intermediate_size
    return numbers * itemsize + (config.num_attention_heads + 4) * FLOAT32


def kept_by_a_batch(question: Question, n_tokens: int) -> int | None:
    """Counts the bytes that all layers keep for a batch; None if they do not train, or not as whole layers."""
    bert = backbone(question.model)
    if not question.model.training or next(layer_obstacles(bert, question), None) is not None:
        return None
    itemsize, layers = product_itemsize(question), bert.config.num_hidden_layers
    if bert.encoder.gradient_checkpointing:
        checkpointed = len(range(0, layers, bert.encoder.checkpointed_every))
        inputs = bert.config.hidden_size * itemsize * checkpointed
        whole = min(layers, layers - checkpointed + 1)  # One checkpointed layer at a time is computed again.
        return n_tokens * (inputs + whole * kept_by_a_layer(bert, itemsize))
    return n_tokens * layers * kept_by_a_layer(bert, itemsize)
