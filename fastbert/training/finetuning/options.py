"""`fastbert finetune TASK` has one option for each field of `FinetuneSettings` that the task uses.

The options and --help do not import PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses

from fastbert.training.finetuning.schemes import SCHEMES
from fastbert.training.finetuning.settings import KINDS, FinetuneSettings
from fastbert.training.options import argument
from fastbert.training.settings import PRECISIONS

# For each group and field: the name of the value in --help ("" for a choice or a switch), and the help text.
HELP: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "train": ("FILE", "training data: CSV, TSV, JSON lines or Parquet; for some tasks SQuAD's JSON or CoNLL"),
        "eval": ("FILE", "data for evaluation (default: a share of --train)"),
        "eval_share": ("SHARE", "share of the training records that is held out if there is no --eval; 0 for none"),
        "output": ("FOLDER", "folder for the result, the checkpoints, the metrics and the report"),
        "kind": ("", "kind of the files; auto: the suffix of the name determines it"),
        "columns": ("NAME=COLUMN", "other column names in the data: text=review label=stars"),
        "separator": ("TEXT", "separator between the labels of a cell"),
        "label_order": ("LABEL", "all labels, in the order of their numbers (default: the model's own, or sorted)"),
        "scheme": ("", "labelling scheme of spans, or plain for tags without prefixes, such as NOUN; auto: the names "
                   "of the labels determine it"),
        "max_length": ("N", "greatest sequence length in tokens, with special tokens (default: 512, or the model's "
                       "limit)"),
        "stride": ("N", "overlap of two windows of a long text, in tokens"),
        "threshold": ("SHARE", "least probability of a predicted label"),
        "no_answer_threshold": ("SCORE", "least lead of the empty answer's score over the best answer's"),
        "answer_length": ("N", "greatest length of an answer, in tokens"),
    },
    "model": {
        "model": ("FOLDER", "pre-trained encoder: a folder in Hugging Face layout, or hub id"),
        "freeze_encoder": ("", "train only the head"),
        "lora": ("RANK", "train PEFT adapters of this rank in the encoder's linear layers; they are merged on saving"),
        "dropout": ("SHARE", "dropout probability of the whole model (default: the config's)"),
        "class_weights": ("WEIGHTS", "class weights in the loss: none, balanced (every class has the same total "
                          "weight), NAME=W,NAME=W with 1 for the others, or a .json file with weights by name"),
        "accelerate": ("", "run the encoder with fastbert; --no-accelerate is for comparison"),
    },
    "steps": {
        "epochs": ("N", "passes over the data, if --steps is not set"),
        "steps": ("N", "updates of the weights"),
        "batch_size": ("N", "sequences in a batch of one device"),
        "batch_tokens": ("N", "average tokens in a batch, instead of --batch-size"),
        "accumulate": ("N", "batches in an update"),
        "group_by_length": ("", "put texts of similar length into a batch; fastbert is not faster with it, because "
                            "it computes no padding"),
        "learning_rate": ("RATE", "highest learning rate"),
        "weight_decay": ("RATE", "weight decay of AdamW; biases and norms have none"),
        "warmup": ("N", "number of warm-up updates, or a share of all updates if below 1"),
        "clip": ("NORM", "limit for the norm of all gradients together, 0 for no limit"),
        "seed": ("N", "seed of the head's weights, the order, dropout and the held-out share"),
        "precision": ("", "data type of matrix products; weights and sums are fp32. auto: bf16 if it is faster"),
    },
    "run": {
        "evaluate_every": ("STEPS", "steps between evaluations, each with a checkpoint (default: an epoch)"),
        "early_stopping": ("N", "end after N evaluations without a better headline metric"),
        "keep": ("N", "number of newest checkpoints to keep, in addition to the best"),
        "log_every": ("STEPS", "steps between lines of the losses"),
        "resume": ("", "continue from the newest complete checkpoint in --output"),
        "dry_run": ("", "show labels, lengths, truncation, steps and time, and do not train"),
        "workers": ("N", "processes that make batches; 0: the training process makes them"),
        "device": ("NAME", "cpu or cuda (default: the GPU if there is one)"),
        "progress": ("", "show progress bars"),
    },
}  # fmt: skip
CHOICES = {"kind": KINDS, "precision": PRECISIONS, "scheme": ("auto", *SCHEMES)}

# The fields that only these tasks use.
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
    """Adds an option for each field that a task uses, with its default."""
    fields = {field.name: field for field in dataclasses.fields(FinetuneSettings)}
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, (metavar, text) in options.items():
            if task not in ONLY.get(name, (task,)):
                continue
            keywords = argument(fields[name], metavar, text, CHOICES)
            if name in ("columns", "label_order"):
                keywords |= {"nargs": "+", "default": (), "required": False}
            group.add_argument(f"--{name.replace('_', '-')}", **keywords)
    switches = {name: field.default for name, field in fields.items() if str(field.type) == "bool"}
    parser.set_defaults(task=task, **switches)


def settings_of(args: argparse.Namespace) -> FinetuneSettings:
    """Makes the settings from parsed arguments. Raises ValueError, with the name of the field, as the settings do."""
    names = (field.name for field in dataclasses.fields(FinetuneSettings))
    return FinetuneSettings(**{name: getattr(args, name) for name in names if hasattr(args, name)})
