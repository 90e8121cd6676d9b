"""Records of pairs, triplets, scored pairs, lists and vectors become examples, and then datasets for training."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.training.finetuning.records import Record, RecordError, read_records

logger = logging.getLogger("fastbert")

ALIASES = {"anchor": ("anchor", "sentence1", "query", "text"), "positive": ("positive", "sentence2", "text_pair")}
NEEDED = (
    "(anchor, positive), with negative, (sentence1, sentence2, score), (query, documents, labels), (text, label) "
    "or text"
)


@dataclass(frozen=True)
class Example:
    """An Example is one record. Its kind determines its fields.

    "pairs": anchor, positive, optional negatives, optional score (a margin, or one for each text). "scored": anchor,
    positive, score. "lists": anchor, documents, score with one number for each. "texts": anchor, optionally its
    translation as positive, and the vector of a teacher. "labelled": anchor, label.
    """

    kind: str
    place: str
    anchor: str
    positive: str = ""
    negatives: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    score: float | tuple[float, ...] | None = None
    vector: np.ndarray | None = None
    label: str = ""


def read_examples(source: Any, kind: str = "auto", columns: Mapping[str, str] | None = None,
                  score_scale: float = 1.0) -> list[Example]:  # fmt: skip
    """Reads records of one kind as examples; scores are divided by score_scale.

    Raises RecordError, with the position, for a record without a text, with a score that is not a finite number, or of
    a kind other than the first record's; ValueError if there are no records.
    """
    examples = [_example(record, score_scale) for record in read_records(source, kind=kind, columns=columns)]
    if not examples:
        raise ValueError("train: there are no records")
    first = examples[0]
    for example in examples:
        if example.kind != first.kind or (example.score is None) != (first.score is None):
            raise RecordError(f"{example.place}: has other columns than {first.place}, whose records are {first.kind}")
        if (example.vector is None) != (first.vector is None):
            raise RecordError(f"{example.place}: expected a vector in each record or in none")
        if example.vector is not None and first.vector is not None and len(example.vector) != len(first.vector):
            raise RecordError(f"{example.place}: vector has {len(example.vector)} numbers, others {len(first.vector)}")
        if first.kind == "texts" and bool(example.positive) != bool(first.positive):
            raise RecordError(f"{example.place}: expected a translation in each record or in none")
    return examples


def _example(record: Record, scale: float) -> Example:
    values = {name: value for name, value in record.values.items() if value is not None}
    place = record.place
    anchor = _text(values, ALIASES["anchor"], place)
    if anchor is None:
        raise RecordError(f"{place}: has the columns {', '.join(values)}, expected {NEEDED}")
    if "documents" in values:
        documents = tuple(values["documents"])
        score = _score(values, ("labels", "scores", "label", "score"), scale, place)
        if not isinstance(score, tuple) or len(score) != len(documents) or not documents:
            raise RecordError(f"{place}: labels: expected a list of {len(documents)} numbers, one for each document")
        for document in documents:
            _checked("documents", document, place)
        return Example("lists", place, anchor, documents=documents, score=score)
    positive = _text(values, ALIASES["positive"], place)
    if "vector" in values or positive is None:
        vector = values.get("vector")
        if vector is not None:
            try:
                vector = np.asarray(vector, np.float32)
            except (TypeError, ValueError):
                vector = np.full(1, np.nan)
            if vector.ndim != 1 or not np.isfinite(vector).all():
                raise RecordError(f"{place}: vector: expected a list of finite numbers")
        elif "label" in values:
            return Example("labelled", place, anchor, label=_label(values["label"], place))
        return Example("texts", place, anchor, positive or "", vector=vector)
    negatives = _negatives(values, place)
    score = _score(values, ("score", "label", "scores"), scale, place)
    if score is not None and not negatives:
        if isinstance(score, tuple):
            raise RecordError(f"{place}: score: expected a number, got a list")
        return Example("scored", place, anchor, positive, score=score)
    if isinstance(score, tuple) and len(score) not in (len(negatives), len(negatives) + 1):
        raise RecordError(f"{place}: score: got {len(score)} numbers, expected one for each of {len(negatives)} "
                          "negatives (margins), or one for the positive and each negative")  # fmt: skip
    if score is not None and not isinstance(score, tuple) and len(negatives) != 1:
        raise RecordError(f"{place}: score: got one number for {len(negatives)} negatives")
    return Example("pairs", place, anchor, positive, negatives, score=score)


def _text(values: Mapping[str, Any], names: Iterable[str], place: str) -> str | None:
    for name in names:
        if name in values:
            return _checked(name, values[name], place)
    return None


def _checked(name: str, text: Any, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"{place}: {name}: expected a text, got {text!r}")
    return text


def _label(value: Any, place: str) -> str:
    """Returns the name of a class. A fractional number is invalid."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise RecordError(f"{place}: label: expected the name or number of a class, got {value!r}")
    return str(value).strip()


def _negatives(values: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Returns the texts of `negative`, `negatives`, and `negative_1` and so on."""
    numbered = sorted((name for name in values if name.startswith("negative_") and name[9:].isdigit()),
                      key=lambda name: int(name[9:]))  # fmt: skip
    texts: list[str] = []
    for name in ("negative", "negatives", *numbered):
        value = values.get(name, ())
        texts += [_checked(name, text, place) for text in ([value] if isinstance(value, str) else value)]
    return tuple(texts)


def _score(values: Mapping[str, Any], names: Iterable[str], scale: float, place: str) -> Any:
    for name in names:
        if name in values:
            value = values[name]
            several = isinstance(value, (list, tuple, np.ndarray))
            numbers = []
            for each in value if several else [value]:
                try:
                    number = float(each) / scale
                except (TypeError, ValueError):
                    number = math.nan
                if not math.isfinite(number):
                    raise RecordError(f"{place}: {name}: expected a finite number, got {each!r}")
                numbers.append(number)
            return tuple(numbers) if several else numbers[0]
    return None


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Returns the training examples and the held-out examples: a share of the anchors, with all their examples.

    For labelled texts it is a share of each class; at least two texts of each class stay for training.
    """
    if examples and examples[0].kind == "labelled":
        return _split_classes(examples, share, seed)
    anchors = list(dict.fromkeys(example.anchor for example in examples))
    n_held = round(share * len(anchors))
    if share and len(anchors) > 1:
        n_held = min(max(n_held, 1), len(anchors) - 1)
    order = np.random.default_rng(seed).permutation(len(anchors))
    held = {anchors[i] for i in order[:n_held]}
    return [e for e in examples if e.anchor not in held], [e for e in examples if e.anchor in held]


def _split_classes(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    texts: dict[str, list[str]] = {}
    for example in dict.fromkeys((e.anchor, e.label) for e in examples):
        texts.setdefault(example[1], []).append(example[0])
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for label in sorted(texts):
        n_held = max(0, min(round(share * len(texts[label])), len(texts[label]) - 2))
        held.update(texts[label][i] for i in rng.permutation(len(texts[label]))[:n_held])
    return [e for e in examples if e.anchor not in held], [e for e in examples if e.anchor in held]


def checked_classes(examples: Sequence[Example]) -> list[Example]:
    """Returns labelled examples with distinct texts, except classes with one text, which a warning counts.

    Raises RecordError for a text with two classes, and ValueError if fewer than two classes have two texts.
    """
    first: dict[str, Example] = {}
    for example in examples:
        known = first.setdefault(example.anchor, example)
        if known.label != example.label:
            raise RecordError(f"{example.place}: label {example.label!r}, but {known.place} has the same text as "
                              f"{known.label!r}")  # fmt: skip
    counts = Counter(example.label for example in first.values())
    if len(counts) == 1:
        raise ValueError(f"label: all records are of the class {next(iter(counts))!r}; expected two classes or more")
    single = sorted(label for label, count in counts.items() if count == 1)
    if len(counts) - len(single) < 2:
        raise ValueError(f"label: {len(single)} of {len(counts)} classes have one text; expected two texts and more of "
                         "two classes and more")  # fmt: skip
    if single:
        shown = ", ".join(single[:10]) + (", ..." if len(single) > 10 else "")
        logger.warning("label: %d classes have one text, and are left out of training: %s", len(single), shown)
    return [example for example in first.values() if counts[example.label] > 1]


def with_negatives(examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[Example]:
    """Adds mined texts to the negatives of each example."""
    return [
        dataclasses.replace(example, negatives=(*example.negatives, *(t for t in more if t not in example.negatives)))
        for example, more in zip(examples, texts, strict=True)
    ]


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Makes a datasets.Dataset from rows, or a DatasetDict with one set for each combination of columns.

    A trainer draws each batch from one of the sets, in proportion to their rows.
    """
    import datasets  # type: ignore[import-untyped]

    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    sets = {
        f"{len(names)} columns": datasets.Dataset.from_dict({name: [row[name] for row in group] for name in names})
        for names, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    }
    return next(iter(sets.values())) if len(sets) == 1 else datasets.DatasetDict(sets)


def numbers_of(examples: Sequence[Example]) -> dict[str, Any]:
    """Returns facts about examples for a report: their number by kind, and by number of negatives or by class."""
    if examples and examples[0].kind == "labelled":
        classes = Counter(example.label for example in examples)
        return {"records": len(examples), "kind": "labelled", "classes": dict(sorted(classes.items()))}
    negatives = Counter(len(example.negatives) for example in examples)
    return {
        "records": len(examples),
        "kind": examples[0].kind if examples else "none",
        "anchors": len({example.anchor for example in examples}),
        "negatives": {str(n): count for n, count in sorted(negatives.items())},
    }
