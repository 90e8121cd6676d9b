"""The encoders of Jina's BERT, version 2, as the reference computes them, on padded (B, S) inputs.

They are BERT's without a table of positions. From each score, a slope of the head times the number of columns between
the query and the key is taken, on both sides alike. The feed-forward part multiplies an activated half of its rows with
the other half. The code model normalises queries and keys besides, and adds what a layer reads a second time. Sources:
Günther et al., "Jina Embeddings 2", 2023, arXiv:2310.19923; Press et al., "Train Short, Test Long", 2022,
arXiv:2108.12409; Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202; Dehghani et al., "Scaling Vision
Transformers to 22 Billion Parameters", 2023, arXiv:2302.05442, for norms of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.reference.bert import BertReference, Parameters, attend, rows_of, valid_tokens
from fastbert.reference.dropout import ATTENTION_OUTPUT
from fastbert.reference.ops import linear

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig

# (parameters, number of the layer, its rows (B, S, H), valid tokens (B, S), bias (N, S, S), activation of the gate) ->
# the rows after the layer, (B, S, H), and the probabilities of attention, (B, N, S, S)
Layer = Callable[[Parameters, int, Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]


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
    inputs = input_ids, attention_mask, token_type_ids, inputs_embeds
    return _encode(_layer, params, config, *inputs, prefix, dtype, output_attentions, dropout_seed)


def jina_bert_code(
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
    """The encoder of Jina's code model. Everything else is as `jina_bert_v2` says.

    `params` maps the names of fastbert.models.jina_bert_code.
    """
    inputs = input_ids, attention_mask, token_type_ids, inputs_embeds
    return _encode(_code_layer, params, config, *inputs, prefix, dtype, output_attentions, dropout_seed)


def _encode(
    run_layer: Layer,
    params: Mapping[str, Tensor],
    config: BertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    prefix: str,
    dtype: torch.dtype,
    output_attentions: bool,
    dropout_seed: int | None,
) -> BertReference:
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
        x, probabilities = run_layer(p, i, x, valid, bias, activation)
        x = x.masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)
    return BertReference(x, p.pooled(x, valid), tuple(hidden_states), tuple(attentions))


def _layer(p: Parameters, i: int, x: Tensor, valid: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    layer = f"encoder.layer.{i}"
    q, k, v = (p.heads(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
    context, probabilities = attend(p, q, k, v, valid, i, bias)
    out = p.dense(f"{layer}.attention.output.dense", context)
    x = p.add_norm(f"{layer}.attention.output", out, x, 4 * i + ATTENTION_OUTPUT)
    activated, other = p(f"{layer}.mlp.gated_layers.weight").chunk(2)  # (I, H) each
    inner = linear(x, activated, None, activation) * linear(x, other)  # (B, S, I)
    return p.norm(f"{layer}.mlp.layernorm", p.dense(f"{layer}.mlp.wo", inner) + x), probabilities


def _code_layer(
    p: Parameters, i: int, x: Tensor, valid: Tensor, bias: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    layer, name, n_heads = f"encoder.layer.{i}", f"encoder.layer.{i}.attention.self", p.config.num_attention_heads
    q = p.norm(f"{name}.layer_norm_q", p.dense(f"{name}.query", x))  # over all heads at once
    k = p.norm(f"{name}.layer_norm_k", p.dense(f"{name}.key", x))
    q, k = (each.unflatten(-1, (n_heads, -1)).transpose(1, 2) for each in (q, k))  # (B, N, S, D)
    context, probabilities = attend(p, q, k, p.heads(f"{name}.value", x), valid, i, bias)
    out = p.dense(f"{layer}.attention.output.dense", context)
    attended = p.add_norm(f"{layer}.attention.output", out, x, 4 * i + ATTENTION_OUTPUT)
    x = p.norm(f"{layer}.layer_norm_1", attended + x)
    other, activated = p(f"{layer}.mlp.up_gated_layer.weight").chunk(2)  # (I, H) each
    inner = linear(x, activated, None, activation) * linear(x, other)  # (B, S, I)
    return p.norm(f"{layer}.layer_norm_2", p.dense(f"{layer}.mlp.down_layer", inner) + x), probabilities
