"""A `Task` holds the differences between the heads. `TASKS` names the module of each task, imported at its first use.

`finetune.py` calls these methods in this order, on one object that a run makes by `task_of(name)`:

    task.prepare(records, settings)              only for the training records
    task.check(records)                          for the evaluation records, before the long work
    task.model(settings)                         a transformers AutoModelFor..., not accelerated yet
    task.features(records, tokenizer, settings)  for the training and the evaluation records
    task.collator(tokenizer)                     data_collator of the Trainer
    task.loss(settings)                          compute_loss_func of the Trainer, or None
    task.keep(logits, labels)                    after each batch of an evaluation, on the device
    task.predictions(logits, features, records)  for all batches, on the host
    task.score(predictions, records)             the metrics, including `headline`
    task.tables(predictions, records)            the data for the report's plots: labels and probabilities

Records come from `records.read_records`; an error about a record is a `RecordError` with its position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastbert.training.finetuning.settings import FinetuneSettings

if TYPE_CHECKING:
    from fastbert.training.finetuning.records import Record

# Name: (module, class). A module is imported when its task is first used.
TASKS: dict[str, tuple[str, str]] = {
    "classify": ("fastbert.training.finetuning.sequence", "Classify"),
    "multilabel": ("fastbert.training.finetuning.sequence", "Multilabel"),
    "regress": ("fastbert.training.finetuning.sequence", "Regress"),
    "choice": ("fastbert.training.finetuning.sequence", "Choice"),
    "tokens": ("fastbert.training.finetuning.tokens", "Tokens"),
    "qa": ("fastbert.training.finetuning.qa", "QuestionAnswering"),
}


class Task:
    """A task is created for each run, and holds the result of `prepare`: the labels and their numbers."""

    name: str  # a name in TASKS
    headline: str  # the key of the metric of `score` that selects the best model
    greater_is_better: bool = True
    head: str  # the name of the AutoModelFor... class of transformers
    windows: bool = False  # whether `features` splits a long record into windows instead of truncating it
    label_names: tuple[str, ...] = ("labels",)  # the label entries of a batch: label_names of the Trainer

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        """Finds the labels in the training records; returns facts about them for display, as JSON values.

        Raises RecordError, with the position, for a record without a label or with a label of the wrong type.
        """
        raise NotImplementedError

    def check(self, records: Sequence[Record]) -> None:
        """Warns of training labels that no evaluation record has.

        Raises RecordError, with the position, for a label that the training records do not have.
        """

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        """Returns the pre-trained encoder of settings.model with a head for the labels, in float32.

        options: for from_pretrained.
        """
        raise NotImplementedError

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        """Returns the input of the collator: at least one dict per record, in the order of the records.

        settings.max_length is an int here: the requested value, or the model's limit. input_ids, attention_mask and
        labels are lists of ints, or label is a number. full_length is the number of tokens before truncation or
        windows, or a list for several inputs. The Trainer removes entries that forward does not accept from batches;
        `predictions` may use them. Raises RecordError for a label that the training records do not have.
        """
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Any:
        """Returns the data_collator of the Trainer: it pads a list of features and makes tensors of them."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        """Returns compute_loss_func of the Trainer, or None if the settings need only the model's own loss."""
        return None

    def keep(self, logits: Any, labels: Any) -> Any:
        """Returns the part of a batch's logits to keep in an evaluation: preprocess_logits_for_metrics."""
        return logits

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        """Returns one prediction per record from the arrays of all features, in their order."""
        raise NotImplementedError

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the metrics by name, as JSON values; the Trainer logs the numbers among them."""
        raise NotImplementedError

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        """Returns the 95 % confidence interval of the headline metric, by `metrics.interval`, or None."""
        return None

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        """Returns `tables` of `report.write_report`, such as labels and probabilities; {} for no tables."""
        return {}


def task_of(name: str) -> Task:
    """Makes the task of a name. Raises ValueError, with the available names, for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    module, cls = TASKS[name]
    task: Task = getattr(importlib.import_module(module), cls)()
    return task
