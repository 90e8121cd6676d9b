"""This module describes a family of encoders: its names, and its differences from BERT.

A `Family` is a table. It has the names that a checkpoint of the family uses for a parameter, a module or a setting. It
has the first position of tokens, the parts of BERT that the family lacks, and the form of its heads. A family with
other layers than BERT's also has its own text, which its table names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Pairs (theirs, ours) of dotted paths of modules or parameters. `*` is the number of a layer. What follows a path is
# kept.
Names = tuple[tuple[str, str], ...]

# The rule for the first position.
COLUMN = "column"  # A position is the column index.
# The first token has the padding id + 1, and the count goes on over all ids that are not the padding id. The padding id
# itself has the position "padding id", for every mask (Liu et al., "RoBERTa", 2019, and fairseq's make_positions).
AFTER_PADDING = "after_padding"


@dataclass(frozen=True)
class Head:
    """A `Head` describes how a family's head differs from the head of BERT's class of the same name."""

    names: Names = ()  # As in Family, for the modules beside the encoder.
    older_names: Names = ()  # The same; they are read, and not written.
    pooler: bool = False  # Whether the head reads the encoder's pooler.
    own_pooler: bool = False  # Whether it has its own pooler, with dropout and activation from settings.
    # The activation of the head's dense layer. In a head for masked tokens, None is the config's hidden_act. In a head
    # for whole sequences the layer is between the first token and the classifier. None means that there is no such
    # layer, as in BERT, which has it in its pooler.
    activation: str | None = None
    # Settings that hold the dropout probability; the first that is not None counts.
    dropout: tuple[str, ...] = ("classifier_dropout", "hidden_dropout_prob")
    # Whether a dense layer, an activation and a norm are between the encoder's states and the classifier, under `head`.
    transform: bool = False
    dropout_first: bool = False  # Whether dropout applies to the first token, too.
    # Whether the head for pairs of sentences predicts their order. It then has dropout and num_labels classes.
    sentence_order: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """A `Family` has the names in models of one ``model_type`` of transformers, and their differences from BERT."""

    model_type: str
    classes: str  # The beginning of their class names.
    prefix: str  # The prefix of the encoder's names under a head.
    heads: Mapping[str, Head]  # By the part after "For" in a class name.
    names: Names = ()  # Paths in the encoder that are not BERT's; the others are the same.
    settings: tuple[tuple[str, str], ...] = ()  # Keys of config.json that are not BERT's, and the BertConfig fields.
    defaults: Mapping[str, Any] = field(default_factory=dict)  # BertConfig fields that a config.json may lack.
    fixed: Mapping[str, Any] = field(default_factory=dict)  # BertConfig fields that no config.json has.
    positions: str = COLUMN  # COLUMN or AFTER_PADDING.
    # Supported values of position_embedding_type; None if the family's code does not read that setting.
    position_types: tuple[str, ...] | None = ("absolute",)
    token_types: bool = True  # Whether there is a table of segments.
    pooler: bool = True  # Whether the bare model has a pooler.
    attention_output_dropout: bool = True  # Whether there is dropout between attention and its norm.
    output_dropout: bool = True  # Whether there is dropout between the feed-forward part and its norm.
    projection: bool = False  # Whether the embeddings have their own width, `embedding_size`, and a linear layer.
    always_projected: bool = False  # Whether the linear exists even if that width equals the layers' width.
    # The names in the hub's own files, if they are not transformers'. They are read, and not written.
    older_names: Names = ()
    older_prefix: str | None = None
    older_settings: tuple[tuple[str, str], ...] = ()
    stored_type: str | None = None  # The model_type in config.json, if it is another family's.
    # Pairs of a fused module of the hub's, under our name, and of the modules of its rows, from first to last.
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    segments_optional: bool = False  # Whether type_vocab_size may be 0.
    text_bias: bool = True  # Whether the linears of its text have biases, if its config has no setting for it.
    shared_layers: bool = False  # Whether layers share weights: all layers of one of `num_hidden_groups` have the same.
    text: str = "bert"  # The text of its layers: the file of fastbert.models, and of fastbert.reference.
    required: Mapping[str, Any] = field(default_factory=dict)  # BertConfig fields with one fixed value in its code.
    # The differences if a config.json says "legacy": false, for example in DeBERTa's head for masked tokens.
    not_legacy: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""  # The class of the tokenizer in transformers, without "Tokenizer".
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # Names that are not BERT's, and may not be stored.
    segments: bool = True  # Whether the tokenizer gives segment ids at all.

    def of(self, extra: Mapping[str, Any]) -> Family:
        """Returns the table for a config with these settings beside BertConfig's fields."""
        if not self.not_legacy or extra.get("legacy", True):
            return self
        return replace(self, **self.not_legacy)

    def to_ours(self, name: str) -> str:
        """Returns our name of a module or parameter of their bare model. A name that no table has stays as it is."""
        return _renamed(name, self.names + self.older_names) or name

    def to_theirs(self, name: str) -> str:
        """Inverts `to_ours`."""
        return _renamed(name, _swapped(self.names)) or name

    def state_to_ours(self, name: str, head: str | None = None) -> str:
        """Returns our name of a checkpoint's tensor, with or without the prefix. head: of the model that reads it."""
        for prefix in (self.prefix, self.older_prefix):
            if prefix and name.startswith(prefix):
                return "bert." + self.to_ours(name.removeprefix(prefix))
        names = () if head is None else self.heads[head].names + self.heads[head].older_names
        return _renamed(name, names) or self.to_ours(name)

    def state_to_theirs(self, name: str, head: str | None = None) -> str:
        """Returns their name of one of our tensors, in a model with that head, or in the bare model."""
        if head is None:
            return self.to_theirs(name)
        if name.startswith("bert."):
            return self.prefix + self.to_theirs(name.removeprefix("bert."))
        return _renamed(name, _swapped(self.heads[head].names)) or name

    def head(self, task: str) -> Head:
        """Returns the head by the part after "For" in a class name. Raises ValueError for an unsupported head."""
        if task not in self.heads:
            covered = ", ".join(f"BertFor{name}" for name in self.heads)
            raise ValueError(f"BertFor{task}: not covered for model_type {self.model_type!r}, which has {covered}")
        return self.heads[task]

    def cut(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Splits tensors of fused modules, under our names, into the tensors of the single modules."""
        whole: dict[str, Any] = {}
        for name, tensor in state.items():
            path, _, end = name.rpartition(".")
            parts = next((parts for fused, parts in self.fused if path.endswith(f".{fused}")), None)
            if parts is None:
                whole[name] = tensor
                continue
            before = path.rpartition(".")[0].rpartition(".")[0]
            names = [f"{before}.{part}.{end}" for part in parts]
            whole.update(zip(names, tensor.chunk(len(parts)), strict=True))
        return whole

    def config(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Renames the content of their config.json to BertConfig's fields, and adds the family's defaults."""
        stored = {name: value for name, value in self.config_names(data).items() if name not in self.fixed}
        return {**self.defaults, **stored, **self.fixed}

    def config_names(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Renames settings to BertConfig's fields. If a setting has both names, the value under their name counts."""
        older = {name: ours for name, ours in self.older_settings if ours not in data}
        data = {older.get(name, name): value for name, value in data.items()}
        ours = dict(self.settings)
        return {name: data[name] for name in data if name not in ours} | {
            ours[name]: data[name] for name in data if name in ours
        }

    def config_to_theirs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Renames BertConfig's fields to the keys of their config.json."""
        theirs = {ours: name for name, ours in self.settings}
        return {theirs.get(name, name): value for name, value in values.items() if name not in self.fixed}

    def class_name(self, ours: str) -> str:
        """Returns their name of one of our classes, as "RobertaModel" for "BertModel". Another name stays as it is."""
        return self.classes + ours.removeprefix("Bert") if ours.startswith("Bert") else ours


def _renamed(name: str, names: Iterable[tuple[str, str]]) -> str | None:
    """Replaces the longest path of `names` at the start of the name. Returns None if there is none."""
    for before, after in sorted(names, key=lambda pair: -pair[0].count(".")):
        start = re.match(re.escape(before).replace(r"\*", r"(\d+)") + r"(?=\.|$)", name)
        if start:
            for number in start.groups():
                after = after.replace("*", number, 1)
            return after + name[start.end() :]
    return None


def _swapped(names: Names) -> Names:
    return tuple((ours, theirs) for theirs, ours in names)
