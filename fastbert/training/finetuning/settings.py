"""`FinetuneSettings` holds the settings of a fine-tuning run, and checks them at its creation."""

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

# The fields that may differ when a run resumes: paths, and settings that change no step.
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
    output: str  # the folder for the result, the checkpoints and the report
    eval: Any = None  # in the same form; by default a share of the training data
    eval_share: float = 0.1  # the share of training records to hold out without eval; 0 for none
    kind: str = "auto"  # kind of the files
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # fastbert's name: the file's name
    separator: str = ","  # between the labels of a cell, for multilabel in CSV
    label_order: tuple[str, ...] = ()  # all labels, in the order of their numbers; by default sorted
    scheme: str = "auto"  # the labelling scheme of tokens, or "plain"; auto determines it from the labels
    max_length: int | None = None  # tokens of an input; by default the model's limit, at most 512
    stride: int = 128  # tokens in the overlap of two windows of a long text: tokens, qa
    threshold: float = 0.5  # the least probability of a predicted label: multilabel
    no_answer_threshold: float = 0.0  # least lead of the score of no answer over the best answer's: qa
    answer_length: int = 30  # maximum tokens of an answer: qa

    # Model
    freeze_encoder: bool = False  # train only the head
    lora: int | None = None  # rank of the adapters in the encoder's linear layers; the rest of the encoder is frozen
    dropout: float | None = None  # of the whole model; by default the config's values
    # none, balanced (equal total weight of each class), or weights by name: a mapping, A=2,B=0.5, or a JSON file
    class_weights: str | Mapping[str, float] = "none"
    accelerate: bool = True  # False, for comparison: the model's own code runs

    # Steps
    epochs: float = 3.0
    steps: int | None = None  # updates, instead of epochs
    batch_size: int = 32  # sequences per batch on each device
    batch_tokens: int | None = None  # instead of batch_size: average tokens of a batch
    accumulate: int = 1  # batches per update
    group_by_length: bool = False  # put texts of similar length into a batch: for models that compute padding
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1  # below 1 a share of the steps, else a number of steps
    clip: float = 1.0  # limit of the norm of all gradients together; 0 for no limit
    seed: int = 0
    precision: str = "auto"

    # During the run
    evaluate_every: int | None = None  # steps between evaluations and checkpoints; by default each epoch
    early_stopping: int | None = None  # the run ends after this number of evaluations without a better headline metric
    keep: int = 1  # number of newest checkpoints to keep, in addition to the best
    log_every: int = 10  # steps
    resume: bool = False
    dry_run: bool = False
    workers: int = 0  # additional processes that make batches
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
        """Returns the fields as JSON values. Data in memory are replaced by the name of their type."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("train", "eval"):
            if not isinstance(values[name], (str, type(None))):
                values[name] = f"<{type(values[name]).__name__}>"
        return {**values, "columns": dict(self.columns), "label_order": list(self.label_order)}
