"""`fastbert finetune embed` and `fastbert finetune rerank` have one option for each field of their settings."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from fastbert.cli.options import add_command, add_message_options
from fastbert.training.finetuning.vector_settings import (
    EMBED_LOSSES,
    KINDS,
    POOLINGS,
    RERANK_LOSSES,
    TEACHER_WIDTHS,
    EmbedSettings,
    RerankSettings,
    VectorSettings,
)
from fastbert.training.settings import PRECISIONS

Help = Mapping[str, Mapping[str, tuple[str, str]]]

# For each group and field: the name of the value in --help ("" for a choice or a switch), and the help text.
DATA = {
    "model": ("FOLDER", "model to train, a folder or a hub id; it may be a plain encoder"),
    "train": ("FILE", "training records: CSV, TSV, JSON lines or Parquet"),
    "output": ("FOLDER", "folder for the result, the checkpoints, metrics.json and report.html"),
    "eval": ("FILE", "held-out records (default: a share of the anchors of --train)"),
    "eval_share": ("SHARE", "share of the anchors that is held out, 0 for none"),
    "kind": ("", "kind of the files"),
    "columns": ("NAME=COLUMN", "other column names in the file, as in anchor=question"),
    "score_scale": ("VALUE", "divisor of scores: 5 for scores from 0 to 5"),
    "max_length": ("N", "greatest sequence length in tokens (default: the model's limit)"),
    "teacher": ("FOLDER", "model, as a folder or a hub id, whose vectors or scores are learned"),
    "accelerate": ("", "run the model with fastbert; --no-accelerate: with its own code"),
}
MINING = {
    "mine_negatives": ("N", "number of negatives to mine for each pair"),
    "mine_skip": ("N", "number of nearest negatives to skip"),
    "mine_depth": ("N", "number of nearest negatives to consider"),
    "mine_margin": ("VALUE", "least difference between a negative's score and the positive's"),
    "mine_max_score": ("COSINE", "greatest score of a negative"),
}
STEPS = {
    "epochs": ("N", "passes over the records, if --steps is not set"),
    "steps": ("N", "updates of the weights"),
    "batch_size": ("N", "records in a batch of one device"),
    "mini_batch_size": ("N", "texts or pairs computed at once, for losses that compute a batch in parts"),
    "accumulate": ("N", "batches in an update"),
    "learning_rate": ("RATE", "highest learning rate"),
    "weight_decay": ("RATE", "weight decay of AdamW"),
    "warmup": ("N", "number of warm-up updates, or a share of all updates if below 1"),
    "clip": ("NORM", "limit for the norm of all gradients together, 0 for no limit"),
    "seed": ("N", "seed of the order, dropout, new heads and held-out anchors"),
    "precision": ("", "data type of matrix products; weights are fp32. auto: bf16 if the device has it"),
}
RUN = {
    "evaluate_every": ("STEPS", "steps between evaluations and checkpoints (default: each epoch)"),
    "early_stopping": ("N", "end the run after N evaluations without a better score"),
    "keep": ("N", "number of newest checkpoints to keep, in addition to the best"),
    "log_every": ("STEPS", "steps between lines of the losses"),
    "dry_run": ("", "show data, lengths, truncation, steps and time, and do not train"),
    "resume": ("", "continue from the newest complete checkpoint in --output"),
    "device": ("NAME", "cpu for the CPU (default: the GPU if there is one; with torchrun, one GPU each)"),
    "progress": ("", "show a progress bar"),
}
EMBED_HELP: Help = {
    "data": DATA,
    "objective": {
        "loss": ("", "auto: mnrl for pairs and triplets, cosent for scored pairs, batch-all for classes, distillation"),
        "preserve": ("FILE", "texts whose vectors should not change, to keep the other knowledge of the model"),
        "preserve_weight": ("VALUE", "weight of the loss of these texts, 1 - cosine to the vector before training"),
        "margin": ("VALUE", "least difference in cosine distance between texts of another class and of the same"),
        "teacher_width": ("", "for a teacher of another width: pca or cut of its vectors, or dense after the model's"),
        "matryoshka": ("WIDTHS", "widths that are trained together, as in 384,192,96"),
        "pooling": ("", "pooling of tokens (default: the model's, and mean for a plain encoder)"),
        "query_prompt": ("TEXT", "prompt before anchors (default: the model's)"),
        "document_prompt": ("TEXT", "prompt before positives and negatives (default: the model's)"),
    },
    "mined negatives": MINING,
    "steps": STEPS,
    "run": RUN,
}
RERANK_HELP: Help = {
    "data": DATA,
    "objective": {
        "loss": ("", "auto: bce; marginmse for scored triplets and with a teacher; lambda for lists"),
        "eval_candidates": ("N", "number of texts in the list for a held-out pair"),
    },
    "mined negatives": {**MINING, "miner": ("FOLDER", "bi-encoder that mines negatives, a folder or a hub id")},
    "steps": STEPS,
    "run": RUN,
}


def add(tasks: Any) -> None:
    """Adds the subcommands `embed` and `rerank` of `fastbert finetune`."""
    _add(
        tasks, "embed", "trains sentence embeddings on pairs, triplets, scored pairs, classes or a teacher",
        """records: {"anchor": ..., "positive": ...}, optionally "negative" and "score"; {"sentence1": ...,
"sentence2": ..., "score": ...}; {"text": ..., "label": ...}; or {"text": ...}, optionally "text_pair" and "vector", for
distillation

examples:
  fastbert finetune embed --model sentence-transformers/all-MiniLM-L6-v2 --train pairs.jsonl --output ./my-embeddings
  fastbert finetune embed --model ./encoder --train pairs.csv --columns anchor=question positive=answer \\
      --mine-negatives 3 --mine-margin 0.05 --matryoshka 384,192,96 --output ./my-embeddings
  fastbert finetune embed --model ./small --train texts.jsonl --teacher ./large --output ./distilled
on N GPUs of a machine, with negatives from all of them:
  torchrun --nproc-per-node N -m fastbert finetune embed ...""",
        EMBED_HELP, EmbedSettings, run_embed,
    )  # fmt: skip
    _add(
        tasks, "rerank", "trains a cross-encoder, which scores pairs of texts",
        """records: {"text": ..., "text_pair": ..., "label": 0 or 1}; {"anchor": ..., "positive": ..., "negative": ...},
optionally "score"; or {"query": ..., "documents": [...], "labels": [...]}

examples:
  fastbert finetune rerank --model ./encoder --train labelled.jsonl --output ./my-reranker
  fastbert finetune rerank --model ./encoder --train pairs.jsonl --miner ./my-embeddings --mine-negatives 5 \\
      --loss lambda --output ./my-reranker
on N GPUs of a machine:
  torchrun --nproc-per-node N -m fastbert finetune rerank ...""",
        RERANK_HELP, RerankSettings, run_rerank,
    )  # fmt: skip


def run_embed(args: argparse.Namespace) -> None:
    """Trains sentence embeddings. Raises ValueError or OSError for settings and records that do not fit."""
    settings = settings_of(args, EmbedSettings)
    from fastbert.training.finetuning.embeddings import train_by

    _say(train_by(settings))
    leave_group()


def run_rerank(args: argparse.Namespace) -> None:
    """Trains a cross-encoder. Raises ValueError or OSError for settings and records that do not fit."""
    settings = settings_of(args, RerankSettings)
    from fastbert.training.finetuning.rerank import train_by

    _say(train_by(settings))
    leave_group()


def settings_of(args: argparse.Namespace, kind: type[Any]) -> Any:
    """Makes the settings from parsed arguments. Raises their ValueError, with the name of the field."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def is_first() -> bool:
    """Tells whether this process prints for the user: the first of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def leave_group() -> None:
    """Leaves the group of processes that torchrun has started."""
    from fastbert.training.distributed import leave

    leave()


def print_plan(plan: Mapping[str, Any]) -> None:
    """Prints the results of a dry run, a line for each fact."""
    from fastbert.training.finetuning.planning import lines

    print("\n".join(lines(plan)))


def _say(result: Any) -> None:
    if not is_first():
        return
    if result.plan is not None:
        print_plan(result.plan)
        return
    name = result.headline
    if result.after:
        print(f"{name}: {result.before[name]:.4f} before, {result.after[name]:.4f} after (step {result.best_step})")
    print(f"{result.output}: the model, metrics.json and report.html; {result.seconds:.0f} s for {result.steps} steps")


def _add(tasks: Any, name: str, summary: str, epilog: str, groups: Help, kind: type[VectorSettings], run: Any) -> None:
    parser = add_command(tasks, name, summary, epilog)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    losses = EMBED_LOSSES if kind is EmbedSettings else RERANK_LOSSES
    choices = {"kind": KINDS, "precision": PRECISIONS, "pooling": POOLINGS, "loss": losses}
    choices["teacher_width"] = TEACHER_WIDTHS
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for field, (metavar, text) in options.items():
            group.add_argument(f"--{field.replace('_', '-')}", **_argument(fields[field], metavar, text, choices))
    add_message_options(parser)
    parser.set_defaults(run=run)


def _argument(field: dataclasses.Field[Any], metavar: str, text: str, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns argparse's arguments for a field. Annotations are strings here."""
    annotation, default = str(field.type), field.default
    if field.name == "columns":
        return {"nargs": "+", "default": {}, "metavar": metavar, "help": text}
    if default is not dataclasses.MISSING and default not in (None, (), False, True):
        text += f" (default: {f'{default:g}' if isinstance(default, float) else default})"
    argument: dict[str, Any] = {"help": text.replace("%", "%%"), "default": default}
    if default is dataclasses.MISSING:
        argument = {"help": argument["help"], "required": True}
    if annotation == "bool":
        return {**argument, "action": argparse.BooleanOptionalAction if default else "store_true"}
    if field.name in choices:
        return {**argument, "choices": choices[field.name]}
    number = int if annotation.startswith("int") else float if annotation.startswith("float") else str
    return {**argument, "metavar": metavar, "type": number}
