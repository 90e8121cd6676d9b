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

# By group and field: the name of the value in --help, "" for what is chosen or switched, and what is said of it.
DATA = {
    "model": ("FOLDER", "what training begins with, a folder or a hub id; a plain encoder is taken too"),
    "train": ("FILE", "records: CSV, TSV, JSON lines, Parquet"),
    "output": ("FOLDER", "of the result; checkpoints, metrics.json and report.html lie there, too"),
    "eval": ("FILE", "held-out records (default: a share of the anchors of --train)"),
    "eval_share": ("SHARE", "of the anchors that are held out, 0 for none"),
    "kind": ("", "of the files"),
    "columns": ("NAME=COLUMN", "the file's name of a column, as in anchor=question"),
    "score_scale": ("VALUE", "what scores are divided by: 5 for scores from 0 to 5"),
    "max_length": ("N", "tokens that are read (default: what the model reads)"),
    "teacher": ("FOLDER", "a model, a folder or a hub id, whose vectors or scores are learned"),
    "accelerate": ("", "run the model by fastbert; --no-accelerate: by its own code"),
}
MINING = {
    "mine_negatives": ("N", "wrong texts that are mined for each pair"),
    "mine_skip": ("N", "of the nearest wrong texts that are passed over"),
    "mine_depth": ("N", "of the nearest wrong texts that are looked at"),
    "mine_margin": ("VALUE", "least distance of a negative's score to the positive's"),
    "mine_max_score": ("COSINE", "of a negative, at most"),
}
STEPS = {
    "epochs": ("N", "times that the records are read, where --steps is not named"),
    "steps": ("N", "updates of the weights"),
    "batch_size": ("N", "records of a batch on each device"),
    "mini_batch_size": ("N", "texts or pairs at once, of losses that compute a batch in parts"),
    "accumulate": ("N", "batches of an update"),
    "learning_rate": ("RATE", "at the peak"),
    "weight_decay": ("RATE", "of AdamW"),
    "warmup": ("N", "updates, or below 1 a share of all"),
    "clip": ("NORM", "the greatest norm of all gradients together, 0 for no limit"),
    "seed": ("N", "of order, dropout, new heads and held-out anchors"),
    "precision": ("", "of products; weights are fp32. auto: bf16 where the device has it"),
}
ON_THE_WAY = {
    "evaluate_every": ("STEPS", "between evaluations and checkpoints (default: each epoch)"),
    "early_stopping": ("N", "evaluations without a better score, after which the run ends"),
    "keep": ("N", "newest checkpoints that stay beside the best"),
    "log_every": ("STEPS", "between losses that are logged"),
    "dry_run": ("", "show data, lengths, truncation, steps and time, and train nothing"),
    "resume": ("", "go on from the newest complete checkpoint in --output"),
    "device": ("NAME", "cpu for the CPU (default: the GPU if there is one; with torchrun, one each)"),
    "progress": ("", "show a bar"),
}
EMBED_HELP: Help = {
    "data": DATA,
    "objective": {
        "loss": ("", "auto: mnrl for pairs and triplets, cosent for scored pairs, batch-all for classes, distillation"),
        "preserve": ("FILE", "of texts whose vectors stay as they are, so that other knowledge is not lost"),
        "preserve_weight": ("VALUE", "of the loss of those texts, 1 - cosine to the vector before the training"),
        "margin": ("VALUE", "cosine distance by which texts of other classes are to be farther"),
        "teacher_width": ("", "a teacher of another width: pca or cut of its vectors, or dense after the model's"),
        "matryoshka": ("WIDTHS", "that are trained beside one another, as in 384,192,96"),
        "pooling": ("", "of tokens (default: the model's, and mean for a plain encoder)"),
        "query_prompt": ("TEXT", "before anchors (default: the model's)"),
        "document_prompt": ("TEXT", "before positives and negatives (default: the model's)"),
    },
    "mined negatives": MINING,
    "steps": STEPS,
    "on the way": ON_THE_WAY,
}
RERANK_HELP: Help = {
    "data": DATA,
    "objective": {
        "loss": ("", "auto: bce, for scored triplets and with a teacher marginmse, for lists lambda"),
        "eval_candidates": ("N", "texts of a list that is made for a held-out pair"),
    },
    "mined negatives": {**MINING, "miner": ("FOLDER", "a bi-encoder, a folder or hub id, that mines")},
    "steps": STEPS,
    "on the way": ON_THE_WAY,
}


def add(tasks: Any) -> None:
    """Adds the subcommands `embed` and `rerank` of `fastbert finetune`."""
    _add(
        tasks, "embed", "sentence embeddings of pairs, triplets, scored pairs, classes or a teacher",
        """records: {"anchor": ..., "positive": ...}, perhaps "negative" and "score"; {"sentence1": ...,
"sentence2": ..., "score": ...}; {"text": ..., "label": ...}; or {"text": ...}, perhaps "text_pair" and "vector", for
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
        tasks, "rerank", "a cross-encoder, which scores pairs of texts",
        """records: {"text": ..., "text_pair": ..., "label": 0 or 1}; {"anchor": ..., "positive": ..., "negative": ...},
perhaps "score"; or {"query": ..., "documents": [...], "labels": [...]}

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
    """Makes the settings of parsed arguments. Raises ValueError, with the name of the field, as they do."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def is_first() -> bool:
    """Tells whether this process speaks to the user: the first of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def leave_group() -> None:
    """Leaves the group of processes that torchrun has started."""
    from fastbert.training.distributed import leave

    leave()


def print_plan(plan: Mapping[str, Any]) -> None:
    """Prints what a dry run found, a line for each fact."""
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
    """What argparse is told of a field. Annotations are strings here."""
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
