"""`FinetuneSettings` holds the settings of a fine-tuning run, and checks them when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastbert.checks import check_fields, one_of
from fastbert.training.finetuning.class_weights import parse
from fastbert.training.finetuning.data_fields import settle_data
from fastbert.training.finetuning.schemes import SCHEMES
from fastbert.training.settings import PRECISIONS

KINDS = "auto", "csv", "tsv", "jsonl", "parquet", "squad", "conll"

# What may differ between a run and the one that it resumes: where things lie, and what changes no step.
MAY_DIFFER = frozenset(
    ("train", "eval", "output", "resume", "dry_run", "workers", "log_every", "keep", "progress", "device", "accelerate")
)


@dataclass(frozen=True)
class FinetuneSettings:
    """A `FinetuneSettings` holds the settings of a run. Numbers of tokens include special tokens.

    Raises ValueError or TypeError, with the name of the field, for an invalid value.
    """

    # Data
    task: str  # a name of fastbert.training.finetuning.tasks.TASKS
    model: str  # a folder in Hugging Face layout, or a hub id
    train: Any  # a file, or from Python any iterable of dicts
    output: str  # the folder of the result, of checkpoints and of the report
    eval: Any = None  # likewise, in the place of a share of the training data
    eval_share: float = 0.1  # of the training records, held out where there is no eval; 0 for none
    kind: str = "auto"  # of files
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name: the file's
    separator: str = ","  # between the labels of a cell, of multilabel in CSV
    label_order: tuple[str, ...] = ()  # all labels, in the order of their numbers; by default sorted
    scheme: str = "auto"  # how labels of tokens write spans, or "plain"; by default what they look like
    max_length: int | None = None  # tokens of an input; by default what the model reads, 512 at most
    stride: int = 128  # tokens that two windows of a long text share: tokens, qa
    threshold: float = 0.5  # of the probability from which on a label is given: multilabel
    no_answer_threshold: float = 0.0  # what the score of no answer must exceed the best answer's by: qa
    answer_length: int = 30  # tokens of an answer, at most: qa

    # Model
    freeze_encoder: bool = False  # train the head alone
    lora: int | None = None  # rank of the adapters of the encoder's linears; the rest of the encoder is frozen
    dropout: float | None = None  # of all of the model, in the place of the config's
    # none, balanced (each class counts the same in the loss), or weights by name: a mapping, A=2,B=0.5, or a JSON file
    class_weights: str | Mapping[str, float] = "none"
    accelerate: bool = True  # off for comparison: the model's own code runs

    # Steps
    epochs: float = 3.0
    steps: int | None = None  # updates, in the place of epochs
    batch_size: int = 32  # sequences of an update on each device
    batch_tokens: int | None = None  # in the place of batch_size: so many sequences as have these tokens on average
    accumulate: int = 1  # batches of an update
    group_by_length: bool = False  # texts of like lengths in a batch: for models that compute padding
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1  # a share of the steps below 1, else a number of steps
    clip: float = 1.0  # the greatest norm of all gradients together; 0 for none
    seed: int = 0
    precision: str = "auto"

    # On the way
    evaluate_every: int | None = None  # steps between evaluations and checkpoints; by default each epoch
    early_stopping: int | None = None  # evaluations without a better headline metric, after which the run ends
    keep: int = 1  # newest checkpoints that stay beside the best
    log_every: int = 10  # steps
    resume: bool = False
    dry_run: bool = False
    workers: int = 0  # processes that make batches, beside the training's
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        settle_data(self)
        if isinstance(self.label_order, str):
            raise TypeError("label_order: got a str, expected a tuple of labels")
        object.__setattr__(self, "label_order", tuple(map(str, self.label_order)))
        if len(set(self.label_order)) != len(self.label_order):
            raise ValueError(f"label_order: a label is named twice: {', '.join(self.label_order)}")
        one_of("kind", self.kind, *KINDS)
        one_of("precision", self.precision, *PRECISIONS)
        one_of("scheme", self.scheme, "auto", *SCHEMES)
        object.__setattr__(self, "class_weights", parse(self.class_weights))
        whole = (
            ("max_length", 8), ("stride", 0), ("answer_length", 1), ("lora", 1), ("steps", 1), ("batch_size", 1),
            ("batch_tokens", 1), ("accumulate", 1), ("seed", 0), ("evaluate_every", 1), ("early_stopping", 1),
            ("keep", 1), ("log_every", 1), ("workers", 0),
        )  # fmt: skip
        within = (
            ("eval_share", 0.0, 0.9), ("threshold", 0.0, 1.0), ("dropout", 0.0, 0.999), ("epochs", 1e-6, math.inf),
            ("learning_rate", 1e-12, math.inf), ("weight_decay", 0.0, math.inf), ("warmup", 0.0, math.inf),
            ("clip", 0.0, math.inf), ("no_answer_threshold", -math.inf, math.inf),
        )  # fmt: skip
        check_fields(self, whole, within)
        if not self.separator:
            raise ValueError("separator: got an empty string, expected what stands between two labels")
        if self.freeze_encoder and self.lora is not None:
            raise ValueError("lora: its adapters are in the encoder, which freeze_encoder leaves as it is; take one")
        if self.early_stopping is not None and self.eval is None and self.eval_share == 0:
            raise ValueError("early_stopping: expected data for evaluation; eval is not given and eval_share is 0")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them. Data in memory are written as the name of their type."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("train", "eval"):
            if not isinstance(values[name], (str, type(None))):
                values[name] = f"<{type(values[name]).__name__}>"
        return {**values, "columns": dict(self.columns), "label_order": list(self.label_order)}
