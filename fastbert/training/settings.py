"""`Settings` holds the settings of a pre-training run, and checks them when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastbert.checks import check_fields, one_of

PRECISIONS = "auto", "fp32", "bf16"
SCHEDULES = "linear", "trapezoid"
LAYOUTS = "auto", "sentences", "documents", "files"
ERRORS = "strict", "replace"

# What may differ between a run and the one that it resumes: where things lie, and what changes no number. What lies
# there is compared by its content.
MAY_DIFFER = frozenset(
    ("text", "evaluation_text", "tokenizer", "cache", "output", "resume", "rebuild", "workers", "log_every",
     "checkpoint_every", "keep", "tensorboard", "progress", "fsdp", "device")
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A `Settings` holds the settings of a run. Numbers of tokens include special tokens.

    Raises ValueError or TypeError, with the name of the field, for an invalid value.
    """

    # Data
    text: tuple[str, ...]  # files, folders, globs
    tokenizer: str  # a folder, or a hub id
    output: str  # the folder of the result, and of checkpoints and logs on the way
    layout: str = "auto"  # of the text: see fastbert.training.data.sources
    field: str = "text"  # of a record in JSON lines and Parquet
    errors: str = "strict"  # what to do with bytes that are not UTF-8
    cache: str | None = None  # the folder of tokenised corpora
    rebuild: bool = False  # tokenise even where the cache has the corpus
    evaluation_text: tuple[str, ...] = ()  # held-out documents, in the place of a share of the text
    evaluation_share: float = 0.01  # of the documents, held out

    # Model and objective
    model_config: str = "base"  # a name, a config.json, or a checkpoint to go on from
    max_length: int | None = None  # tokens of a sequence; by default 512, or what the model reads
    nsp: bool = True
    mlm_probability: float = 0.15
    whole_words: bool = False
    short_probability: float = 0.1  # share of sequences that are made shorter, as in the paper
    dropout: float | None = None  # of hidden states and attention, in the place of the config's

    # Steps
    steps: int | None = None
    epochs: float = 40.0  # decides on the steps where those are not named
    tokens_per_step: int = 32_768  # of all processes and accumulated batches together
    sequences_per_step: int | None = None  # in the place of tokens_per_step: so many sequences of max_length
    tokens_per_batch: int | None = None  # what a device takes at once: by default 16,384 on a GPU, 4,096 on a CPU
    seed: int = 0

    # Optimiser
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    clip: float = 1.0  # the greatest norm of all gradients together; 0 for none
    schedule: str = "linear"
    warmup: float = 0.01  # a share of the steps below 1, else a number of steps
    decay: float = 0.1  # of the trapezoid, likewise
    precision: str = "auto"

    # On the way
    evaluate_every: int | None = None  # steps; by default a twentieth of all
    evaluation_tokens: int = 131_072  # at most, of the held-out documents
    checkpoint_every: int = 1_000
    keep: int = 2  # checkpoints
    log_every: int = 10
    resume: bool = False
    workers: int = 2  # threads that make batches
    device: str | None = None
    fsdp: bool = False
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("text", "evaluation_text"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name}: got a str, expected a tuple of paths")
            object.__setattr__(self, name, tuple(map(str, value)))
        if not self.text:
            raise ValueError("text: got nothing, expected files, folders or globs")
        one_of("precision", self.precision, *PRECISIONS)
        one_of("schedule", self.schedule, *SCHEDULES)
        one_of("layout", self.layout, *LAYOUTS)
        one_of("errors", self.errors, *ERRORS)
        whole = (
            ("steps", 1), ("tokens_per_step", 1), ("sequences_per_step", 1), ("tokens_per_batch", 1),
            ("evaluate_every", 1), ("evaluation_tokens", 1), ("checkpoint_every", 1), ("keep", 1), ("log_every", 1),
            ("workers", 0), ("max_length", 8), ("seed", 0),
        )  # fmt: skip
        within = (
            ("mlm_probability", 1e-6, 1.0), ("short_probability", 0.0, 1.0), ("evaluation_share", 0.0, 0.5),
            ("dropout", 0.0, 0.999), ("learning_rate", 1e-12, math.inf), ("weight_decay", 0.0, math.inf),
            ("beta1", 0.0, 0.999999), ("beta2", 0.0, 0.999999), ("epsilon", 0.0, 1.0), ("clip", 0.0, math.inf),
            ("warmup", 0.0, math.inf), ("decay", 0.0, math.inf), ("epochs", 1e-6, math.inf),
        )  # fmt: skip
        check_fields(self, whole, within)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def n_steps_of(share_or_steps: float, steps: int) -> int:
    """Returns a number of steps; a value below 1 is a share of all steps."""
    return round(share_or_steps * steps) if share_or_steps < 1 else round(share_or_steps)
