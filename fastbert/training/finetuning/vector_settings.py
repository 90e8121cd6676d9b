"""This module holds the settings of a training of sentence embeddings or of a cross-encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastbert.checks import check_fields, one_of
from fastbert.training.finetuning.data_fields import settle_data
from fastbert.training.settings import PRECISIONS

KINDS = "auto", "csv", "tsv", "jsonl", "parquet"
CLASS_LOSSES = "batch-all", "batch-hard", "batch-semi-hard", "batch-soft"
EMBED_LOSSES = "auto", "mnrl", "cached-mnrl", "cosent", "cosine", "marginmse", "distillation", *CLASS_LOSSES
TEACHER_WIDTHS = "auto", "pca", "cut", "dense"
RERANK_LOSSES = "auto", "bce", "marginmse", "lambda"
POOLINGS = "mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"

# What may differ between a run and the one that it resumes: where things lie, and what changes no step.
MAY_DIFFER = frozenset(
    ("train", "eval", "output", "resume", "dry_run", "log_every", "keep", "progress", "device", "early_stopping")
)


@dataclass(frozen=True)
class VectorSettings:
    """A `VectorSettings` holds the settings of both trainings. Numbers of tokens include special tokens.

    Raises ValueError or TypeError, with the name of the field, for an invalid value.
    """

    # Data
    model: str  # a folder of sentence-transformers or of a plain encoder, or a hub id
    train: Any  # a file, or from Python any iterable of dicts
    output: str  # the folder of the result, of checkpoints and of the report
    eval: Any = None  # likewise, in the place of a share of the training data
    eval_share: float = 0.1  # of the anchors, held out where there is no eval; 0 for none
    kind: str = "auto"  # of files
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name: the file's
    score_scale: float = 1.0  # what scores are divided by
    max_length: int | None = None  # tokens of a text, or of a pair; by default what the model reads

    # Mined negatives
    mine_negatives: int = 0  # for each pair
    mine_skip: int = 0  # so many of the nearest wrong texts are passed over
    mine_depth: int = 100  # of the nearest wrong texts, so many are looked at
    mine_margin: float | None = None  # least distance between the score of the positive and of a negative
    mine_max_score: float | None = None  # of a negative

    # Model
    teacher: str | None = None  # a folder or hub id, whose vectors or scores are learned
    accelerate: bool = True  # off for comparison: the model's own code runs

    # Steps
    epochs: float = 1.0
    steps: int | None = None  # updates, in the place of epochs
    batch_size: int = 64  # records of a batch on each device
    mini_batch_size: int = 32  # of losses that compute a batch in parts
    accumulate: int = 1  # batches of an update
    learning_rate: float = 2e-5
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
    dry_run: bool = False  # says what would be done, and writes nothing
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        settle_data(self)
        one_of("kind", self.kind, *KINDS)
        one_of("precision", self.precision, *PRECISIONS)
        whole = (
            ("mine_negatives", 0), ("mine_skip", 0), ("mine_depth", 1), ("max_length", 3), ("steps", 1),
            ("batch_size", 1), ("mini_batch_size", 1), ("accumulate", 1), ("seed", 0), ("evaluate_every", 1),
            ("early_stopping", 1), ("keep", 1), ("log_every", 1),
        )  # fmt: skip
        within = (
            ("eval_share", 0.0, 0.9), ("score_scale", 1e-12, math.inf), ("mine_margin", -2.0, 2.0),
            ("mine_max_score", -1.0, 1.0), ("epochs", 1e-6, math.inf), ("learning_rate", 1e-12, math.inf),
            ("weight_decay", 0.0, math.inf), ("warmup", 0.0, math.inf), ("clip", 0.0, math.inf),
        )  # fmt: skip
        check_fields(self, whole, within)
        if self.mine_skip >= self.mine_depth:
            raise ValueError(f"mine_skip: expected less than mine_depth = {self.mine_depth}, got {self.mine_skip}")
        if self.early_stopping is not None and self.eval is None and self.eval_share == 0:
            raise ValueError("early_stopping: expected data for evaluation; eval is not given and eval_share is 0")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them. Data in memory are written as the name of their type."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in {"train", "eval", "preserve"} & values.keys():
            if not isinstance(values[name], (str, type(None))):
                values[name] = f"<{type(values[name]).__name__}>"
        return {
            name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for name, v in values.items()
        }


@dataclass(frozen=True)
class EmbedSettings(VectorSettings):
    """An `EmbedSettings` adds the settings of `train_embeddings` to those of `VectorSettings`."""

    loss: str = "auto"  # by the records: mnrl, cosent, marginmse, distillation or batch-all
    preserve: Any = None  # a file of texts, or any iterable of dicts with text, whose vectors stay as they are
    preserve_weight: float = 20.0  # of their loss, 1 - cosine to the vector before the training
    margin: float = 0.2  # cosine distance by which wrong texts are to be farther, of batch losses
    teacher_width: str = "auto"  # where it is not the model's: pca or cut of its vectors, or dense after the model's
    matryoshka: tuple[int, ...] = ()  # widths that are trained beside one another
    pooling: str | None = None  # by default the model's own, and mean for a plain encoder
    query_prompt: str | None = None  # before anchors; by default the model's own
    document_prompt: str | None = None  # before positives and negatives; by default the model's own

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, *EMBED_LOSSES)
        one_of("teacher_width", self.teacher_width, *TEACHER_WIDTHS)
        check_fields(self, (), (("margin", 0.0, 2.0), ("preserve_weight", 0.0, math.inf)))
        widths = self.matryoshka
        if isinstance(widths, str):
            widths = tuple(int(width) for width in widths.split(","))  # ValueError names what is no number
        object.__setattr__(self, "matryoshka", tuple(widths))
        if any(width < 1 for width in self.matryoshka) or len(set(self.matryoshka)) != len(self.matryoshka):
            raise ValueError(f"matryoshka: expected different positive widths, got {self.matryoshka}")
        if self.pooling is not None:
            one_of("pooling", self.pooling, *POOLINGS)


@dataclass(frozen=True)
class RerankSettings(VectorSettings):
    """A `RerankSettings` adds the settings of `train_cross_encoder` to those of `VectorSettings`."""

    batch_size: int = 32
    loss: str = "auto"  # bce for labelled pairs and mined negatives, marginmse for scored triplets, lambda for lists
    miner: str | None = None  # a bi-encoder, a folder or hub id, that mines negatives and makes lists to evaluate on
    eval_candidates: int = 20  # texts of a list that is made for a pair of the evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, *RERANK_LOSSES)
        if not (isinstance(self.eval_candidates, int) and self.eval_candidates >= 2):
            raise ValueError(f"eval_candidates: expected an int of at least 2, got {self.eval_candidates!r}")
        if self.mine_negatives and self.miner is None:
            raise ValueError("miner: expected a bi-encoder that mines the negatives, got None")
