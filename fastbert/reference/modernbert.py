"""ModernBERT, Nomic and GTE under the names and settings of fastbert, by the texts of fastbert.reference.rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.checkpoint.families import family_of
from fastbert.checkpoint.rotary import RotaryLayer, gated_rotary_layer, modernbert_layers
from fastbert.reference import rotary
from fastbert.reference.bert import BertReference, activation_of, ids_or_embeds

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig


def modernbert(
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
    """The ModernBERT encoder. Arguments, result and errors are those of `bert`; there are no segments and no pooler.

    `params` maps the names of fastbert.models.modernbert. The last of the hidden states is the normalised one. Raises
    ValueError for a dropout_seed: no masks of dropout are laid down for this family.
    """
    if dropout_seed is not None:
        raise ValueError(f"dropout_seed: got {dropout_seed}, expected None for model_type {config.model_type!r}")
    ids_or_embeds(input_ids, inputs_embeds)
    theirs, layers = _prepared(params, config, prefix, modernbert_layers(config))
    result = rotary.modernbert(theirs, layers, input_ids, attention_mask, position_ids, inputs_embeds, dtype=dtype)
    states = (*result.hidden_states[:-1], result.last_hidden_state)
    return BertReference(states[-1], None, states, result.attentions if output_attentions else ())


def gated_rotary_bert(
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
    """The encoder of Nomic and GTE. Arguments, result and errors are those of `modernbert`; a pooler may be there."""
    if dropout_seed is not None:
        raise ValueError(f"dropout_seed: got {dropout_seed}, expected None for model_type {config.model_type!r}")
    first = ids_or_embeds(input_ids, inputs_embeds)
    theirs, layers = _prepared(params, config, prefix, (gated_rotary_layer(config),) * config.num_hidden_layers)
    inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
    result = rotary.gated_rotary_bert(theirs, layers, *inputs, dtype=dtype)
    pooled = None
    if "pooler.dense.weight" in theirs:
        shape = first.shape[:2]
        valid = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.expand(shape) != 0
        is_first = valid & (valid.cumsum(1) == 1)
        rows = result.last_hidden_state.masked_fill(~is_first[:, :, None], 0).sum(1)
        weight, bias = (theirs[f"pooler.dense.{name}"].to(dtype) for name in ("weight", "bias"))
        pooled = torch.tanh(rows @ weight.T + bias)
    states = result.hidden_states
    return BertReference(states[-1], pooled, states, result.attentions if output_attentions else ())


def _prepared(
    params: Mapping[str, Tensor], config: BertConfig, prefix: str, angles: tuple[RotaryLayer, ...]
) -> tuple[dict[str, Tensor], rotary.RotaryLayers]:
    """Returns the encoder's parameters under transformers' names, and its layers."""
    family = family_of(config.model_type)
    theirs = {
        family.to_theirs(name.removeprefix(prefix)): tensor
        for name, tensor in params.items()
        if name.startswith(prefix)
    }
    layers = rotary.RotaryLayers(
        num_heads=config.num_attention_heads,
        activation=activation_of(config),
        eps=config.layer_norm_eps,
        inverse_frequencies=tuple(
            rotary.inverse_frequencies(config.head_size, layer.base) / layer.factor for layer in angles
        ),
        windows=tuple(layer.window for layer in angles),
    )
    return theirs, layers
