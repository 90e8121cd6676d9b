"""The encoder of Jina's BERT, version 2, as the reference computes it, on padded (B, S) inputs.

It is BERT's without a table of positions. From each score, a slope of the head times the number of columns between the
query and the key is taken, on both sides alike. The feed-forward part multiplies an activated half of its rows with the
other half. Sources: Günther et al., "Jina Embeddings 2", 2023, arXiv:2310.19923; Press et al., "Train Short, Test
Long", 2022, arXiv:2108.12409; Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.reference.bert import BertReference, Parameters, attend, rows_of, valid_tokens
from fastbert.reference.dropout import ATTENTION_OUTPUT
from fastbert.reference.ops import linear

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig


def head_slopes(n: int) -> list[float]:
    """The slope of each of n heads: a geometric series from 2^(-8 / n) with that ratio, for powers of two."""
    if math.log2(n).is_integer():
        return [2 ** (-8 / n) * (2 ** (-8 / n)) ** i for i in range(n)]
    lower = 2 ** math.floor(math.log2(n))
    return head_slopes(lower) + head_slopes(2 * lower)[::2][: n - lower]


def jina_bert_v2(
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
    """The encoder of Jina's BERT. Arguments, result and errors are those of `bert`; position_ids have no effect.

    `params` maps the names of fastbert.models.jina_bert_v2. A column is a place in the padded row, whatever the mask
    says. dropout_seed must be None: masks within the feed-forward part are PyTorch's.
    """
    if dropout_seed is not None:
        raise ValueError(f"dropout_seed: expected None, got {dropout_seed}")
    valid = valid_tokens(input_ids, inputs_embeds, attention_mask)  # (B, S)
    padding = ~valid[:, :, None]  # (B, S, 1)
    p = Parameters(params, config, prefix, dtype, None, rows_of(valid))
    activation = {"geglu": "gelu", "reglu": "relu"}[config.extra.get("feed_forward_type", "geglu")]

    if inputs_embeds is None:
        assert input_ids is not None
        x = p("embeddings.word_embeddings.weight")[input_ids.masked_fill(~valid, 0)]
    else:
        x = inputs_embeds.to(dtype).masked_fill(padding, 0)
    types = torch.zeros_like(valid, dtype=torch.long) if token_type_ids is None else token_type_ids.expand_as(valid)
    x = x + p("embeddings.token_type_embeddings.weight")[types.masked_fill(~valid, 0)]
    x = p.norm("embeddings.LayerNorm", x).masked_fill(padding, 0)

    columns = torch.arange(valid.shape[1], device=valid.device)
    distance = (columns[None, :] - columns[:, None]).abs().to(dtype)  # (S, S)
    slopes = torch.tensor(head_slopes(config.num_attention_heads), dtype=dtype, device=valid.device)
    bias = -slopes[:, None, None] * distance  # (N, S, S)

    hidden_states, attentions = [x], []
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (p.heads(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        context, probabilities = attend(p, q, k, v, valid, i, bias)
        out = p.dense(f"{layer}.attention.output.dense", context)
        x = p.add_norm(f"{layer}.attention.output", out, x, 4 * i + ATTENTION_OUTPUT)
        first, second = p(f"{layer}.mlp.gated_layers.weight").chunk(2)  # (I, H) each
        inner = linear(x, first, None, activation) * linear(x, second)  # (B, S, I)
        x = p.norm(f"{layer}.mlp.layernorm", p.dense(f"{layer}.mlp.wo", inner) + x).masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)
    return BertReference(x, p.pooled(x, valid), tuple(hidden_states), tuple(attentions))
