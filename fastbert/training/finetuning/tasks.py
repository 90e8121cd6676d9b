"""A `Task` is what differs between the heads; `TASKS` names the module of each, which is imported when it is asked for.

The glue in `finetune.py` calls, in this order, on one object that a run makes by `task_of(name)`:

    task.prepare(records, settings)              of the training records alone
    task.check(records)                          of the records for evaluation, before the long work
    task.model(settings)                         a transformers AutoModelFor..., not accelerated yet
    task.features(records, tokenizer, settings)  of the training records, and of those for evaluation
    task.collator(tokenizer)                     data_collator of the Trainer
    task.loss(settings)                          compute_loss_func of the Trainer, or None
    task.keep(logits, labels)                    after each batch of an evaluation, on the device
    task.predictions(logits, features, records)  of all batches, on the host
    task.score(predictions, records)             the metrics, `headline` among them
    task.tables(predictions, records)            what the report plots: labels and probabilities

Records are what `records.read_records` gives; an error about one is a `RecordError` with its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastbert.training.finetuning.settings import FinetuneSettings

if TYPE_CHECKING:
    from fastbert.training.finetuning.records import Record

# Name: (module, class). A module is imported when its task is asked for.
TASKS: dict[str, tuple[str, str]] = {
    "classify": ("fastbert.training.finetuning.sequence", "Classify"),
    "multilabel": ("fastbert.training.finetuning.sequence", "Multilabel"),
    "regress": ("fastbert.training.finetuning.sequence", "Regress"),
    "choice": ("fastbert.training.finetuning.sequence", "Choice"),
    "tokens": ("fastbert.training.finetuning.tokens", "Tokens"),
    "qa": ("fastbert.training.finetuning.qa", "QuestionAnswering"),
}


class Task:
    """A task is made anew for each run, and holds what `prepare` has found: the labels and their numbers."""

    name: str  # of TASKS
    headline: str  # the key of the metric, among those of `score`, that decides on the best model
    greater_is_better: bool = True
    head: str  # the AutoModelFor... of transformers, by name
    windows: bool = False  # whether `features` gives several for a long record, instead of truncating it
    label_names: tuple[str, ...] = ("labels",)  # what of a batch is a label: label_names of the Trainer

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        """Finds the labels in the training records; returns what is to be shown of them, as JSON has it.

        Raises RecordError, with the place, for a record without a label or with one of the wrong type.
        """
        raise NotImplementedError

    def check(self, records: Sequence[Record]) -> None:
        """Warns of labels of the training that no record for evaluation has.

        Raises RecordError, with the place, for a label that the training records do not have.
        """

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        """Returns the pre-trained encoder of settings.model with a head for the labels, in float32.

        options: for from_pretrained.
        """
        raise NotImplementedError

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        """Returns what the collator takes, at least one dict a record, in the order of records.

        settings.max_length is an int here: what is asked for, or what the model reads.
        input_ids, attention_mask and labels are lists of ints, or label a number. full_length is the number of tokens
        before truncation or windows, or a list for several inputs. What forward does not take is kept from batches by
        the Trainer and may serve `predictions`. Raises RecordError for a label that the training
        records do not have.
        """
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Any:
        """Returns the data_collator of the Trainer: it pads a list of features and makes tensors of them."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        """Returns compute_loss_func of the Trainer where the settings ask for another loss than the model's own."""
        return None

    def keep(self, logits: Any, labels: Any) -> Any:
        """Returns what is kept of a batch's logits in an evaluation: preprocess_logits_for_metrics of the Trainer."""
        return logits

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        """Returns one prediction a record from the arrays of all features, in their order."""
        raise NotImplementedError

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the metrics by name, as JSON has them; the Trainer logs those that are numbers."""
        raise NotImplementedError

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        """Returns the 95 % confidence interval of the headline metric, by `metrics.interval`, or None."""
        return None

    def tables(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        """Returns `tables` of `report.write_report`, {} for none: labels, and probabilities with names or values."""
        return {}


def task_of(name: str) -> Task:
    """Makes the task of a name. Raises ValueError, with the names that there are, for another one."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    module, cls = TASKS[name]
    task: Task = getattr(importlib.import_module(module), cls)()
    return task
