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

from fastbert.reference.bert import (
    BertReference,
    Parameters,
    activation_of,
    attend,
    default_positions,
    rows_of,
    valid_tokens,
)
from fastbert.reference.dropout import ATTENTION_OUTPUT, EMBEDDINGS, OUTPUT
from fastbert.reference.ops import embedding_layer_norm

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

    activation = activation_of(config)
    valid = valid_tokens(input_ids, inputs_embeds, attention_mask)  # (B, S)
    padding = ~valid[:, :, None]  # (B, S, 1)
    p = Parameters(params, config, prefix, dtype, dropout_seed, rows_of(valid))
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
    x = p.drop(x, EMBEDDINGS).masked_fill(padding, 0)

    # bias[n, i, j] for query i and key j
    buckets = [[relative_position_bucket(j - i) for j in range(length)] for i in range(length)]
    index = torch.tensor(buckets, dtype=torch.long, device=valid.device).view(length, length)
    bias = p("encoder.relative_attention_bias.weight")[index].permute(2, 0, 1)  # (N, S, S)

    hidden_states, attentions = [x], []
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (p.heads(f"{layer}.attention.attn.{name}", x) for name in ("q", "k", "v"))
        context, probabilities = attend(p, q, k, v, valid, i, bias)
        x = p.add_norm(f"{layer}.attention", p.dense(f"{layer}.attention.attn.o", context), x, 4 * i + ATTENTION_OUTPUT)
        inner = p.dense(f"{layer}.intermediate.dense", x, activation)  # (B, S, I)
        x = p.add_norm(f"{layer}.output", p.dense(f"{layer}.output.dense", inner), x, 4 * i + OUTPUT)
        x = x.masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)

    return BertReference(x, p.pooled(x, valid), tuple(hidden_states), tuple(attentions))
