"""Encoders with rotary positions share these embeddings, and parts without bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.engine.listeners import is_bare
from fastbert.models.modules import call_dropout, call_module, dense, is_plain
from fastbert.ops import Policy, dispatch, embedding, recording, tracing
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import EMBEDDINGS

PARTS_OBSTACLE = "the Triton kernel embeds and normalises at once, and a part of that has hooks"


def embed(
    module: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    embeds: Tensor | None,
    policy: Policy,
    batch: Any,
) -> Tensor:
    """dropout(LayerNorm(word + token type)), (T, H). Ids: (T,). embeds: (T, H), instead of words, or None.

    module: has word_embeddings, token_type_embeddings, which may be None, LayerNorm and dropout.
    """
    types, norm = module.token_type_embeddings, module.LayerNorm
    first: Any = input_ids if embeds is None else embeds
    obstacle = _kernel_obstacle(module, embeds)
    if types is not None and token_type_ids is None:
        token_type_ids = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
    if dispatch.decide("embedding", policy, first.device, obstacle).backend == "triton":
        words, dropout = module.word_embeddings, module.dropout
        drawn = is_bare(dropout, nn.Dropout)
        x = ops.embedding_layer_norm(
            input_ids if embeds is None else None, None if types is None else token_type_ids, None, words.weight,
            None if types is None else types.weight, None, norm.weight, norm.bias, norm.eps, inputs_embeds=embeds,
            padding_idx=words.padding_idx if embeds is None else None, policy=policy,
            dropout=ops.dropout_of(dropout.p if dropout.training else 0.0, batch, EMBEDDINGS) if drawn else None,
        )  # fmt: skip
        return x if drawn else call_dropout(dropout, x, batch, EMBEDDINGS)
    x = look_up(module.word_embeddings, input_ids, policy, batch, obstacle) if embeds is None else embeds
    if types is not None:
        x = x + look_up(types, token_type_ids, policy, batch, obstacle)
    x = normalise(norm, x, policy, batch)
    return call_dropout(module.dropout, x, batch, EMBEDDINGS)


def embeds_in_kernel(module: Any, policy: Policy) -> bool:
    """Tells whether the Triton kernel computes such embeddings from ids; it can note ids outside of their table."""
    weight = module.word_embeddings.weight if is_bare(module.word_embeddings, nn.Embedding) else None
    if weight is None:
        return False
    return dispatch.decide("embedding", policy, weight.device, _kernel_obstacle(module, None)).backend == "triton"


def _kernel_obstacle(module: Any, embeds: Tensor | None) -> str | None:
    """Returns the reason why the triton backend does not compute the embeddings in one kernel, or None."""
    words, types, norm = module.word_embeddings, module.token_type_embeddings, module.LayerNorm
    tables = [table for table in (words, types) if table is not None]
    if not all(is_bare(table, nn.Embedding) for table in tables):
        return PARTS_OBSTACLE
    if not is_bare(norm, nn.LayerNorm) or norm.weight is None:
        return PARTS_OBSTACLE
    rows = words.weight if embeds is None else embeds
    tensors = rows, None if types is None else types.weight, norm.weight, norm.bias
    return embedding.triton_obstacle(rows.shape[1], *tensors)


def look_up(
    words: nn.Module, ids: Any, policy: Policy, batch: PackedBatch | None, obstacle: str | None = PARTS_OBSTACLE
) -> Tensor:
    """Returns words(ids), with only this table: (T,) -> (T, H). obstacle: the reason why no Triton kernel does this."""
    if not is_bare(words, nn.Embedding):
        return call_module(words, ids, policy, batch)
    weight: Any = words.weight
    backend = dispatch.choose("embedding", policy.backend, policy.strict, weight.device, obstacle)
    if recording.on:
        shape = ids.shape[0], weight.shape[1]
        if recording.note("embedding", backend, None, shape, weight.dtype, weight):
            return recording.stand_in(shape, weight.dtype)
    return nn.functional.embedding(ids, weight, words.padding_idx)  # type: ignore[arg-type]


def project_and_gate(
    linear: nn.Module, x: Tensor, activation: str, policy: Policy, batch: PackedBatch | None
) -> Tensor:
    """activation(first half) * second half of linear(x), in one operation if there are no hooks. (T, K) -> (T, I)"""
    if is_bare(linear, nn.Linear):
        weight: Any = linear.weight
        if type(weight) in tracing.PLAIN:
            keep = not linear.training
            return ops.gated_linear(x, weight, linear.bias, activation, policy=policy, keep=keep)  # type: ignore[arg-type]
    return ops.gated(project(linear, x, policy, batch), activation, policy=policy)


def project(
    linear: nn.Module, x: Tensor, policy: Policy, batch: PackedBatch | None, activation: str = "none"
) -> Tensor:
    """activation(linear(x)), as `modules.dense`, for linears that may lack a bias. (T, K) -> (T, M)"""
    if is_bare(linear, nn.Linear) and not is_plain(linear):
        weight: Any = linear.weight
        if type(weight) in tracing.PLAIN:
            return ops.linear(x, weight, linear.bias, activation, policy=policy, keep=not linear.training)  # type: ignore[arg-type]
    return dense(linear, x, policy, activation, batch)


def normalise(norm: nn.Module, x: Tensor, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """norm(x), for norms that may lack a bias, or be nn.Identity. (T, H) -> (T, H)"""
    if is_bare(norm, nn.Identity):
        return x
    if not is_bare(norm, nn.LayerNorm) or norm.weight is None:
        return call_module(norm, x, policy, batch)
    weight: Any = norm.weight
    return ops.bias_residual_layer_norm(x, None, None, weight, norm.bias, norm.eps, policy=policy)  # type: ignore[arg-type]
