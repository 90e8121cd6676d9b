"""`Settings` holds the settings of a pre-training run, and checks them at its creation."""

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

# The fields that may differ when a run resumes: paths, and settings that change no result. The content at these paths
# is compared.
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
    output: str  # the folder for the result, the checkpoints and the logs
    layout: str = "auto"  # layout of the text: see fastbert.training.data.sources
    field: str = "text"  # the text field of a record in JSON lines and Parquet
    errors: str = "strict"  # how to handle bytes that are not UTF-8
    cache: str | None = None  # the folder of tokenised corpora
    rebuild: bool = False  # tokenise even if the cache has the corpus
    evaluation_text: tuple[str, ...] = ()  # held-out documents, instead of a share of the text
    evaluation_share: float = 0.01  # the share of documents to hold out

    # Model and objective
    model_config: str = "base"  # a name, a config.json, or a checkpoint to continue from
    max_length: int | None = None  # sequence length in tokens; by default 512 or the model's limit
    nsp: bool = True
    mlm_probability: float = 0.15
    whole_words: bool = False
    short_probability: float = 0.1  # share of sequences that are shortened, as in the paper
    dropout: float | None = None  # of hidden states and attention; by default the config's value

    # Steps
    steps: int | None = None
    epochs: float = 40.0  # determines the number of steps if `steps` is None
    tokens_per_step: int = 32_768  # over all processes and accumulated batches
    sequences_per_step: int | None = None  # replaces tokens_per_step: the number of sequences of max_length
    tokens_per_batch: int | None = None  # batch size of a device: by default 16,384 on a GPU, 4,096 on a CPU
    seed: int = 0

    # Optimiser
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    clip: float = 1.0  # limit of the norm of all gradients together; 0 for no limit
    schedule: str = "linear"
    warmup: float = 0.01  # below 1 a share of the steps, else a number of steps
    decay: float = 0.1  # the decay of the trapezoid, in the same form
    precision: str = "auto"

    # During the run
    evaluate_every: int | None = None  # in steps; by default a twentieth of all steps
    evaluation_tokens: int = 131_072  # the maximum, from the held-out documents
    checkpoint_every: int = 1_000
    keep: int = 2  # number of checkpoints
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
        """Returns the fields as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def n_steps_of(share_or_steps: float, steps: int) -> int:
    """Returns a number of steps; a value below 1 is a share of all steps."""
    return round(share_or_steps * steps) if share_or_steps < 1 else round(share_or_steps)
