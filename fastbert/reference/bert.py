"""The encoder of BERT as the reference computes it, on padded (B, S) inputs, with dropout too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.families import family_of
from fastbert.checkpoint.family import COLUMN
from fastbert.reference.dropout import (
    ATTENTION_OUTPUT,
    EMBEDDINGS,
    OUTPUT,
    PROBABILITIES,
    Dropout,
    drop_probabilities,
    drop_rows,
)
from fastbert.reference.ops import (
    embedding_layer_norm,
    layer_norm,
    linear,
)

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig


@dataclass(frozen=True)
class BertReference:
    """The result of `bert`. Rows at padding positions are zero everywhere."""

    last_hidden_state: Tensor  # (B, S, H)
    pooler_output: Tensor | None  # (B, H), None without a pooler
    hidden_states: tuple[Tensor, ...]  # L+1 of (B, S, H): the embeddings, then each layer
    attentions: tuple[Tensor, ...]  # L of (B, N, S, S), or () when not asked for


def bert(
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
    """The BERT encoder, or one of its family. Devlin et al., arXiv:1810.04805.

    `params` maps the state-dict names of fastbert.models.bert, which are those of transformers' BERT, each behind
    `prefix` ("bert." under a head), to tensors, which are cast to `dtype` as they are used, on the device where the
    inputs are too. Inputs: `input_ids` (B, S) or `inputs_embeds` (B, S, H), one of them; `attention_mask` (B, S),
    nonzero = valid, default all valid; `token_type_ids` and `position_ids` (B, S) or broadcasting to it, default 0 and
    `default_positions`. Where the params have an `embeddings_project`, the embeddings go through it (Clark et al.,
    "ELECTRA", arXiv:2003.10555).

    Whatever stands at a padding position changes nothing but RoBERTa's default positions after it: no output depends
    on it, and the row there is zero in every hidden state, as are the rows and columns of the attentions. The pooler
    reads the first valid token of each row, or a zero vector where there is none. `output_attentions=False` saves the
    memory of the attentions.

    With a `dropout_seed` the encoder drops out as in training, with the config's probabilities and the masks of
    `fastbert.reference.dropout`; attentions are then what is left of them.

    Raises ValueError for both or neither of input_ids and inputs_embeds, for a mask of another shape and for an
    unknown hidden_act; KeyError naming a missing parameter.
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

    if position_ids is None:
        position_ids = default_positions(config, input_ids, valid.shape, valid.device)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(position_ids)
    x = embedding_layer_norm(
        None if input_ids is None else input_ids.masked_fill(~valid, 0),
        token_type_ids.expand_as(valid).masked_fill(~valid, 0),
        position_ids.expand_as(valid).masked_fill(~valid, 0),
        p("embeddings.word_embeddings.weight"),
        p("embeddings.position_embeddings.weight"),
        p("embeddings.token_type_embeddings.weight") if family_of(config.model_type).token_types else None,
        p("embeddings.LayerNorm.weight"),
        p("embeddings.LayerNorm.bias"),
        config.layer_norm_eps,
        None if inputs_embeds is None else inputs_embeds.to(dtype).masked_fill(padding, 0),
    )
    x = drop_rows(x, drop(config.hidden_dropout_prob, EMBEDDINGS), row)
    if f"{prefix}embeddings_project.weight" in params:
        x = dense("embeddings_project", x)
    x = x.masked_fill(padding, 0)

    hidden_states, attentions = [x], []
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            dense(f"{layer}.attention.self.{name}", x).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )  # (B, N, S, D)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        # The lowest finite number, not -inf: a query at padding has no valid key, and its softmax stays finite so.
        scores = scores.masked_fill(~both_valid, torch.finfo(dtype).min)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(~both_valid, 0)
        dropped = drop(config.attention_probs_dropout_prob, 4 * i + PROBABILITIES)
        probabilities = drop_probabilities(probabilities, dropped, row, place)
        context = (probabilities @ v).transpose(1, 2).flatten(2)  # (B, S, H)
        out = dense(f"{layer}.attention.output.dense", context)
        x = add_norm(f"{layer}.attention.output", out, x, 4 * i + ATTENTION_OUTPUT)
        inner = dense(f"{layer}.intermediate.dense", x, activation)  # (B, S, I)
        out = dense(f"{layer}.output.dense", inner)
        x = add_norm(f"{layer}.output", out, x, 4 * i + OUTPUT).masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)

    pooled = None
    if f"{prefix}pooler.dense.weight" in params:
        is_first = valid & (valid.cumsum(dim=1) == 1)
        first = x.masked_fill(~is_first[:, :, None], 0).sum(dim=1)  # (B, H)
        pooled = torch.tanh(dense("pooler.dense", first))
    return BertReference(x, pooled, tuple(hidden_states), tuple(attentions))


def default_positions(config: BertConfig, input_ids: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Positions of tokens where none are given, (B, S) or broadcasting to it; shape: (B, S).

    BERT's are the column index. RoBERTa's begin at the padding id + 1 and count on, in each row, for every id that is
    not the padding id, whatever the mask says; one that is has the padding id as its position. Without ids every column
    counts. Source: make_positions of fairseq, create_position_ids_from_input_ids of transformers.
    """
    columns = torch.arange(shape[1], device=device)
    if family_of(config.model_type).positions == COLUMN:
        return columns
    assert config.pad_token_id is not None
    if input_ids is None:
        return columns + config.pad_token_id + 1
    counts = input_ids != config.pad_token_id
    return counts.cumsum(dim=1) * counts + config.pad_token_id


def activation_of(config: BertConfig) -> str:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act: got {config.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config.hidden_act]


def ids_or_embeds(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    got = "neither" if input_ids is None else "both"
    raise ValueError(f"input_ids, inputs_embeds: got {got}, expected exactly one of them")


def valid_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """(B, S) bool, true at valid positions."""
    first = ids_or_embeds(input_ids, inputs_embeds)
    if attention_mask is None:
        return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if attention_mask.shape != first.shape[:2]:
        got, expected = tuple(attention_mask.shape), tuple(first.shape[:2])
        raise ValueError(f"attention_mask: got shape {got}, expected {expected}")
    return attention_mask != 0
