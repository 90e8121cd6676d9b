"""This module reads the settings of DeBERTa-v2 and -v3 in a config.json that are no fields of BertConfig.

A config here is a `BertConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.rotary import setting
from fastbert.checks import expect

TERMS = ("c2p", "p2c")  # content to position, and position to content


@dataclass(frozen=True)
class DebertaSettings:
    """DebertaSettings are the attention settings that all layers share, and the convolution beside the first layer.

    terms: those of TERMS that scores have; () without relative positions. n_scores: scores are divided by the root of
    n_scores times the head size. n_buckets: on either side, or -1 if each distance has its own. max_distance: the end
    of the buckets. reach: R of the table of distances, (2R, H). shared: whether distances go through the projections of
    tokens. normalised: whether the table is. relative: whether there is a table. positions: whether a table of
    positions is added to the embeddings. conv_size: columns that the convolution reads, 0 for none.
    """

    terms: tuple[str, ...]
    n_scores: int
    n_buckets: int
    max_distance: int
    reach: int
    shared: bool
    normalised: bool
    relative: bool
    positions: bool
    conv_size: int
    conv_groups: int
    conv_activation: str

    @property
    def buckets(self) -> tuple[int, int]:
        """Returns the map from distances to rows of the table: n_buckets and max_distance."""
        return self.n_buckets, self.max_distance


def deberta_settings(config: Any) -> DebertaSettings:
    """Returns the settings of a config. Raises ValueError for a setting that fastbert does not compute."""
    types = setting(config, "pos_att_type") or ()
    if isinstance(types, str):
        types = types.lower().split("|")
    expect(isinstance(types, (list, tuple)), "pos_att_type", types, "'p2c|c2p' or a list")
    types = {str(each).strip() for each in types}
    terms, relative = tuple(term for term in TERMS if term in types), bool(setting(config, "relative_attention"))
    n_buckets, farthest = config.extra.get("position_buckets", -1), setting(config, "max_relative_positions")
    for name, value in (("position_buckets", n_buckets), ("max_relative_positions", farthest)):
        expect(isinstance(value, int), name, value, "a whole number")
    farthest = config.max_position_embeddings if farthest < 1 else farthest
    n_buckets = n_buckets if n_buckets > 0 else -1
    if relative and n_buckets > 0:
        fits = n_buckets > 1 and farthest - 1 > n_buckets // 2
        expect(fits, "position_buckets", n_buckets, f"from 2 to less than 2 * {farthest - 1}, the farthest distance")
    head_size = config.extra.get("attention_head_size", config.head_size)
    expect(head_size == config.head_size, "attention_head_size", head_size, f"{config.head_size}")
    size, groups = config.extra.get("conv_kernel_size", 0), config.extra.get("conv_groups", 1)
    fits = isinstance(size, int) and size >= 0 and (size == 0 or size % 2 == 1)
    expect(fits, "conv_kernel_size", size, "0 or an odd whole number")
    fits = isinstance(groups, int) and groups > 0 and config.hidden_size % groups == 0
    expect(fits, "conv_groups", groups, f"a divisor of hidden_size ({config.hidden_size})")
    activation, pooler = config.extra.get("conv_act", "tanh"), setting(config, "pooler_hidden_act")
    for name, value in (("conv_act", activation), ("pooler_hidden_act", pooler)):
        expect(value in ACTIVATIONS, name, value, f"one of {', '.join(ACTIVATIONS)}")
    width = config.extra.get("pooler_hidden_size", config.hidden_size)
    expect(width == config.hidden_size, "pooler_hidden_size", width, f"hidden_size ({config.hidden_size})")
    norms = str(config.extra.get("norm_rel_ebd", "none")).lower().split("|")
    return DebertaSettings(
        terms=terms if relative else (),
        n_scores=1 + len(terms),
        n_buckets=n_buckets,
        max_distance=farthest,
        reach=n_buckets if n_buckets > 0 else farthest,
        shared=bool(config.extra.get("share_att_key", False)),
        normalised="layer_norm" in [norm.strip() for norm in norms],
        relative=relative,
        positions=bool(setting(config, "position_biased_input")),
        conv_size=size,
        conv_groups=groups,
        conv_activation=activation,
    )
