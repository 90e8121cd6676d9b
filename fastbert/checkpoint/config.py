"""This module holds `BertConfig`, the shape and settings of a model, and reads and writes ``config.json``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.config_access import DEFAULTS, UNSUPPORTED, ConfigAccess, refuse_unsupported
from fastbert.checkpoint.families import family_of
from fastbert.checkpoint.family import AFTER_PADDING, Family
from fastbert.checkpoint.files import read_json, write_text
from fastbert.checkpoint.folder import ARGUMENTS, resolve
from fastbert.checkpoint.later_families import model_type_of
from fastbert.checkpoint.rotary import modern_angles
from fastbert.checks import expect

logger = logging.getLogger("fastbert")

CONFIG_NAME = "config.json"
HIDDEN_ACTS = tuple(ACTIVATIONS)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@dataclass
class BertConfig(ConfigAccess):
    """A `BertConfig` holds the shape and settings of a model, with the names and defaults of transformers' class.

    ``model_type`` selects the family of the model, a table of fastbert.checkpoint.families. The fields always have
    BERT's names and defaults. ``from_dict`` translates the names of the family, and sets its defaults.

    ``embedding_size`` is the width of the embeddings in a family that projects them (ELECTRA); None means
    ``hidden_size``. ``dtype`` is the name of the dtype of the checkpoint ("float32", "bfloat16", "float16",
    "float64"), or None. ``hidden_act`` is "gelu" or "gelu_python" (erf form), "gelu_new" or "gelu_pytorch_tanh" (tanh
    form), "relu", or another name of fastbert.checkpoint.activations. Most of the others have no kernel.

    ``id2label`` maps class index to name. ``num_labels`` and ``label2id`` follow from it, and may be set. ``extra``
    keeps the other keys of a ``config.json``, so that ``save_pretrained`` loses none. These keys, and the names of
    transformers, are attributes too.

    Raises ValueError for a value that is invalid or not supported. ``validate()`` repeats these checks after a field
    was changed.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    id2label: dict[int, str] = field(default_factory=lambda: _default_labels(2))
    dtype: str | None = None
    architectures: list[str] | None = None
    model_type: str = "bert"
    embedding_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.family.fixed.items():
            setattr(self, name, value)
        if self.hidden_act == "gelu_python":
            self.hidden_act = "gelu"
        self.id2label = _labels(self.id2label)
        self.validate()
        if self.family.text == "gated_rotary_bert":
            self.extra = modern_angles(self)

    @property
    def num_labels(self) -> int:
        """Counts the classes of a classification head."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        expect(_is_int(value) and value > 0, "num_labels", value, "a positive whole number")
        if value != len(self.id2label):
            self.id2label = _default_labels(value)

    @property
    def label2id(self) -> dict[str, int]:
        """Maps class name to class index, the inverse of ``id2label``."""
        return {label: index for index, label in self.id2label.items()}

    @label2id.setter
    def label2id(self, value: Mapping[str, int]) -> None:
        self.id2label = _labels({index: label for label, index in value.items()})

    @property
    def head_size(self) -> int:
        """Returns the size of one attention head, ``hidden_size / num_attention_heads``."""
        return self.hidden_size // self.num_attention_heads

    @property
    def family(self) -> Family:
        """Returns the table of fastbert.checkpoint.families that the model follows."""
        return family_of(self.model_type).of(self.extra)

    @property
    def embedding_width(self) -> int:
        """Returns the width of the embedding tables."""
        width = self.embedding_size if self.family.projection else None
        return self.hidden_size if width is None else width

    @property
    def layer_order(self) -> tuple[int, ...]:
        """Returns for each layer the index of its weights: its own index, or in ALBERT that of its group."""
        n_layers, n_sets = self.num_hidden_layers, self._n_layer_sets()
        return tuple(i * n_sets // n_layers for i in range(n_layers))

    def _n_layer_sets(self) -> int:
        if not self.family.shared_layers:
            return self.num_hidden_layers
        n_sets: int = self.extra.get("num_hidden_groups", self.family.defaults["num_hidden_groups"])
        return n_sets

    @property
    def position_offset(self) -> int:
        """Returns the position of a text's first token."""
        if self.family.positions != AFTER_PADDING:
            return 0
        return (self.pad_token_id or 0) + 1  # `validate` refuses None here.

    @property
    def max_length(self) -> int:
        """Returns the greatest sequence length: the number of positions from that of the first token."""
        return self.max_position_embeddings - self.position_offset

    def validate(self) -> None:
        """Raises ValueError if a field has a value that is invalid or not supported."""
        family = self.family
        for name in _SIZES:
            value = getattr(self, name)
            none_fits = name == "type_vocab_size" and family.segments_optional and value == 0
            expect(_is_int(value) and (value > 0 or none_fits), name, value, "a positive whole number")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        for name in _DROPOUTS:
            value = getattr(self, name)
            if value is not None or name != "classifier_dropout":
                expect(_is_number(value) and 0 <= value < 1, name, value, "a probability in [0, 1)")
        eps, spread, pad = self.layer_norm_eps, self.initializer_range, self.pad_token_id
        expect(_is_number(eps) and eps > 0, "layer_norm_eps", eps, "a positive number")
        expect(_is_number(spread) and spread >= 0, "initializer_range", spread, "a number, 0 or more")
        # As for torch.nn.Embedding, a negative index counts from the end.
        fits = pad is None or (_is_int(pad) and -self.vocab_size <= pad < self.vocab_size)
        expect(fits, "pad_token_id", pad, f"None or a token id below vocab_size ({self.vocab_size})")
        if family.positions == AFTER_PADDING:
            fits = pad is not None and _is_int(pad) and pad >= 0
            expect(fits, "pad_token_id", pad, "a token id, 0 or more: positions begin after it")
            positions, least = self.max_position_embeddings, f"more than pad_token_id + 1 ({self.position_offset})"
            expect(positions > self.position_offset, "max_position_embeddings", positions, least)
        for name, value in family.required.items():
            got = self.extra.get(name, value) if name not in _FIELDS else getattr(self, name)
            expect(got == value, name, got, f"{value}: {family.classes} has no other")
        n_sets, n_layers = self._n_layer_sets(), self.num_hidden_layers
        fits = _is_int(n_sets) and n_sets > 0 and n_layers % n_sets == 0
        expect(fits, "num_hidden_groups", n_sets, f"a divisor of num_hidden_layers ({n_layers})")
        width = self.embedding_size
        fits = not family.projection or width is None or (_is_int(width) and width > 0)
        expect(fits, "embedding_size", width, "None or a positive whole number")
        tie = self.tie_word_embeddings
        expect(isinstance(tie, bool), "tie_word_embeddings", tie, "True or False")
        _expect_one_of("hidden_act", self.hidden_act, HIDDEN_ACTS)
        if self.problem_type is not None:
            _expect_one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.dtype is not None:
            _expect_one_of("dtype", self.dtype, DTYPES)
        names = self.architectures
        is_names = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
        expect(is_names, "architectures", names, "None or a list of class names")
        expect(isinstance(self.extra, dict), "extra", self.extra, "a dict")
        doubled = sorted(self.extra.keys() & (_FIELDS | _DERIVED))
        if doubled:
            raise ValueError(f"extra: holds {', '.join(doubled)}, which fields or properties of the config express")
        for name, value in self.extra.items():
            refuse_unsupported(name, value, family.position_types)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """Makes a config from the content of a ``config.json``. ``overrides`` replace its values.

        "model_type" (default "bert") selects the family, and so the names and defaults. ``num_labels=n`` keeps the
        labels of ``d`` if there are n of them, and otherwise names them LABEL_0, LABEL_1 and so on. "torch_dtype" is
        the old name of "dtype". Unknown keys of ``d`` are kept in ``extra``.

        Raises TypeError for an override that is neither a setting of BERT nor a key of ``d``. Raises ValueError for a
        bad value.
        """
        model_type = overrides.get("model_type", model_type_of(d))
        family = family_of("bert" if model_type is None else model_type)
        wanted = _named(family, overrides, d.keys())
        values = {**_modern(family.config(d)), **wanted, "model_type": family.model_type}
        return cls(**_fields_and_extra(values, "id2label" in wanted))

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a ``config.json`` that ``from_dict`` and transformers read, ``extra`` included."""
        values = dataclasses.asdict(self)
        values = {**values.pop("extra"), **values}
        if self.family.projection:
            values["embedding_size"] = self.embedding_width
        if self.family.stored_type is not None:
            values = {**self.family.defaults, **values, "model_type": self.family.stored_type}
        for name in ("dtype", "problem_type", "architectures", "embedding_size"):
            if values[name] is None:
                del values[name]
        return self.family.config_to_theirs({**values, "label2id": self.label2id})

    @classmethod
    def from_pretrained(cls, src: str | os.PathLike[str], **overrides: Any) -> BertConfig:
        """Reads a config from a local folder, a ``config.json`` file or a hub id.

        ``overrides`` are those of ``from_dict``, and arguments of ``folder.resolve``: revision, subfolder, cache_dir,
        token, local_files_only, force_download.

        Raises FileNotFoundError if the file is missing, and TypeError for an unknown override. Raises ValueError,
        which names the file, if it is not a JSON object, or if its model is not supported.
        """
        hub = {name: value for name in ARGUMENTS if (value := overrides.pop(name, None)) is not None}
        if isinstance(src, (str, os.PathLike)) and os.path.isfile(os.path.expanduser(src)):
            path = Path(src).expanduser()
        else:
            path = resolve(src, weights=False, **hub) / CONFIG_NAME
        d = read_json(path)
        try:
            _check_is_bert(d)
            return cls.from_dict(d, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, dir: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` to the folder ``dir``, and makes the folder if it is missing.

        Raises ValueError as ``validate`` does.
        """
        self.validate()
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        folder = Path(dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG_NAME, text + "\n")


_init = BertConfig.__init__


@functools.wraps(_init)
def _init_with_their_names(self: BertConfig, *args: Any, **settings: Any) -> None:
    """Accepts arguments of transformers' configs that are not fields: num_labels, label2id, output_hidden_states."""
    if settings.keys() - _FIELDS - {"extra"}:
        extra = settings.pop("extra", {})
        wanted = _named(family_of(settings.get("model_type", "bert")), settings)
        settings = _fields_and_extra(wanted, "id2label" in wanted)
        settings["extra"] = {**extra, **settings["extra"]}
    _init(self, *args, **settings)


BertConfig.__init__ = _init_with_their_names  # type: ignore[method-assign]

_FIELDS = frozenset(f.name for f in dataclasses.fields(BertConfig)) - {"extra"}
# Keys of a config.json that fields and properties express.
_DERIVED = frozenset(("num_labels", "label2id", "torch_dtype"))


def _named(family: Family, settings: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Renames settings with the family's names to BERT's and today's. Raises TypeError for an unknown one."""
    renamed = family.config_names(settings)
    unknown = sorted(
        renamed.keys()
        - (_FIELDS | _DERIVED | UNSUPPORTED.keys() | DEFAULTS.keys() | family.defaults.keys() | set(known))
    )
    if unknown:
        names = ", ".join(sorted(_FIELDS))
        raise TypeError(f"unknown config override {', '.join(unknown)}; expected one of num_labels, {names}")
    return _modern(renamed)


def _fields_and_extra(values: dict[str, Any], labels_count: bool) -> dict[str, Any]:
    """Sorts settings with today's names into arguments of BertConfig.

    labels_count: whether id2label outweighs num_labels.
    """
    num_labels = values.pop("num_labels", None)
    if num_labels is not None and not labels_count:
        expect(_is_int(num_labels) and num_labels > 0, "num_labels", num_labels, "a positive whole number")
        if len(values.get("id2label", ())) != num_labels:
            values["id2label"] = _default_labels(num_labels)
    fields = {name: values.pop(name) for name in _FIELDS & values.keys()}
    return {**fields, "extra": values}


def _modern(d: Mapping[str, Any]) -> dict[str, Any]:
    """Copies ``d`` under today's names: "dtype", and for the labels "id2label" or "num_labels" or neither."""
    values = copy.deepcopy(dict(d))
    torch_dtype = values.pop("torch_dtype", None)
    if values.get("dtype") is None and torch_dtype is not None:
        values["dtype"] = torch_dtype

    id2label, label2id = values.pop("id2label", None), values.pop("label2id", None)
    if id2label is None and label2id:
        expect(isinstance(label2id, Mapping), "label2id", label2id, "label names to class indices")
        id2label = {index: label for label, index in label2id.items()}
    if id2label is not None:
        values["id2label"] = _labels(id2label)
        num_labels = values.pop("num_labels", None)
        if num_labels not in (None, len(id2label)):
            logger.warning("num_labels is %r, but id2label names %d: taking id2label", num_labels, len(id2label))
    return values


def _check_is_bert(d: Mapping[str, Any]) -> None:
    """Refuses a config.json without a model_type, unless it is an old BERT's: early conversion scripts wrote none."""
    if d.get("model_type") is not None:
        return
    architectures = d.get("architectures")
    if architectures:
        first = architectures[0] if isinstance(architectures, list) else architectures
        is_bert = str(first).startswith("Bert")
    else:
        is_bert = "hidden_size" in d
    if not is_bert:
        raise ValueError(
            f"got no model_type, expected 'bert' (architectures: {architectures!r}, "
            f"hidden_size: {d.get('hidden_size')!r}), which an old BERT alone may lack"
        )


def _default_labels(n: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(n)}


def _labels(id2label: Any) -> dict[int, str]:
    """Returns ``id2label`` with whole numbers as keys, which are strings in JSON."""
    expect(isinstance(id2label, Mapping) and len(id2label) > 0, "id2label", id2label, "class indices to label names")
    try:
        return {int(index): str(label) for index, label in id2label.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"id2label: got keys {list(id2label)}, expected class indices") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _expect_one_of(name: str, value: Any, supported: tuple[str, ...]) -> None:
    expect(value in supported, name, value, f"one of {', '.join(supported)}")
