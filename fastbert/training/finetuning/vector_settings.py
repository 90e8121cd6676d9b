"""This module holds the settings for training sentence embeddings or cross-encoders."""

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

# The fields that may differ when a run resumes: paths, and settings that change no step.
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
    output: str  # the folder for the result, the checkpoints and the report
    eval: Any = None  # in the same form; by default a share of the training data
    eval_share: float = 0.1  # the share of anchors to hold out without eval; 0 for none
    kind: str = "auto"  # kind of the files
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # fastbert's name: the file's name
    score_scale: float = 1.0  # divisor of scores
    max_length: int | None = None  # tokens of a text or of a pair; by default the model's limit

    # Mined negatives
    mine_negatives: int = 0  # number for each pair
    mine_skip: int = 0  # number of nearest wrong texts to skip
    mine_depth: int = 100  # number of nearest wrong texts to consider
    mine_margin: float | None = None  # least difference between the scores of the positive and of a negative
    mine_max_score: float | None = None  # maximum score of a negative

    # Model
    teacher: str | None = None  # a folder or hub id of the model whose vectors or scores are learned
    accelerate: bool = True  # False, for comparison: the model's own code runs

    # Steps
    epochs: float = 1.0
    steps: int | None = None  # updates, instead of epochs
    batch_size: int = 64  # records per batch on each device
    mini_batch_size: int = 32  # for losses that compute a batch in parts
    accumulate: int = 1  # batches per update
    learning_rate: float = 2e-5
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
    dry_run: bool = False  # returns a plan, and writes nothing
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
        """Returns the fields as JSON values. Data in memory are replaced by the name of their type."""
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

    loss: str = "auto"  # auto selects by the records: mnrl, cosent, marginmse, distillation or batch-all
    preserve: Any = None  # a file or an iterable of dicts with texts whose vectors must not change
    preserve_weight: float = 20.0  # of their loss, 1 - cosine to the vector before the training
    margin: float = 0.2  # least additional cosine distance of wrong texts, for batch losses
    teacher_width: str = "auto"  # for another width: pca or cut of the teacher's vectors, or a dense layer in the model
    matryoshka: tuple[int, ...] = ()  # widths that are trained together
    pooling: str | None = None  # by default the model's own, or mean for a plain encoder
    query_prompt: str | None = None  # put before anchors; by default the model's own
    document_prompt: str | None = None  # put before positives and negatives; by default the model's own

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, *EMBED_LOSSES)
        one_of("teacher_width", self.teacher_width, *TEACHER_WIDTHS)
        check_fields(self, (), (("margin", 0.0, 2.0), ("preserve_weight", 0.0, math.inf)))
        widths = self.matryoshka
        if isinstance(widths, str):
            widths = tuple(int(width) for width in widths.split(","))  # ValueError names the part that is no number
        object.__setattr__(self, "matryoshka", tuple(widths))
        if any(width < 1 for width in self.matryoshka) or len(set(self.matryoshka)) != len(self.matryoshka):
            raise ValueError(f"matryoshka: expected different positive widths, got {self.matryoshka}")
        if self.pooling is not None:
            one_of("pooling", self.pooling, *POOLINGS)


@dataclass(frozen=True)
class RerankSettings(VectorSettings):
    """A `RerankSettings` adds the settings of `train_cross_encoder` to those of `VectorSettings`."""

    batch_size: int = 32
    loss: str = "auto"  # auto: bce for labelled pairs and mined negatives, marginmse for triplets, lambda for lists
    miner: str | None = None  # a bi-encoder (folder or hub id) that mines negatives and makes lists for evaluation
    eval_candidates: int = 20  # number of texts in a list that is made for an evaluation pair

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, *RERANK_LOSSES)
        if not (isinstance(self.eval_candidates, int) and self.eval_candidates >= 2):
            raise ValueError(f"eval_candidates: expected an int of at least 2, got {self.eval_candidates!r}")
        if self.mine_negatives and self.miner is None:
            raise ValueError("miner: expected a bi-encoder that mines the negatives, got None")
