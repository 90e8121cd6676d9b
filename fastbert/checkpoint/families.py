"""The encoders that are BERT under other names: one table each of what their files call things, and of what differs.

The modules of fastbert.models.bert serve all of them. A table says what a checkpoint of the family calls a parameter, a
module or a setting, where its tokens' positions count from, which of BERT's parts it lacks, and how its heads look.

What no table can say yet, and would need code of its own in the model: a relative position bias (MPNet), rotary
positions, gated linear units and windows (ModernBERT).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# (theirs, ours): dotted paths of modules or parameters, `*` for the number of a layer. What follows a path is kept.
Names = tuple[tuple[str, str], ...]

COLUMN = "column"
AFTER_PADDING = "after_padding"


@dataclass(frozen=True)
class Head:
    """A head of a family, and how it differs from that of BERT's class of the same name.

    names: as in Family, for what stands beside the encoder. pooler: whether the head reads the encoder's pooler.
    activation: for masked tokens that of the dense layer, where it is not the config's hidden_act; for whole sequences
    that of a dense layer between the first token and the classes, which BERT has in its pooler. dropout: settings whose
    first that is not None is the probability; dropout_first: whether the first token is dropped out too.
    """

    names: Names = ()
    pooler: bool = False
    activation: str | None = None
    dropout: tuple[str, ...] = ("classifier_dropout", "hidden_dropout_prob")
    dropout_first: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """What models of one `model_type` of transformers call things, and where they differ from BERT.

    classes: what their class names begin with. prefix: what stands before the encoder's names under a head. names:
    paths in the encoder that are not BERT's, the others are the same. heads: by what follows "For" in a class name.
    settings: keys of config.json and the BertConfig fields they stand for, where the names differ. defaults: BertConfig
    fields that a config.json may lack. fixed: those that it does not have, with the value the family takes.

    positions: "column", the column index, or "after_padding": the padding id + 1 for the first token, counting on for
    every id that is not the padding id, and the padding id itself for one that is, whatever the mask says (Liu et al.,
    "RoBERTa", 2019, and fairseq's make_positions). token_types: whether there is a table of segments. pooler: whether
    the bare model has one. projection: whether the embeddings have a width of their own, `embedding_size`, and a
    linear layer after them. tokenizer: its class in transformers, without "Tokenizer"; special_tokens: names that a
    tokenizer_config.json may lack, where they are not BERT's; segments: whether it gives them ids at all.
    """

    model_type: str
    classes: str
    prefix: str
    heads: Mapping[str, Head]
    names: Names = ()
    settings: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    positions: str = COLUMN
    token_types: bool = True
    pooler: bool = True
    projection: bool = False
    tokenizer: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    segments: bool = True

    def to_ours(self, name: str) -> str:
        """Our name of a module or parameter of their bare model; one that the tables do not know stays as it is."""
        return _renamed(name, self.names) or name

    def to_theirs(self, name: str) -> str:
        """The inverse of `to_ours`."""
        return _renamed(name, _swapped(self.names)) or name

    def state_to_ours(self, name: str, head: str | None = None) -> str:
        """Our name of a tensor in a checkpoint, which may have the prefix or not. head: of the model that reads it."""
        if self.prefix and name.startswith(self.prefix):
            return "bert." + self.to_ours(name.removeprefix(self.prefix))
        names = () if head is None else self.heads[head].names
        return _renamed(name, names) or self.to_ours(name)

    def state_to_theirs(self, name: str, head: str | None = None) -> str:
        """Their name of a tensor of ours, for a model with that head, or for the bare model."""
        if head is None:
            return self.to_theirs(name)
        if name.startswith("bert."):
            return self.prefix + self.to_theirs(name.removeprefix("bert."))
        return _renamed(name, _swapped(self.heads[head].names)) or name

    def head(self, task: str) -> Head:
        """The head that follows "For" in a class name. Raises ValueError, with what is covered, for another."""
        if task not in self.heads:
            covered = ", ".join(f"BertFor{name}" for name in self.heads)
            raise ValueError(f"BertFor{task}: not covered for model_type {self.model_type!r}, which has {covered}")
        return self.heads[task]

    def config(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The content of their config.json under the names of BertConfig's fields, with the family's defaults."""
        stored = {name: value for name, value in self.config_names(data).items() if name not in self.fixed}
        return {**self.defaults, **stored, **self.fixed}

    def config_names(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under the names of BertConfig's fields. Of two names of one thing, theirs counts."""
        ours = dict(self.settings)
        return {name: data[name] for name in data if name not in ours} | {
            ours[name]: data[name] for name in data if name in ours
        }

    def config_to_theirs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """BertConfig's fields under the names of their config.json."""
        theirs = {ours: name for name, ours in self.settings}
        return {theirs.get(name, name): value for name, value in values.items() if name not in self.fixed}

    def class_name(self, ours: str) -> str:
        """Their name of one of our classes: "BertModel" is "RobertaModel"; another name stays as it is."""
        return self.classes + ours.removeprefix("Bert") if ours.startswith("Bert") else ours


def _renamed(name: str, names: Iterable[tuple[str, str]]) -> str | None:
    """The name with the longest path of `names` that it starts with exchanged, or None where it starts with none."""
    for before, after in sorted(names, key=lambda pair: -pair[0].count(".")):
        found = re.match(re.escape(before).replace(r"\*", r"(\d+)") + r"(?=\.|$)", name)
        if found:
            for number in found.groups():
                after = after.replace("*", number, 1)
            return after + name[found.end() :]
    return None


def _swapped(names: Names) -> Names:
    return tuple((ours, theirs) for theirs, ours in names)


_BERT_HEADS = {
    "PreTraining": Head(pooler=True),
    "MaskedLM": Head(),
    "NextSentencePrediction": Head(pooler=True),
    "SequenceClassification": Head(pooler=True),
    "MultipleChoice": Head(pooler=True),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}
_ROBERTA_HEADS = {
    "MaskedLM": Head(
        names=(
            ("lm_head.dense", "cls.predictions.transform.dense"),
            ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
            ("lm_head", "cls.predictions"),
        ),
        activation="gelu",
    ),
    "SequenceClassification": Head(activation="tanh", dropout_first=True),
    "MultipleChoice": Head(pooler=True, dropout=("hidden_dropout_prob",)),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}
_DISTILBERT_HEADS = {
    "MaskedLM": Head(
        names=(
            ("vocab_transform", "cls.predictions.transform.dense"),
            ("vocab_layer_norm", "cls.predictions.transform.LayerNorm"),
            ("vocab_projector.bias", "cls.predictions.bias"),
            ("vocab_projector", "cls.predictions.decoder"),
        )
    ),
    "SequenceClassification": Head(
        names=(("pre_classifier", "classifier.dense"), ("classifier", "classifier.out_proj")),
        activation="relu",
        dropout=("classifier_dropout",),
    ),
    "TokenClassification": Head(dropout=("hidden_dropout_prob",)),
    "QuestionAnswering": Head(dropout=("qa_dropout",)),
}
_ELECTRA_HEADS = {
    "MaskedLM": Head(
        names=(
            ("generator_predictions.dense", "cls.predictions.transform.dense"),
            ("generator_predictions.LayerNorm", "cls.predictions.transform.LayerNorm"),
            ("generator_lm_head.bias", "cls.predictions.bias"),
            ("generator_lm_head", "cls.predictions.decoder"),
        ),
        activation="gelu",
    ),
    "SequenceClassification": Head(activation="gelu", dropout_first=True),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}

_ROBERTA_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def _roberta(model_type: str, classes: str, vocab_size: int) -> Family:
    return Family(
        model_type,
        classes,
        prefix="roberta.",
        heads=_ROBERTA_HEADS,
        defaults={"vocab_size": vocab_size, "pad_token_id": 1},
        positions=AFTER_PADDING,
        tokenizer=classes,
        special_tokens=_ROBERTA_TOKENS,
        segments=False,
    )


_LAYER, _THEIR_LAYER = "encoder.layer.*", "transformer.layer.*"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "Bert", prefix="bert.", heads=_BERT_HEADS, tokenizer="Bert"),
        _roberta("roberta", "Roberta", 50265),
        _roberta("xlm-roberta", "XLMRoberta", 30522),
        _roberta("camembert", "Camembert", 30522),
        Family(
            "distilbert",
            "DistilBert",
            prefix="distilbert.",
            heads=_DISTILBERT_HEADS,
            names=(
                (f"{_THEIR_LAYER}.attention.q_lin", f"{_LAYER}.attention.self.query"),
                (f"{_THEIR_LAYER}.attention.k_lin", f"{_LAYER}.attention.self.key"),
                (f"{_THEIR_LAYER}.attention.v_lin", f"{_LAYER}.attention.self.value"),
                (f"{_THEIR_LAYER}.attention.out_lin", f"{_LAYER}.attention.output.dense"),
                (f"{_THEIR_LAYER}.sa_layer_norm", f"{_LAYER}.attention.output.LayerNorm"),
                (f"{_THEIR_LAYER}.ffn.lin1", f"{_LAYER}.intermediate.dense"),
                (f"{_THEIR_LAYER}.ffn.lin2", f"{_LAYER}.output.dense"),
                (f"{_THEIR_LAYER}.output_layer_norm", f"{_LAYER}.output.LayerNorm"),
                ("transformer", "encoder"),
            ),
            settings=(
                ("dim", "hidden_size"),
                ("n_layers", "num_hidden_layers"),
                ("n_heads", "num_attention_heads"),
                ("hidden_dim", "intermediate_size"),
                ("activation", "hidden_act"),
                ("dropout", "hidden_dropout_prob"),
                ("attention_dropout", "attention_probs_dropout_prob"),
                ("seq_classif_dropout", "classifier_dropout"),
            ),
            defaults={"num_hidden_layers": 6, "classifier_dropout": 0.2, "qa_dropout": 0.1},
            fixed={"layer_norm_eps": 1e-12, "type_vocab_size": 1},
            token_types=False,
            pooler=False,
            tokenizer="DistilBert",
            segments=False,
        ),
        Family(
            "electra",
            "Electra",
            prefix="electra.",
            heads=_ELECTRA_HEADS,
            defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
            pooler=False,
            projection=True,
            tokenizer="Electra",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The table of a model_type. Raises ValueError, with the list of what is covered, for one that has none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def our_class(name: str) -> str:
    """Our name of one of their classes: "XLMRobertaForMaskedLM" is "BertForMaskedLM"; another name stays as it is."""
    for family in sorted(FAMILIES.values(), key=lambda family: -len(family.classes)):
        if name.startswith(family.classes):
            return "Bert" + name.removeprefix(family.classes)
    return name
