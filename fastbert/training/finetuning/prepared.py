"""`Prepared` holds the parts of a run, made from its settings: records, features, tokenizer and model."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import Task, task_of

if TYPE_CHECKING:
    from fastbert.training.finetuning.records import Record

logger = logging.getLogger("fastbert")


@dataclass(frozen=True)
class Prepared:
    """A `Prepared` holds the parts of a run: records, tokenizer, and a model with a new head."""

    settings: FinetuneSettings
    task: Task
    facts: dict[str, Any]  # facts about the labels
    tokenizer: Any
    model: Any
    train: Sequence[Record]
    evaluation: Sequence[Record]

    @classmethod
    def of(cls, settings: FinetuneSettings) -> Prepared:
        """Reads the data and makes the model.

        Raises RecordError, ValueError or OSError for invalid data or settings.
        """
        import transformers

        from fastbert.training.finetuning.loading import longest_input

        task = task_of(settings.task)
        train, evaluation = _records(settings)
        facts = task.prepare(train, settings)
        task.check(evaluation)
        transformers.set_seed(settings.seed)
        model = task.model(settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
        settings = dataclasses.replace(settings, max_length=longest_input(model, tokenizer, settings))
        return cls(settings, task, facts, tokenizer, model, train, evaluation)

    @property
    def longest(self) -> int:
        """Returns the maximum number of tokens of an input."""
        assert self.settings.max_length is not None  # set by `of`
        return self.settings.max_length

    def features(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Returns the features of records."""
        return self.task.features(records, self.tokenizer, self.settings) if records else []

    def inputs(self) -> set[str]:
        """Returns the names of a feature that forward accepts, and the names of labels."""
        return {*inspect.signature(self.model.forward).parameters, *self.task.label_names, "label"}


def _records(settings: FinetuneSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    """Returns the training and evaluation records.

    Without evaluation data, the seed draws a share of the training data.
    """
    from fastbert.training.finetuning.records import read_records

    train = read_records(settings.train, kind=settings.kind, columns=settings.columns or None)
    if not train:
        raise ValueError("train: there are no records")
    if settings.eval is not None:
        evaluation = read_records(settings.eval, kind=settings.kind, columns=settings.columns or None)
        if not evaluation:
            raise ValueError("eval: there are no records")
        return train, evaluation
    order = list(range(len(train)))
    random.Random(settings.seed).shuffle(order)
    n = round(settings.eval_share * len(train))
    if n == 0 and settings.eval_share:
        raise ValueError(f"eval_share: {settings.eval_share:g} of {len(train)} records is none; give eval, or 0")
    if n:
        logger.warning("eval: %d of %d records are held out for evaluation, drawn evenly", n, len(train))
    return [train[i] for i in sorted(order[n:])], [train[i] for i in sorted(order[:n])]
