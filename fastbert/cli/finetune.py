"""`fastbert finetune TASK` trains a head, or vectors, on a pre-trained encoder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from fastbert.cli import finetune_vectors
from fastbert.cli.options import add_command, add_message_options
from fastbert.training.finetuning import options


@dataclass(frozen=True)
class Entry:
    """An Entry is a task of `fastbert.training.finetuning.tasks.TASKS`, as --help shows it."""

    summary: str
    columns: str  # the fields of a record
    example: str  # the text between the task and --model


# By the names of fastbert.training.finetuning.tasks.TASKS, in the order of --help.
TASKS = {
    "classify": Entry(
        "trains a model that gives a text or a pair one of several classes",
        "text, text_pair (optional) and label, the name of a class",
        "--train train.csv --eval test.csv --columns text=review label=stars",
    ),
    "multilabel": Entry(
        "trains a model that gives a text any number of labels",
        'text, text_pair (optional) and labels: a list, or a cell such as "cheap,loud"',
        "--train train.jsonl --threshold 0.4",
    ),
    "regress": Entry(
        "trains a model that gives a text or a pair a number",
        "text, text_pair (optional) and label, a number",
        "--train train.tsv --eval test.tsv --columns label=score",
    ),
    "choice": Entry(
        "trains a model that chooses one of several continuations or answers",
        "text or question, context (optional), choices (a list) and label (a choice, or its number from 0)",
        "--train train.jsonl --eval test.jsonl",
    ),
    "tokens": Entry(
        "trains a model that labels words, such as the names of entities",
        "tokens and labels (lists, as in CoNLL files), or text and spans: a list of {start, end, label}, in characters",
        "--train train.conll --eval test.conll --stride 64",
    ),
    "qa": Entry(
        "trains a model that answers questions with exact pieces of a context",
        "question, context and answers, as in SQuAD's JSON; answers is empty if the context has no answer",
        "--train train.json --eval test.json --answer-length 30",
    ),
}


def add(commands: Any) -> None:
    """Adds the subcommand, with its own subcommand for each task."""
    parser = add_command(
        commands,
        "finetune",
        "trains a head on a pre-trained encoder with your data",
        """fastbert finetune TASK --help explains a task.

example:
  fastbert finetune classify --train train.csv --eval test.csv --model google-bert/bert-base-uncased \\
      --output ./my-classifier
  fastbert classify "What a film!" --model ./my-classifier""",
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, entry in TASKS.items():
        _add_task(tasks, name, entry)
    finetune_vectors.add(tasks)


def _add_task(tasks: Any, name: str, entry: Entry) -> None:
    parser = add_command(
        tasks,
        name,
        entry.summary,
        f"""A record has {entry.columns}.
The result is a folder that transformers and fastbert read, with metrics.json, a report and a model card. It holds the
best model; the last model is in last/. After a crash, --resume continues the run.

example:
  fastbert finetune {name} {entry.example} \\
      --model google-bert/bert-base-uncased --output ./my-model
on N GPUs of a machine:
  torchrun --nproc-per-node N -m fastbert finetune {name} ...""",
    )
    options.add_arguments(parser, name)
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains, and prints the headline metric. With --dry-run it prints the plan instead.

    Raises ValueError or OSError for settings, data and folders that do not fit.
    """
    settings = options.settings_of(args)
    from fastbert.training.finetuning.finetune import finetune

    result = finetune(settings)
    finetune_vectors.leave_group()
    if not finetune_vectors.is_first():
        return
    if result.plan is not None:
        finetune_vectors.print_plan(result.plan)
        return
    for name, value in result.metrics.items():
        if isinstance(value, float):
            print(f"{name}\t{value:.4f}")
    print(f"model\t{result.output}")
