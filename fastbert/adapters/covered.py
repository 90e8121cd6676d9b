"""Which classes of other libraries are covered, and where in them the parts of an encoder of ours lie.

Names of parameters and settings are those of fastbert.checkpoint.families. What no checkpoint has, and no table there
can say, is here: classes, dropouts, activations, buffers, outputs. A family more is a `Mapping` more.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Names
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.family import AFTER_PADDING, Family
from fastbert.models.bert import BertModel


@dataclass(frozen=True, eq=False)
class Mapping:
    """One family of transformers. Paths are dotted; those of a layer are relative to it.

    module: the Python module of transformers. containers: the classes in it that may stand around the leaves, the
    model's aside: what their forwards do is what ours do instead. dropouts: in a layer, path of a dropout of ours -> of
    theirs; those of ours that are not named drop nothing in a model in eval mode. activation: in a layer, the module
    that activates. heads: in a layer, the attention, which has the number of heads as an attribute. buffers: path of a
    buffer with default ids -> what they are, "columns" or "zeros". output: the class that forward returns.
    """

    family: Family
    module: str
    containers: frozenset[str]
    dropouts: Names[str, str]
    activation: str
    heads: str
    buffers: Names[str, str]
    output: str
    tanh: str = "pooler.activation"

    @property
    def model(self) -> str:
        """The class whose forward is replaced."""
        return self.family.class_name("BertModel")

    def covers(self, kind: type) -> bool:
        """Whether it is the model's class by name and module, as classes of accelerated objects are, too."""
        return kind.__module__ == self.module and kind.__name__ == self.model

    def original(self, kind: type) -> type:
        """The library's class, which one of accelerated objects is derived from; else the class itself."""
        return next((base for base in reversed(kind.__mro__) if self.covers(base)), kind)

    @property
    def layers(self) -> str:
        """Path of the ModuleList of layers."""
        return self.family.to_theirs("encoder.layer")

    @property
    def n_heads(self) -> str:
        """What the config and the attention call the number of heads."""
        return self._setting("num_attention_heads")

    @property
    def hidden_act(self) -> str:
        """What the config calls the activation."""
        return self._setting("hidden_act")

    def _setting(self, ours: str) -> str:
        return next(iter(self.family.config_to_theirs({ours: None})))

    def leaves(self, ours: BertModel) -> Iterator[tuple[str, str]]:
        """(path in our model, path in theirs) of every module without children that they have."""
        for path, module in ours.named_modules():
            if next(module.children(), None) is not None or isinstance(module, nn.ModuleList):
                continue
            start, _, layer_and_name = path.partition("encoder.layer.")
            if not isinstance(module, nn.Dropout) or start:
                yield path, self.family.to_theirs(path)
                continue
            i, _, name = layer_and_name.partition(".")
            if name in self.dropouts:
                yield path, f"{self.layers}.{i}.{self.dropouts[name]}"

    def config(self, config: Any, embeddings: nn.Module) -> BertConfig:
        """That of a live model, as ours. Raises ValueError for what we do not compute.

        The model's class says which family it is of: DPR's config, or a user's, may stand where BERT's does.
        """
        if not isinstance(getattr(config, self.hidden_act), str):
            raise ValueError(f"{self.hidden_act}: got a function, expected a name")
        if getattr(config, "chunk_size_feed_forward", 0):
            raise ValueError(f"chunk_size_feed_forward: got {config.chunk_size_feed_forward}, expected 0")
        ours = BertConfig.from_dict({**config.to_dict(), "model_type": self.family.model_type})
        counted_from = self.counted_from(embeddings)
        return ours if counted_from is None else replace(ours, pad_token_id=counted_from)

    def counted_from(self, embeddings: nn.Module) -> int | None:
        """The padding id, where default positions count from it: that of the module which does, not of the config."""
        found: int | None = getattr(embeddings, "padding_idx", None)
        return found if self.family.positions == AFTER_PADDING else None

    def embedding_width(self, config: Any) -> int:
        """Of inputs_embeds."""
        width: int = config.embedding_size if self.family.projection else config.hidden_size
        return width


# In 4.x the class of attention goes by the implementation: the second one is SDPA's.
_OF_BERT = ("Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "SdpaSelfAttention", "SelfOutput",
            "Intermediate", "Output", "Pooler")  # fmt: skip
_COLUMNS, _ZEROS = {"embeddings.position_ids": "columns"}, {"embeddings.token_type_ids": "zeros"}


def _like_bert(
    model_type: str, folder: str, buffers: Names[str, str], output: str, without: tuple[str, ...] = ()
) -> Mapping:
    """Of files that are copies of BERT's."""
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


_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"

COVERED = (
    _like_bert("bert", "bert", {**_COLUMNS, **_ZEROS}, _POOLED),
    # Positions come from the ids, not from the buffer.
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
)  # fmt: skip


def find(kind: type) -> Mapping | None:
    """The mapping of exactly this class, not of one derived from it, which may compute something else."""
    return next((mapping for mapping in COVERED if mapping.covers(kind)), None)


def derived_from(kind: type) -> Mapping | None:
    """The mapping of a class that this one is derived from, without being it."""
    return None if find(kind) else next(filter(None, map(find, kind.__mro__)), None)


def is_of_sentences(kind: type, name: str) -> bool:
    """Whether it is exactly the class of that name of sentence-transformers, such as "SentenceTransformer"."""
    return kind.__module__.split(".")[0] == "sentence_transformers" and kind.__name__ == name


def covered() -> str:
    """The covered classes in words, for messages."""
    names = ", ".join(mapping.model for mapping in COVERED)
    return (
        f"{names} of transformers, models and pipelines with one of them inside (BertFor..., RobertaFor..., "
        "AutoModel), SentenceTransformer and CrossEncoder"
    )
