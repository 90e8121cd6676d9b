"""The encoder of BERT as the reference computes it, on padded (B, S) inputs, with dropout too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Parameters:
    """The parameters of an encoder behind a prefix, each cast as it is used, and what encoders compute with them.

    row: (B, S), the place of each token among all tokens, on which masks of dropout depend.
    """

    params: Mapping[str, Tensor]
    config: BertConfig
    prefix: str
    dtype: torch.dtype
    dropout_seed: int | None
    row: Tensor

    def __call__(self, name: str) -> Tensor:
        return self.params[self.prefix + name].to(self.dtype)

    def dense(self, name: str, x: Tensor, activation: str | None = None) -> Tensor:
        return linear(x, self(f"{name}.weight"), self(f"{name}.bias"), activation)

    def dropout(self, p: float, site: int) -> Dropout | None:
        return None if self.dropout_seed is None else Dropout(p, self.dropout_seed, site)

    def drop(self, x: Tensor, site: int) -> Tensor:
        """Drops out of rows, as the config and the family say for the site."""
        family, kind = family_of(self.config.model_type), site % 4
        without = site != EMBEDDINGS and (
            (kind == ATTENTION_OUTPUT and not family.attention_output_dropout)
            or (kind == OUTPUT and not family.output_dropout)
        )
        return drop_rows(x, self.dropout(0.0 if without else self.config.hidden_dropout_prob, site), self.row)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, self(f"{name}.weight"), self(f"{name}.bias"), self.config.layer_norm_eps)

    def add_norm(self, name: str, x: Tensor, residual: Tensor, site: int) -> Tensor:
        """LayerNorm(dropout(x) + residual)."""
        return self.norm(f"{name}.LayerNorm", self.drop(x, site) + residual)

    def heads(self, name: str, x: Tensor) -> Tensor:
        """A linear whose output is cut into heads, (B, N, S, D)."""
        return self.dense(name, x).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)

    def pooled(self, x: Tensor, valid: Tensor) -> Tensor | None:
        """The pooled first valid token of each row, or of a zero vector, (B, H); None without a pooler."""
        if f"{self.prefix}pooler.dense.weight" not in self.params:
            return None
        is_first = valid & (valid.cumsum(dim=1) == 1)
        return torch.tanh(self.dense("pooler.dense", x.masked_fill(~is_first[:, :, None], 0).sum(dim=1)))


def rows_of(valid: Tensor) -> Tensor:
    """The place of each token among all tokens, (B, S); any number at padding."""
    return (valid.flatten().cumsum(0) - 1).clamp(min=0).view(valid.shape)


def attend(p: Parameters, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, bias: Any = 0.0) -> Any:
    """Attention with dropout: the context (B, S, H), and the probabilities (B, N, S, S). bias: is added to scores."""
    both_valid = valid[:, None, :, None] & valid[:, None, None, :]  # (B, 1, S, S): query, key
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    # The lowest finite number, not -inf: a query at padding has no valid key, and its softmax stays finite so.
    scores = scores.masked_fill(~both_valid, torch.finfo(p.dtype).min)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~both_valid, 0)
    place = (valid.cumsum(1) - 1).clamp(min=0)  # within the sequence
    dropped = p.dropout(p.config.attention_probs_dropout_prob, 4 * layer + PROBABILITIES)
    probabilities = drop_probabilities(probabilities, dropped, p.row, place)
    return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


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
    "ELECTRA", arXiv:2003.10555). Layers share weights as the config's num_hidden_groups says (Lan et al., "ALBERT",
    arXiv:1909.11942).

    Whatever stands at a padding position changes nothing but RoBERTa's default positions after it: no output depends
    on it, and the row there is zero in every hidden state, as are the rows and columns of the attentions. The pooler
    reads the first valid token of each row, or a zero vector where there is none. `output_attentions=False` saves the
    memory of the attentions.

    With a `dropout_seed` the encoder drops out as in training, with the config's probabilities and the masks of
    `fastbert.reference.dropout`; attentions are then what is left of them.

    Raises ValueError for both or neither of input_ids and inputs_embeds, for a mask of another shape and for an
    unknown hidden_act; KeyError naming a missing parameter.
    """

    activation = activation_of(config)
    valid = valid_tokens(input_ids, inputs_embeds, attention_mask)  # (B, S)
    padding = ~valid[:, :, None]  # (B, S, 1)
    p = Parameters(params, config, prefix, dtype, dropout_seed, rows_of(valid))

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
    x = p.drop(x, EMBEDDINGS)
    if f"{prefix}embeddings_project.weight" in params:
        x = p.dense("embeddings_project", x)
    x = x.masked_fill(padding, 0)

    hidden_states, attentions = [x], []
    settings = getattr(config, "extra", vars(config))  # of ours, or of transformers' configuration
    n_sets = settings.get("num_hidden_groups", config.num_hidden_layers)  # of weights, which layers share
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i * n_sets // config.num_hidden_layers}"
        q, k, v = (p.heads(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        context, probabilities = attend(p, q, k, v, valid, i)
        out = p.dense(f"{layer}.attention.output.dense", context)
        x = p.add_norm(f"{layer}.attention.output", out, x, 4 * i + ATTENTION_OUTPUT)
        inner = p.dense(f"{layer}.intermediate.dense", x, activation)  # (B, S, I)
        out = p.dense(f"{layer}.output.dense", inner)
        x = p.add_norm(f"{layer}.output", out, x, 4 * i + OUTPUT).masked_fill(padding, 0)
        hidden_states.append(x)
        if output_attentions:
            attentions.append(probabilities)
    return BertReference(x, p.pooled(x, valid), tuple(hidden_states), tuple(attentions))


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
