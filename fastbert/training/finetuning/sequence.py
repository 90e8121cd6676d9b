"""The tasks with one output for each input: classes, several labels, numbers, and the choice among continuations."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastbert.training.finetuning.loading import pretrained
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import Task

if TYPE_CHECKING:
    from fastbert.training.finetuning.records import Record

logger = logging.getLogger("fastbert")


class SequenceTask(Task):
    """What these tasks share: text and text_pair of a record become one input."""

    head = "AutoModelForSequenceClassification"
    problem: str
    labels: list[str]

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        return pretrained(self.head, settings, self.labels, problem_type=self.problem, **options)

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        labels = [self.label(record) for record in records]  # an unknown label shows before the long work
        texts = [text_of(record) for record in records]
        pairs = pairs_of(records)
        encoded = tokenizer(texts, pairs, truncation=True, max_length=settings.max_length)
        return [
            {**{name: values[i] for name, values in encoded.items()}, "labels": label} for i, label in enumerate(labels)
        ]

    def label(self, record: Record) -> Any:
        """Returns the label of a record as the collator takes it. Raises RecordError for one that is unknown."""
        raise NotImplementedError

    def targets(self, records: Sequence[Record]) -> np.ndarray:
        """Returns the labels of records as an array, for the metrics."""
        return np.array([self.label(record) for record in records])


class Classify(SequenceTask):
    """One of several classes for a text, or for a pair of texts."""

    name, headline, problem = "classify", "accuracy", "single_label_classification"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        counts = Counter(class_of(record, settings) for record in records)
        if all(is_fraction(label) for label in counts):
            raise _error(records[0], "label: every label is a number with a fraction; the task for these is regress")
        self.labels = _ordered(counts, settings)
        if len(self.labels) < 2:
            raise ValueError(f"label: expected two classes or more, got {', '.join(self.labels) or 'none'}")
        _warn_of_rare(counts)
        self.settings = settings
        self._numbers = {name: i for i, name in enumerate(self.labels)}
        self._counts = [counts[name] for name in self.labels]
        return {"labels": self.labels, "counts": dict(zip(self.labels, self._counts, strict=True))}

    def label(self, record: Record) -> int:
        name = class_of(record, self.settings)
        if name not in self._numbers:
            raise _error(record, f"label: {name!r} is not among those of training: {_listed(self.labels)}")
        return self._numbers[name]

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        if settings.class_weights == "none":
            return None
        counts = torch.tensor(self._counts, dtype=torch.float32)
        weights = torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 1.0)

        def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            of_classes = weights.to(outputs.logits.device)
            loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, of_classes, reduction="sum")
            return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return weighted

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return _softmax(np.asarray(logits, dtype=np.float64))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics

        return metrics.classification(self.targets(records), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        return _interval_of_accuracy(self.targets(records), predictions)

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        return {"labels": self.targets(records), "probabilities": predictions, "names": self.labels}


class Multilabel(SequenceTask):
    """Any number of labels for a text, none included."""

    name, headline, problem = "multilabel", "micro_f1", "multi_label_classification"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        self.settings = settings
        counts = Counter(name for record in records for name in labels_of(record, settings))
        self.labels = _ordered(counts, settings)
        if not self.labels:
            raise ValueError("labels: no record has any")
        _warn_of_rare(counts)
        self._counts, self._n = [counts[name] for name in self.labels], len(records)
        without = sum(not labels_of(record, settings) for record in records)
        shown = dict(zip(self.labels, self._counts, strict=True))
        return {"labels": self.labels, "counts": shown, "records without a label": without}

    def label(self, record: Record) -> list[float]:
        names = labels_of(record, self.settings)
        for name in names:
            if name not in self.labels:
                raise _error(record, f"labels: {name!r} is not among those of training: {_listed(self.labels)}")
        return [float(label in names) for label in self.labels]

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        if settings.class_weights == "none":
            return None
        counts = torch.tensor(self._counts, dtype=torch.float32)
        weights = torch.where(counts > 0, (self._n - counts) / counts.clamp(min=1), 1.0).clamp(min=1e-3)

        def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            of_labels, logits = weights.to(outputs.logits.device), outputs.logits.float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=of_labels, reduction="sum"
            )
            return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

        return weighted

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return 1 / (1 + np.exp(-np.clip(np.asarray(logits, dtype=np.float64), -700, 700)))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics

        return metrics.multilabel(self.targets(records).astype(np.int64), predictions, self.settings.threshold)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        from fastbert.training.finetuning import metrics

        def micro_f1(given: np.ndarray, true: np.ndarray) -> float:
            return float(2 * (given & true).sum() / max((given.sum() + true.sum()), 1))

        true = self.targets(records).astype(bool)
        return metrics.interval(micro_f1, predictions >= self.settings.threshold, true)


class Regress(SequenceTask):
    """A number for a text, or for a pair of texts."""

    name, headline, problem = "regress", "mse", "regression"
    greater_is_better = False
    labels = ["value"]

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        values = np.array([number_of(record) for record in records])
        if len(set(values)) <= 5 and np.all(values == np.round(values)):
            logger.warning("label: %d records have %d whole numbers; classify takes them as classes", len(values),
                           len(set(values)))  # fmt: skip
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        return {"records": len(values), "smallest": low, "median": middle, "greatest": high, "mean": values.mean(),
                "standard deviation": values.std()}  # fmt: skip

    def label(self, record: Record) -> float:
        return number_of(record)

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return np.asarray(logits, dtype=np.float64).reshape(len(records))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics

        return metrics.regression(self.targets(records), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        from fastbert.training.finetuning import metrics

        return metrics.interval(np.mean, (self.targets(records) - predictions) ** 2)


class Choice(Task):
    """The right one of several continuations of a text, or answers to a question, as many for each record."""

    name, headline, head = "choice", "accuracy", "AutoModelForMultipleChoice"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        self.n_choices = len(choices_of(records[0]))
        counts = Counter(self.label(record) for record in records)
        return {"choices": self.n_choices, "counts": {str(i): counts[i] for i in range(self.n_choices)}}

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        return pretrained(self.head, settings, **options)

    def label(self, record: Record) -> int:
        """Returns the number of the right choice, counted from 0. Raises RecordError where there is no such choice."""
        choices, label = choices_of(record), record.values.get("label")
        if len(choices) != self.n_choices:
            raise _error(record, f"choices: expected {self.n_choices}, as the first record has, got {len(choices)}")
        if isinstance(label, str) and label in choices:
            return choices.index(label)
        if isinstance(label, str) and label.strip().isdigit():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise _error(record, f"label: expected a choice, or its number from 0 to {len(choices) - 1}, got {label!r}")
        return label

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        labels = [self.label(record) for record in records]
        firsts, seconds = [], []
        for record in records:
            context, question = record.values.get("context"), record.values.get("question")
            first = text_of(record, "context" if context else "question" if question else "text")
            between = f"{question} " if context and question else ""
            for choice in choices_of(record):
                firsts.append(first)
                seconds.append(between + choice)
        encoded = tokenizer(firsts, seconds, truncation=True, max_length=settings.max_length)
        n = self.n_choices
        return [
            {**{name: values[i * n : (i + 1) * n] for name, values in encoded.items()}, "labels": label}
            for i, label in enumerate(labels)
        ]

    def collator(self, tokenizer: Any) -> Any:
        def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
            rows = [
                {name: values[i] for name, values in each.items() if name != "labels"}
                for each in features
                for i in range(len(each["input_ids"]))
            ]
            batch = tokenizer.pad(rows, return_tensors="pt")
            labels = torch.tensor([each["labels"] for each in features])
            return {
                **{name: value.unflatten(0, (len(features), -1)) for name, value in batch.items()},
                "labels": labels,
            }

        return collate

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return _softmax(np.asarray(logits, dtype=np.float64))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics

        return metrics.classification(np.array([self.label(record) for record in records]), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        return _interval_of_accuracy(np.array([self.label(record) for record in records]), predictions)


def text_of(record: Record, name: str = "text") -> str:
    """Returns a text of a record. Raises RecordError where it is missing, empty or no text."""
    value = record.values.get(name)
    if not isinstance(value, str):
        raise _error(record, f"{name}: expected a text, got {'nothing' if is_missing(value) else repr(value)}")
    if not value.strip():
        raise _error(record, f"{name}: the text is empty")
    return value


def pairs_of(records: Sequence[Record]) -> list[str] | None:
    """Returns the second text of each record, None where none has one. Raises RecordError for a record without."""
    if all(is_missing(record.values.get("text_pair")) for record in records):
        return None
    return [text_of(record, "text_pair") for record in records]


def class_of(record: Record, settings: FinetuneSettings) -> str:
    """Returns the name of a record's class. Raises RecordError where it is missing or can be none."""
    value = record.values.get("label")
    if is_missing(value) or value == "":
        raise _error(record, "label: there is none")
    if isinstance(value, (float, np.floating)):
        if not float(value).is_integer():
            raise _error(record, f"label: expected a class, got the number {value!r}; the task for numbers is regress")
        value = int(value)
    if not isinstance(value, (str, int, np.integer)):
        raise _error(record, f"label: expected a class, got {value!r}; the task for several is multilabel")
    return str(value).strip()


def labels_of(record: Record, settings: FinetuneSettings) -> list[str]:
    """Returns the names of a record's labels, from a list or from one cell. Raises RecordError where there is none.

    An empty list or cell is a record without a label; a missing one is an error.
    """
    value = record.values.get("labels", record.values.get("label"))
    if value is None and "labels" in record.values:  # an empty cell
        return []
    if isinstance(value, str):
        value = json.loads(value) if value.strip().startswith("[") else value.split(settings.separator)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise _error(record, f"labels: expected a list, got {'nothing' if is_missing(value) else repr(value)}")
    return list(dict.fromkeys(name for each in value if (name := str(each).strip())))


def number_of(record: Record) -> float:
    """Returns the number that a record has for its label. Raises RecordError where it is none, or not finite."""
    value = record.values.get("label", record.values.get("score"))
    try:
        if isinstance(value, bool) or is_missing(value):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise _error(record, f"label: expected a number, got {'nothing' if value is None else repr(value)}") from None
    if not math.isfinite(number):
        raise _error(record, f"label: expected a finite number, got {number}")
    return number


def choices_of(record: Record) -> list[str]:
    """Returns the choices of a record, from a list or from JSON in a cell. Raises RecordError for fewer than two."""
    value = record.values.get("choices")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _error(record, f"choices: expected a list as JSON writes it, got {value!r}") from None
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) < 2:
        raise _error(record, f"choices: expected a list of two or more, got {value!r}")
    return [str(each) for each in value]


def is_missing(value: Any) -> bool:
    """Tells whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def is_fraction(label: str) -> bool:
    """Tells whether a label is written as a number with a fraction."""
    try:
        return not float(label).is_integer()
    except (ValueError, OverflowError):
        return False


def _ordered(counts: Mapping[str, int], settings: FinetuneSettings) -> list[str]:
    """Returns all labels in the order of their numbers.

    The order is that of the settings, or the model's own where its head has just these labels, or sorted.
    """
    if settings.label_order:
        unknown = sorted(set(counts) - set(settings.label_order))
        if unknown:
            raise ValueError(f"label_order: {_listed(unknown)} of the training data is not in it")
        return list(settings.label_order)
    import transformers

    own = transformers.AutoConfig.from_pretrained(settings.model).id2label or {}
    if set(own.values()) == set(counts):
        return [own[i] for i in sorted(own)]
    is_numbers = all(name.lstrip("-").isdigit() for name in counts)
    return sorted(counts, key=int if is_numbers else str)


def _warn_of_rare(counts: Mapping[str, int]) -> None:
    rare = sorted(name for name, n in counts.items() if n == 1)
    if rare:
        logger.warning("labels: %d have one example each: %s", len(rare), _listed(rare))


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _interval_of_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    from fastbert.training.finetuning import metrics

    return metrics.interval(np.mean, (probabilities.argmax(-1) == labels).astype(np.float64))


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _error(record: Record, message: str) -> Exception:
    from fastbert.training.finetuning.records import RecordError

    return RecordError(f"{record.place}: {message}")
