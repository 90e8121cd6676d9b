"""This module lists the covered classes of other libraries, and the paths of an encoder's parts in them.

Names of parameters and settings are in fastbert.checkpoint.families. Classes, dropouts, activations, buffers and
outputs, which no checkpoint has, are here. Another family needs another `Mapping`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as Names
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.family import AFTER_PADDING, Family
from fastbert.checks import expect
from fastbert.models.bert import BertModel


@dataclass(frozen=True, eq=False)
class Mapping:
    """A `Mapping` holds the paths of an encoder's parts in one family of transformers.

    Paths are dotted. Those of a layer are relative to it.
    """

    family: Family
    module: str  # The Python module of transformers.
    # The classes in it that may stand around the leaves, beside the model's class. Our forwards do the work of theirs.
    containers: frozenset[str]
    # In a layer: the path of a dropout of ours, and of theirs. Their layers have no other dropouts.
    dropouts: Names[str, str]
    activation: str  # In a layer: the module that activates.
    heads: str  # In a layer: the attention, which has the number of heads as an attribute.
    buffers: Names[str, str]  # The path of a buffer with default ids, and "columns" or "zeros", which it holds.
    output: str  # The class that forward returns.
    tanh: str = "pooler.activation"
    attention_p: str = ""  # The attribute of attention with the probability of its dropout, where it has no module.
    unread: tuple[str, ...] = ()  # In a layer: modules that its forward does not call.
    angles: str = ""  # The path of the module with the frequencies of rotary positions.

    @property
    def model(self) -> str:
        """Names the class whose forward is replaced."""
        return self.family.class_name("BertModel")

    def covers(self, kind: type) -> bool:
        """Tells whether a class is the model's by name and module, also for classes of accelerated objects."""
        return kind.__module__ == self.module and kind.__name__ == self.model

    def original(self, kind: type) -> type:
        """Returns the library's class from which a class of accelerated objects is derived, or the class itself."""
        return next((base for base in reversed(kind.__mro__) if self.covers(base)), kind)

    @property
    def layers(self) -> str:
        """Returns the path of the ModuleList of layers."""
        return self.family.to_theirs("encoder.layer")

    def layer(self, i: int) -> str:
        """Returns the path of stored layer i."""
        return self.family.to_theirs(f"encoder.layer.{i}")

    def is_list(self, path: str) -> bool:
        """Tells whether a ModuleList of layers, or of groups of them, is allowed at this path."""
        return self.layer(0).startswith(re.sub(r"\d+", "0", path) + ".")

    def sized(self, config: BertConfig, n_stored: int) -> BertConfig:
        """Returns the config for the number of stored layers. Raises ValueError for other shared layers."""
        if not self.family.shared_layers:
            return replace(config, num_hidden_layers=n_stored)
        n_sets = max(config.layer_order) + 1
        expect(n_stored == n_sets, self.layers, n_stored, f"{n_sets} groups")
        return config

    @property
    def n_heads(self) -> str:
        """Names the number of heads as the config and the attention do."""
        return self._setting("num_attention_heads")

    @property
    def hidden_act(self) -> str:
        """Names the activation as the config does."""
        return self._setting("hidden_act")

    def _setting(self, ours: str) -> str:
        return next(iter(self.family.config_to_theirs({ours: None})))

    def leaves(self, ours: BertModel) -> Iterator[tuple[str, str]]:
        """Yields (path in fastbert's model, path in the live model) of every module without children in both."""
        for path, module in ours.named_modules():
            if next(module.children(), None) is not None or isinstance(module, nn.ModuleList):
                continue
            start, _, layer_and_name = path.partition("encoder.layer.")
            if not isinstance(module, nn.Dropout) or start:
                yield path, self.family.to_theirs(path)
                continue
            i, _, name = layer_and_name.partition(".")
            if name in self.dropouts:
                yield path, f"{self.layer(int(i))}.{self.dropouts[name]}"

    def config(self, config: Any, embeddings: nn.Module) -> BertConfig:
        """Makes a BertConfig from a live model's config. Raises ValueError for unsupported settings.

        The model's class determines the family, because its config may be DPR's or a user's class.
        """
        if not isinstance(getattr(config, self.hidden_act), str):
            raise ValueError(f"{self.hidden_act}: got a function, expected a name")
        if getattr(config, "chunk_size_feed_forward", 0):
            raise ValueError(f"chunk_size_feed_forward: got {config.chunk_size_feed_forward}, expected 0")
        ours = BertConfig.from_dict({**config.to_dict(), "model_type": self.family.model_type})
        counted_from = self.counted_from(embeddings)
        return ours if counted_from is None else replace(ours, pad_token_id=counted_from)

    def counted_from(self, embeddings: nn.Module) -> int | None:
        """Returns the padding id of the module that counts positions from it, or None where positions are columns."""
        padding_id: int | None = getattr(embeddings, "padding_idx", None)
        return padding_id if self.family.positions == AFTER_PADDING else None

    def embedding_width(self, config: Any) -> int:
        """Returns the width of inputs_embeds."""
        width: int = config.hidden_size
        if self.family.projection:
            width = getattr(config, "embedding_size", width)
        return width


# In 4.x each implementation of attention has its class. SdpaSelfAttention is SDPA's.
_OF_BERT = ("Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "SdpaSelfAttention", "SelfOutput",
            "Intermediate", "Output", "Pooler")  # fmt: skip
_COLUMNS, _ZEROS = {"embeddings.position_ids": "columns"}, {"embeddings.token_type_ids": "zeros"}


def _like_bert(
    model_type: str, folder: str, buffers: Names[str, str], output: str, without: tuple[str, ...] = ()
) -> Mapping:
    """Makes the mapping of a family whose code is a copy of BERT's."""
    family = FAMILIES[model_type]
    return Mapping(
        family=family,
        module=f"transformers.models.{folder}.modeling_{folder}",
        containers=frozenset(family.classes + name for name in _OF_BERT if name not in without),
        dropouts={name: name for name in ("attention.self.dropout", "attention.output.dropout", "output.dropout")},
        activation="intermediate.intermediate_act_fn",
        heads="attention.self",
        buffers=buffers,
        output=output,
    )


def _gated_rotary(model_type: str, dropouts: Names[str, str]) -> Mapping:
    """Makes the mapping of a family on the text gated_rotary_bert. dropouts: the other ones of a layer."""
    family = FAMILIES[model_type]
    names = "Embeddings", "Layer", "Attention", "MLP", "RotaryEmbedding", "Pooler"
    return Mapping(
        family=family,
        module=f"transformers.models.{model_type}.modeling_{model_type}",
        containers=frozenset(family.classes + name for name in names),
        dropouts={
            "self_attn.dropout": "post_attention_dropout",  # which is not read: see attention_p
            "post_attention_dropout": "post_attention_dropout",
            "post_mlp_dropout": "post_mlp_dropout",
            **dropouts,
        },
        activation="mlp.act_fn",
        heads="self_attn",
        buffers={"rotary_emb.inv_freq": "frequencies"},
        output="BaseModelOutputWithPooling",
        attention_p="attention_dropout",
        angles="rotary_emb",
    )


_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"

COVERED = (
    _like_bert("bert", "bert", {**_COLUMNS, **_ZEROS}, _POOLED),
    # In these three, positions come from the ids, not from the buffer.
    _like_bert("roberta", "roberta", _ZEROS, _POOLED),
    _like_bert("xlm-roberta", "xlm_roberta", _ZEROS, _POOLED),
    _like_bert("camembert", "camembert", _ZEROS, _POOLED),
    Mapping(
        family=FAMILIES["distilbert"],
        module="transformers.models.distilbert.modeling_distilbert",
        containers=frozenset(
            ("Embeddings", "Transformer", "TransformerBlock", "FFN", "DistilBertSelfAttention",
             "MultiHeadSelfAttention", "DistilBertSdpaAttention")
        ),
        dropouts={"attention.self.dropout": "attention.dropout", "output.dropout": "ffn.dropout"},
        activation="ffn.activation",
        heads="attention",
        buffers=_COLUMNS,
        output="BaseModelOutput",
    ),
    _like_bert("electra", "electra", {**_COLUMNS, **_ZEROS}, "BaseModelOutputWithPastAndCrossAttentions",
               without=("SdpaSelfAttention", "Pooler")),
    Mapping(
        family=FAMILIES["mpnet"],
        module="transformers.models.mpnet.modeling_mpnet",
        containers=frozenset(
            f"MPNet{name}" for name in
            ("Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "Intermediate", "Output", "Pooler")
        ),
        dropouts={name: name for name in ("attention.attn.dropout", "attention.dropout", "output.dropout")},
        activation="intermediate.intermediate_act_fn",
        heads="attention.attn",
        buffers={},
        output="BaseModelOutputWithPooling",
    ),
    Mapping(
        family=FAMILIES["albert"],
        module="transformers.models.albert.modeling_albert",
        containers=frozenset(
            f"Albert{name}" for name in
            ("Embeddings", "Transformer", "LayerGroup", "Layer", "Attention", "SdpaAttention")
        ),
        dropouts={
            "attention.self.dropout": "attention.attention_dropout",
            "attention.output.dropout": "attention.output_dropout",
        },
        activation="activation",
        heads="attention",
        buffers={**_COLUMNS, **_ZEROS},
        output="BaseModelOutputWithPooling",
        tanh="pooler_activation",
        unread=("dropout",),
    ),
    Mapping(
        family=FAMILIES["modernbert"],
        module="transformers.models.modernbert.modeling_modernbert",
        containers=frozenset(
            f"ModernBert{name}" for name in ("Embeddings", "EncoderLayer", "Attention", "MLP", "RotaryEmbedding")
        ),
        dropouts={"attn.dropout": "attn.out_drop", "attn.out_drop": "attn.out_drop", "mlp.drop": "mlp.drop"},
        activation="mlp.act",
        heads="attn",
        buffers={
            "rotary_emb.full_attention_inv_freq": "frequencies",
            "rotary_emb.sliding_attention_inv_freq": "frequencies",
        },
        output="BaseModelOutput",
        attention_p="attention_dropout",
        angles="rotary_emb",
    ),
    Mapping(
        family=FAMILIES["deberta-v2"],
        module="transformers.models.deberta_v2.modeling_deberta_v2",
        containers=frozenset(
            ("DisentangledSelfAttention", "ConvLayer", *(f"DebertaV2{name}" for name in
             ("Embeddings", "Encoder", "Layer", "Attention", "SelfOutput", "Intermediate", "Output")))
        ),
        dropouts={name: name for name in ("attention.self.dropout", "attention.self.pos_dropout",
                                          "attention.output.dropout", "output.dropout")},
        activation="intermediate.intermediate_act_fn",
        heads="attention.self",
        buffers=_COLUMNS,
        output="BaseModelOutput",
    ),
    _gated_rotary("gte", {"mlp.dropout": "mlp.dropout"}),
    _gated_rotary("nomic_bert", {}),
)  # fmt: skip


def find(kind: type) -> Mapping | None:
    """Returns the mapping of exactly this class. A subclass of a covered class may compute another result."""
    return next((mapping for mapping in COVERED if mapping.covers(kind)), None)


def derived_from(kind: type) -> Mapping | None:
    """Returns the mapping of a covered base class of a class that is not covered."""
    return None if find(kind) else next(filter(None, map(find, kind.__mro__)), None)


def is_of_sentences(kind: type, name: str) -> bool:
    """Tells whether a class is sentence-transformers' class of that name, such as "SentenceTransformer"."""
    return kind.__module__.split(".")[0] == "sentence_transformers" and kind.__name__ == name


def covered_in_words() -> str:
    """Lists the covered classes in words, for messages."""
    names = ", ".join(mapping.model for mapping in COVERED)
    return (
        f"{names} of transformers, models and pipelines with one of them inside (BertFor..., RobertaFor..., "
        "AutoModel), SentenceTransformer and CrossEncoder"
    )
