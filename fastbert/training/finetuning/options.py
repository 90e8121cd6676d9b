"""`fastbert finetune TASK` has one option for each field of `FinetuneSettings` that the task reads.

Neither the options nor --help wait for PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses

from fastbert.training.finetuning.schemes import SCHEMES
from fastbert.training.finetuning.settings import KINDS, FinetuneSettings
from fastbert.training.options import argument
from fastbert.training.settings import PRECISIONS

# By group and field: the name of the value in --help, "" for what is chosen or switched, and what is said of it.
HELP: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "train": ("FILE", "training data: CSV, TSV, JSON lines, Parquet; SQuAD's JSON, CoNLL where the task has it"),
        "eval": ("FILE", "data for evaluation (default: a share of --train)"),
        "eval_share": ("SHARE", "of the training records, held out where there is no --eval; 0 for none"),
        "output": ("FOLDER", "of the result; checkpoints, metrics and report lie there, too"),
        "kind": ("", "of the files; auto goes by their names"),
        "columns": ("NAME=COLUMN", "where the data have other names: text=review label=stars"),
        "separator": ("TEXT", "between the labels of a cell"),
        "label_order": ("LABEL", "all labels, in the order of their numbers (default: the model's own, or sorted)"),
        "scheme": ("", "of the labels: how they write spans, or plain for tags without prefixes, such as NOUN; auto "
                   "goes by their looks"),
        "max_length": ("N", "tokens of an input, special ones included (default: 512, or what the model reads)"),
        "stride": ("N", "tokens that two windows of a long text share"),
        "threshold": ("SHARE", "of the probability, from which on a label is given"),
        "no_answer_threshold": ("SCORE", "by which no answer has to beat the best one"),
        "answer_length": ("N", "tokens of an answer, at most"),
    },
    "model": {
        "model": ("FOLDER", "pre-trained encoder: a folder in Hugging Face layout, or hub id"),
        "freeze_encoder": ("", "train the head alone"),
        "lora": ("RANK", "train adapters of this rank in the encoder's linears, by PEFT; they are merged on saving"),
        "dropout": ("SHARE", "of the whole model (default: the config's)"),
        "class_weights": ("WEIGHTS", "in the loss: none, balanced (each class counts the same, however many examples "
                          "it has), NAME=W,NAME=W with 1 for the others, or a .json file of these"),
        "accelerate": ("", "let fastbert run the encoder; --no-accelerate is for comparison"),
    },
    "steps": {
        "epochs": ("N", "times that the data are read, where --steps is not named"),
        "steps": ("N", "updates of the weights"),
        "batch_size": ("N", "sequences that a device takes at once"),
        "batch_tokens": ("N", "in the place of --batch-size: as many sequences as have these tokens on average"),
        "accumulate": ("N", "batches of an update"),
        "group_by_length": ("", "texts of like lengths in a batch; fastbert computes no padding and gains nothing"),
        "learning_rate": ("RATE", "at the peak"),
        "weight_decay": ("RATE", "of AdamW; biases and norms have none"),
        "warmup": ("N", "updates, or below 1 a share of all"),
        "clip": ("NORM", "the greatest norm of all gradients together, 0 for no limit"),
        "seed": ("N", "of the head's weights, order, dropout and the share that is held out"),
        "precision": ("", "of products; weights and sums are fp32. auto: bf16 where it is faster"),
    },
    "on the way": {
        "evaluate_every": ("STEPS", "between evaluations, each with a checkpoint (default: an epoch)"),
        "early_stopping": ("N", "end after N evaluations without a better headline metric"),
        "keep": ("N", "newest checkpoints that stay beside the best"),
        "log_every": ("STEPS", "between lines of the losses"),
        "resume": ("", "go on from the newest complete checkpoint in --output"),
        "dry_run": ("", "show labels, lengths, truncation, steps and time, and train nothing"),
        "workers": ("N", "processes that make batches, 0 for none beside the training's"),
        "device": ("NAME", "cpu or cuda (default: the GPU if there is one)"),
        "progress": ("", "show bars"),
    },
}  # fmt: skip
CHOICES = {"kind": KINDS, "precision": PRECISIONS, "scheme": ("auto", *SCHEMES)}

# Fields that some tasks alone read.
ONLY = {
    "separator": ("multilabel",),
    "threshold": ("multilabel",),
    "label_order": ("classify", "multilabel", "tokens"),
    "class_weights": ("classify", "multilabel", "tokens"),
    "scheme": ("tokens",),
    "stride": ("tokens", "qa"),
    "no_answer_threshold": ("qa",),
    "answer_length": ("qa",),
}


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    """Adds an option for each field that a task reads, with its default."""
    fields = {field.name: field for field in dataclasses.fields(FinetuneSettings)}
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, (metavar, text) in options.items():
            if task not in ONLY.get(name, (task,)):
                continue
            made = argument(fields[name], metavar, text, CHOICES)
            if name in ("columns", "label_order"):
                made |= {"nargs": "+", "default": (), "required": False}
            group.add_argument(f"--{name.replace('_', '-')}", **made)
    switches = {name: field.default for name, field in fields.items() if str(field.type) == "bool"}
    parser.set_defaults(task=task, **switches)


def settings_of(args: argparse.Namespace) -> FinetuneSettings:
    """Makes the settings of parsed arguments. Raises ValueError, with the name of the field, as the settings do."""
    names = (field.name for field in dataclasses.fields(FinetuneSettings))
    return FinetuneSettings(**{name: getattr(args, name) for name in names if hasattr(args, name)})
