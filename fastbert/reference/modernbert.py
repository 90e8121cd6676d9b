"""ModernBERT under the names and settings of fastbert, by the text of fastbert.reference.rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.checkpoint.families import family_of
from fastbert.checkpoint.rotary import modernbert_layers
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
    family = family_of(config.model_type)
    theirs = {
        family.to_theirs(name.removeprefix(prefix)): tensor
        for name, tensor in params.items()
        if name.startswith(prefix)
    }
    frequencies = {
        layer: rotary.inverse_frequencies(config.head_size, layer.base) / layer.factor
        for layer in modernbert_layers(config)
    }
    layers = rotary.RotaryLayers(
        num_heads=config.num_attention_heads,
        activation=activation_of(config),
        eps=config.layer_norm_eps,
        inverse_frequencies=tuple(frequencies[layer] for layer in modernbert_layers(config)),
        windows=tuple(layer.window for layer in modernbert_layers(config)),
    )
    result = rotary.modernbert(theirs, layers, input_ids, attention_mask, position_ids, inputs_embeds, dtype=dtype)
    states = (*result.hidden_states[:-1], result.last_hidden_state)
    return BertReference(states[-1], None, states, result.attentions if output_attentions else ())
