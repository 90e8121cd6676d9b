"""This module has the tasks with one output per input: classes, several labels, numbers, and choices."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastbert.training.finetuning import metrics
from fastbert.training.finetuning.class_weights import weighted_cross_entropy
from fastbert.training.finetuning.columns import Record, RecordError
from fastbert.training.finetuning.labels import Labels, find_labels, numbers_of, warn_of_unseen
from fastbert.training.finetuning.loading import pretrained
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import Task


class SequenceTask(Task):
    """This base makes one input from the text and text_pair of a record."""

    head = "AutoModelForSequenceClassification"
    problem: str
    labels: list[str]

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        return pretrained(self.head, settings, self.labels, problem_type=self.problem, **options)

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        labels = [self.label(record) for record in records]  # an unknown label raises before the long work
        texts = [text_of(record) for record in records]
        pairs = pairs_of(records)
        encoded, lengths = encode(tokenizer, texts, pairs, settings.max_length)
        return [
            {**{name: values[i] for name, values in encoded.items()}, "labels": label, "full_length": lengths[i]}
            for i, label in enumerate(labels)
        ]

    def check(self, records: Sequence[Record]) -> None:
        for record in records:
            self.label(record)

    def label(self, record: Record) -> Any:
        """Returns the label of a record, for the collator. Raises RecordError for an unknown label."""
        raise NotImplementedError

    def targets(self, records: Sequence[Record]) -> np.ndarray:
        """Returns the labels of records as an array, for the metrics."""
        return np.array([self.label(record) for record in records])


class Classify(SequenceTask):
    """The task predicts one of several classes for a text, or for a pair of texts."""

    name, headline, problem = "classify", "accuracy", "single_label_classification"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        self.classes = ordered(find_labels(records, order=settings.label_order), settings)
        self.labels = list(self.classes.names)
        self.classes.weights(settings.class_weights)  # raises for invalid weights
        return {"labels": self.labels, "counts": dict(zip(self.labels, self.classes.counts, strict=True))}

    def check(self, records: Sequence[Record]) -> None:
        warn_of_unseen(self.labels, {self.labels[self.label(record)] for record in records})

    def label(self, record: Record) -> int:
        return self.classes.number(record)

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        weights = self.classes.weights(settings.class_weights)
        return None if weights is None else weighted_cross_entropy(weights)

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return _softmax(np.asarray(logits, dtype=np.float64))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        return metrics.classification(self.targets(records), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        return _interval_of_accuracy(self.targets(records), predictions)

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        return {"labels": self.targets(records), "probabilities": predictions, "names": self.labels}


class Multilabel(SequenceTask):
    """The task predicts any number of labels for a text, including none."""

    name, headline, problem = "multilabel", "micro_f1", "multi_label_classification"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        self.settings = settings
        labels = find_labels(records, order=settings.label_order, many=True, separator=settings.separator)
        self.classes, self.n_records = ordered(labels, settings), len(records)
        self.labels = list(self.classes.names)
        self.classes.weights(settings.class_weights)  # raises for invalid weights
        without = sum(not any(self.label(record)) for record in records)
        shown = dict(zip(self.labels, self.classes.counts, strict=True))
        return {"labels": self.labels, "counts": shown, "records without a label": without}

    def label(self, record: Record) -> list[float]:
        numbers: list[float] = self.classes.numbers(record, separator=self.settings.separator).tolist()
        return numbers

    def check(self, records: Sequence[Record]) -> None:
        seen = {
            name for record in records for name, value in zip(self.labels, self.label(record), strict=True) if value
        }
        warn_of_unseen(self.labels, seen, "labels")

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        """Returns a loss in which a label that a record has is weighted, and a label that it lacks has weight 1."""
        class_weights = self.classes.weights(settings.class_weights)
        if class_weights is None:
            return None
        weights = torch.from_numpy(class_weights)
        if settings.class_weights == "balanced":
            counts = torch.tensor(self.classes.counts, dtype=torch.float32)
            weights = torch.where(counts > 0, (self.n_records - counts) / counts.clamp(min=1), 1.0).clamp(min=1e-3)

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
        return metrics.multilabel(self.targets(records).astype(np.int64), predictions, self.settings.threshold)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        def micro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
            return float(2 * (predicted & true).sum() / max((predicted.sum() + true.sum()), 1))

        true = self.targets(records).astype(bool)
        return metrics.interval(micro_f1, predictions >= self.settings.threshold, true)

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        names, threshold = self.labels, self.settings.threshold
        labels = self.targets(records).astype(np.int64)
        return {"labels": labels, "probabilities": predictions, "names": names, "threshold": threshold}


class Regress(SequenceTask):
    """The task predicts a number for a text, or for a pair of texts."""

    name, headline, problem = "regress", "mse", "regression"
    greater_is_better = False
    labels = ["value"]

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        values = numbers_of(records)
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        return {"records": len(values), "smallest": low, "median": middle, "greatest": high, "mean": values.mean(),
                "standard deviation": values.std()}  # fmt: skip

    def label(self, record: Record) -> float:
        return number_of(record)

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        return np.asarray(logits, dtype=np.float64).reshape(len(records))

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        return metrics.regression(self.targets(records), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        return metrics.interval(np.mean, (self.targets(records) - predictions) ** 2)

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        return {"labels": self.targets(records), "values": predictions}


class Choice(Task):
    """The task selects the right one of several continuations of a text, or of several answers to a question.

    Every record has the same number of choices.
    """

    name, headline, head = "choice", "accuracy", "AutoModelForMultipleChoice"

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        self.n_choices = len(choices_of(records[0]))
        counts = Counter(self.label(record) for record in records)
        return {"choices": self.n_choices, "counts": {str(i): counts[i] for i in range(self.n_choices)}}

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        return pretrained(self.head, settings, **options)

    def label(self, record: Record) -> int:
        """Returns the index of the right choice, from 0. Raises RecordError if there is no such choice."""
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
        encoded, lengths = encode(tokenizer, firsts, seconds, settings.max_length)
        columns, n = {**encoded, "full_length": lengths}, self.n_choices
        return [
            {**{name: values[i * n : (i + 1) * n] for name, values in columns.items()}, "labels": label}
            for i, label in enumerate(labels)
        ]

    def check(self, records: Sequence[Record]) -> None:
        for record in records:
            self.label(record)

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
        return metrics.classification(np.array([self.label(record) for record in records]), predictions)

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        return _interval_of_accuracy(np.array([self.label(record) for record in records]), predictions)


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None
) -> tuple[dict[str, list[Any]], list[int]]:
    """Returns the columns of truncated inputs, and the length of each in tokens before truncation."""
    encoded = tokenizer(texts, pairs, verbose=False)
    lengths = list(map(len, encoded["input_ids"]))
    if max_length is not None and max(lengths) > max_length:
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return dict(encoded), lengths


def text_of(record: Record, name: str = "text") -> str:
    """Returns a text of a record. Raises RecordError if it is missing, empty or no text."""
    value = record.value(name)
    if not isinstance(value, str):
        raise _error(record, f"{name}: expected a text, got {value!r}")
    if not value.strip():
        raise _error(record, f"{name}: the text is empty")
    return value


def pairs_of(records: Sequence[Record]) -> list[str] | None:
    """Returns the second text of each record, or None if no record has one.

    Raises RecordError if only some have one.
    """
    if all(is_missing(record.values.get("text_pair")) for record in records):
        return None
    return [text_of(record, "text_pair") for record in records]


def number_of(record: Record) -> float:
    """Returns the number that is a record's label. Raises RecordError if it is no number or not finite."""
    value = record.value("label")
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
    """Tells whether a cell is empty: None or NaN."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def ordered(labels: Labels, settings: FinetuneSettings) -> Labels:
    """Returns labels in the order of the model's own head, if that has exactly these and the settings have no order."""
    import transformers

    own = transformers.AutoConfig.from_pretrained(settings.model).id2label or {}
    if settings.label_order or set(own.values()) != set(labels.names):
        return labels
    counts = dict(zip(labels.names, labels.counts, strict=True))
    names = tuple(own[i] for i in sorted(own))
    return Labels(names, tuple(counts[name] for name in names))


def _interval_of_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    return metrics.interval(np.mean, (probabilities.argmax(-1) == labels).astype(np.float64))


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _error(record: Record, message: str) -> RecordError:
    return RecordError(f"{record.place}: {message}")
