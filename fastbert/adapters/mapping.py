"""Which classes of other libraries are covered, and where in them the parts of an encoder of ours lie.

The only place that knows names of another library's modules. A family more is a `Mapping` more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Mapping as Names
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert.config import BertConfig

_NORMED = ("dense", "LayerNorm", "dropout")


def _named(prefix: str, names: tuple[str, ...]) -> dict[str, str]:
    return {f"{prefix}.{name}": f"{prefix}.{name}" for name in names}


@dataclass(frozen=True)
class Mapping:
    """One family. Paths are dotted; those of a layer are relative to it.

    module, model: the Python module of the library, and the class in it whose forward is replaced. containers: the
    other classes in it that may stand around the leaves: what their forwards do is what ours do instead. outside,
    pooler, layer: path of a leaf of ours -> of theirs. tanh: what activates in the pooler. layers: their ModuleList.
    activation, heads: in a layer, the module that activates, and the one whose attribute `n_heads` is the number of
    heads. hidden_act: the config's key for that activation. buffers: path of a buffer with default ids -> what they
    are, "columns" or "zeros". output: the class that forward returns. config: their config as ours; raises ValueError
    for what we do not compute.
    """

    module: str
    model: str
    containers: frozenset[str]
    outside: Names[str, str]
    pooler: Names[str, str]
    tanh: str
    layers: str
    layer: Names[str, str]
    activation: str
    heads: str
    n_heads: str
    hidden_act: str
    buffers: Names[str, str]
    output: str
    config: Callable[[Any], BertConfig]

    def leaves(self, live: nn.Module, n_layers: int) -> Iterator[tuple[str, str]]:
        """(path of ours, path of theirs) of every leaf."""
        yield from self.outside.items()
        if getattr(live, "pooler", None) is not None:
            yield from self.pooler.items()
        for i in range(n_layers):
            for ours, theirs in self.layer.items():
                yield f"encoder.layer.{i}.{ours}", f"{self.layers}.{i}.{theirs}"


def _bert_config(config: Any) -> BertConfig:
    if not isinstance(config.hidden_act, str):
        raise ValueError("hidden_act: got a function, expected a name")
    if getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError(f"chunk_size_feed_forward: got {config.chunk_size_feed_forward}, expected 0")
    return BertConfig.from_dict(config.to_dict())


BERT = Mapping(
    module="transformers.models.bert.modeling_bert",
    model="BertModel",
    containers=frozenset(
        ("BertEmbeddings", "BertEncoder", "BertLayer", "BertAttention", "BertSelfAttention", "BertSdpaSelfAttention",
         "BertSelfOutput", "BertIntermediate", "BertOutput", "BertPooler")
    ),
    outside=_named(
        "embeddings", ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout")
    ),
    pooler=_named("pooler", ("dense",)),
    tanh="pooler.activation",
    layers="encoder.layer",
    layer={
        **_named("attention.self", ("query", "key", "value", "dropout")),
        **_named("attention.output", _NORMED),
        **_named("intermediate", ("dense",)),
        **_named("output", _NORMED),
    },
    activation="intermediate.intermediate_act_fn",
    heads="attention.self",
    n_heads="num_attention_heads",
    hidden_act="hidden_act",
    buffers={"embeddings.position_ids": "columns", "embeddings.token_type_ids": "zeros"},
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    config=_bert_config,
)  # fmt: skip

COVERED = (BERT,)


def find(kind: type) -> Mapping | None:
    """The mapping of exactly this class, not of one derived from it, which may compute something else."""
    for mapping in COVERED:
        if kind.__module__ == mapping.module and kind.__name__ == mapping.model:
            return mapping
    return None


def is_of_sentences(kind: type, name: str) -> bool:
    """Whether it is exactly the class of that name of sentence-transformers, such as "SentenceTransformer"."""
    return kind.__module__.split(".")[0] == "sentence_transformers" and kind.__name__ == name


def covered() -> str:
    """The covered classes in words, for messages."""
    names = ", ".join(mapping.model for mapping in COVERED)
    return (
        f"{names} of transformers, models and pipelines with one of them inside (BertFor..., AutoModel), "
        "SentenceTransformer and CrossEncoder"
    )
