"""The encoder of MPNet as the reference computes it, on padded (B, S) inputs.

It is BERT's, without token types, but for attention: to each score comes a number that depends on the head and on how
many columns lie between the query and the key. All layers share these numbers. Source: Song et al., "MPNet: Masked and
Permuted Pre-training for Language Understanding", 2020, arXiv:2004.09297; the buckets are those of Raffel et al.,
"T5", 2019, arXiv:1910.10683.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.reference.bert import BertReference, activation_of, default_positions, valid_tokens
from fastbert.reference.dropout import (
    ATTENTION_OUTPUT,
    EMBEDDINGS,
    OUTPUT,
    PROBABILITIES,
    Dropout,
    drop_probabilities,
    drop_rows,
)
from fastbert.reference.ops import embedding_layer_norm, layer_norm, linear

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig

N_BUCKETS, MAX_DISTANCE = 32, 128


def relative_position_bucket(distance: int) -> int:
    """The row of the table of biases for a key that stands `distance` columns after the query.

    Half of the 32 buckets are for keys behind the query. The first 8 of a half are a distance each; the others grow
    with its logarithm, and from 91 columns on there is one. The logarithm is taken in float32, as in transformers.
    """
    half = N_BUCKETS // 2
    exact, start, n = half // 2, half if distance > 0 else 0, abs(distance)
    if n < exact:
        return start + n
    log = torch.log(torch.tensor(float(n)) / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    return start + min(exact + int(log), half - 1)


def mpnet(
    params: Mapping[str, Tensor],
    config: BertConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
    output_attentions: bool = True,
    dropout_seed: int | None = None,
) -> BertReference:
    """The MPNet encoder. Arguments, result and errors are those of `bert`; token_type_ids have no table.

    `params` maps the names of fastbert.models.mpnet, which are those of transformers' MPNet. A column is a place in the
    padded row, whatever the mask and position_ids say.
    """

    def p(name: str) -> Tensor:
        return params[prefix + name].to(dtype)

    def dense(name: str, x: Tensor, activation: str | None = None) -> Tensor:
        return linear(x, p(f"{name}.weight"), p(f"{name}.bias"), activation)

    def drop(p: float, site: int) -> Dropout | None:
        return None if dropout_seed is None else Dropout(p, dropout_seed, site)

    def add_norm(name: str, x: Tensor, residual: Tensor, site: int) -> Tensor:
        norm, x = f"{name}.LayerNorm", drop_rows(x, drop(config.hidden_dropout_prob, site), row)
        return layer_norm(x + residual, p(f"{norm}.weight"), p(f"{norm}.bias"), config.layer_norm_eps)

    activation = activation_of(config)
    valid = valid_tokens(input_ids, inputs_embeds, attention_mask)  # (B, S)
    padding = ~valid[:, :, None]  # (B, S, 1)
    both_valid = valid[:, None, :, None] & valid[:, None, None, :]  # (B, 1, S, S): query, key
    row = (valid.flatten().cumsum(0) - 1).clamp(min=0).view(valid.shape)  # among all tokens, for masks of dropout
    place = (valid.cumsum(1) - 1).clamp(min=0)  # within the sequence
    length = valid.shape[1]

    if position_ids is None:
        position_ids = default_positions(config, input_ids, valid.shape, valid.device)
    x = embedding_layer_norm(
        None if input_ids is None else input_ids.masked_fill(~valid, 0),
        None,
        position_ids.expand_as(valid).masked_fill(~valid, 0),
        p("embeddings.word_embeddings.weight"),
        p("embeddings.position_embeddings.weight"),
        None,
        p("embeddings.LayerNorm.weight"),
        p("embeddings.LayerNorm.bias"),
        config.layer_norm_eps,
        None if inputs_embeds is None else inputs_embeds.to(dtype).masked_fill(padding, 0),
    )
    x = drop_rows(x, drop(config.hidden_dropout_prob, EMBEDDINGS), row).masked_fill(padding, 0)

    # bias[n, i, j] for query i and key j
    buckets = [[relative_position_bucket(j - i) for j in range(length)] for i in range(length)]
    index = torch.tensor(buckets, dtype=torch.long, device=valid.device).view(length, length)
    bias = p("encoder.relative_attention_bias.weight")[index].permute(2, 0, 1)  # (N, S, S)

    hidden_states, attentions = [x], []
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            dense(f"{layer}.attention.attn.{name}", x).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for name in ("q", "k", "v")
        )  # (B, N, S, D)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        # The lowest finite number, not -inf: a query at padding has no valid key, and its softmax stays finite so.
        scores = scores.masked_fill(~both_valid, torch.finfo(dtype).min)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(~both_valid, 0)
        dropped = drop(config.attention_probs_dropout_prob, 4 * i + PROBABILITIES)
        probabilities = drop_probabilities(probabilities, dropped, row, place)
        context = (probabilities @ v).transpose(1, 2).flatten(2)  # (B, S, H)
        x = add_norm(f"{layer}.attention", dense(f"{layer}.attention.attn.o", context), x, 4 * i + ATTENTION_OUTPUT)
        inner = dense(f"{layer}.intermediate.dense", x, activation)  # (B, S, I)
        x = add_norm(f"{layer}.output", dense(f"{layer}.output.dense", inner), x, 4 * i + OUTPUT)
        x = x.masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)

    pooled = None
    if f"{prefix}pooler.dense.weight" in params:
        is_first = valid & (valid.cumsum(dim=1) == 1)
        first = x.masked_fill(~is_first[:, :, None], 0).sum(dim=1)  # (B, H)
        pooled = torch.tanh(dense("pooler.dense", first))
    return BertReference(x, pooled, tuple(hidden_states), tuple(attentions))
