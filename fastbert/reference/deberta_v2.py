"""DeBERTa-v2 and -v3 under the names and settings of fastbert, by the text of fastbert.reference.deberta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.deberta import deberta_settings
from fastbert.checkpoint.rotary import setting
from fastbert.reference.bert import BertReference, activation_of, ids_or_embeds
from fastbert.reference.deberta import DebertaSettings, deberta

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig


def deberta_v2(
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
    """The encoder of DeBERTa. Arguments, result and errors are those of `bert`; there is no pooler.

    `params` maps the names of fastbert.models.deberta, which are transformers'. Raises ValueError for a dropout_seed:
    no masks of dropout are laid down for this family.
    """
    if dropout_seed is not None:
        raise ValueError(f"dropout_seed: got {dropout_seed}, expected None for model_type {config.model_type!r}")
    first = ids_or_embeds(input_ids, inputs_embeds)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(first.shape[:2])
    own, types = deberta_settings(config), setting(config, "pos_att_type") or ()
    terms = tuple(term for term in ("c2p", "p2c") if term in types)
    settings = DebertaSettings(
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        activation=activation_of(config),
        position_buckets=own.n_buckets,
        max_relative_positions=own.max_distance,
        pos_att_type=terms,
        share_att_key=own.shared,
        norm_rel_ebd=own.normalised,
        position_biased_input=own.positions,
        conv_kernel_size=own.conv_size,
        conv_act=ACTIVATIONS[own.conv_activation],
        conv_groups=own.conv_groups,
        relative_attention=own.relative,
    )
    inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
    result = deberta(params, settings, *inputs, prefix=prefix, dtype=dtype)
    states = result.hidden_states
    return BertReference(states[-1], None, states, result.attentions if output_attentions else ())
