"""`fastbert pretrain` and `python -m fastbert.training.pretrain` have one option for each field of `Settings`.

The options and --help do not import PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.training.settings import ERRORS, LAYOUTS, PRECISIONS, SCHEDULES, Settings

EXAMPLES = """examples:
  fastbert pretrain --text corpus/ --tokenizer ./tokenizer --output ./my-bert
  fastbert pretrain --text 'news/*.jsonl.gz' --tokenizer ./tokenizer --output ./my-bert --model-config small \\
      --steps 20000 --no-nsp
  fastbert pretrain --text reports/ --tokenizer google-bert/bert-base-uncased --output ./report-bert \\
      --model-config google-bert/bert-base-uncased --learning-rate 5e-5 --steps 5000
on N GPUs of a machine:
  torchrun --nproc-per-node N -m fastbert.training.pretrain --text corpus/ --tokenizer ./tokenizer --output ./my-bert
after a crash, the same command with --resume"""

# For each group and field: the name of the value in --help ("" for a choice or a switch), and the help text.
# "(default: ...)" is added unless the default of `Settings` is None, () or False.
HELP: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "text": ("PATH", "files, folders and globs: plain text, JSON lines or Parquet, also compressed"),
        "tokenizer": ("FOLDER", "folder with a tokenizer, or hub id; the tokenizer needs [CLS], [SEP] and [MASK]"),
        "output": ("FOLDER", "folder for the result, the checkpoints, the best model and the journal"),
        "layout": ("", "layout of plain text: one sentence on each line, with a blank line between documents "
                   "(sentences, auto); one document on each line (documents); or one document in each file (files)"),
        "field": ("NAME", "name of the field with the text, in JSON objects and Parquet rows"),
        "errors": ("", "for bytes that are not UTF-8: stop with their position, or replace and count them"),
        "cache": ("FOLDER", "folder for tokenised text (default: $FASTBERT_CACHE, or fastbert/corpora in the user's "
                  "cache)"),
        "rebuild": ("", "tokenise the text again, even if the cache has it"),
        "evaluation_text": ("PATH", "held-out text (default: a share of the documents of --text)"),
        "evaluation_share": ("SHARE", "share of the documents that is held out, 0 for none"),
    },
    "model and objective": {
        "model_config": ("NAME", "tiny, mini, small, medium, base or large; or a config.json; or a checkpoint (folder "
                         "or hub id) whose training continues"),
        "max_length": ("N", "greatest sequence length in tokens, with special tokens (default: 512, or the model's "
                       "limit)"),
        "nsp": ("", "also learn next-sentence prediction; --no-nsp: only masked tokens, in sequences of full "
                "sentences"),
        "mlm_probability": ("SHARE", "share of the tokens that the model predicts"),
        "whole_words": ("", "mask all tokens of a word or none"),
        "short_probability": ("SHARE", "share of the sequences that are shorter"),
        "dropout": ("SHARE", "dropout probability of hidden states and attention (default: the config's)"),
    },
    "steps": {
        "steps": ("N", "updates of the weights (default: as many as --epochs take)"),
        "epochs": ("N", "passes over the text, if --steps is not set"),
        "tokens_per_step": ("N", "tokens of a step, over all processes and accumulated batches"),
        "sequences_per_step": ("N", "sequences of --max-length tokens in a step (default: --tokens-per-step is used)"),
        "tokens_per_batch": ("N", "tokens that a device computes at once (default: 16384 on a GPU, 4096 on a CPU)"),
        "seed": ("N", "seed of weights, order, masks and dropout"),
    },
    "optimizer": {
        "learning_rate": ("RATE", "highest learning rate"),
        "weight_decay": ("RATE", "weight decay of AdamW; biases and norms have none"),
        "beta1": ("SHARE", "first beta of AdamW"),
        "beta2": ("SHARE", "second beta of AdamW"),
        "epsilon": ("VALUE", "epsilon of AdamW"),
        "clip": ("NORM", "limit for the norm of all gradients together, 0 for no limit"),
        "schedule": ("", "linear: warm-up, then down to 0; trapezoid: warm-up, constant, down to 0 at the end"),
        "warmup": ("N", "number of warm-up updates, or a share of all updates if below 1"),
        "decay": ("N", "number of updates in the decay of a trapezoid, or a share of all updates if below 1"),
        "precision": ("", "data type of matrix products; weights and sums are fp32. auto: bf16 if it is faster"),
    },
    "run": {
        "evaluate_every": ("STEPS", "steps between evaluations (default: a twentieth of all steps)"),
        "evaluation_tokens": ("N", "greatest number of tokens in an evaluation"),
        "checkpoint_every": ("STEPS", "steps between checkpoints"),
        "keep": ("N", "number of checkpoints to keep"),
        "log_every": ("STEPS", "steps between lines of training.jsonl"),
        "resume": ("", "continue from the newest complete checkpoint in --output"),
        "workers": ("N", "threads that make batches; 0: the training thread makes them"),
        "device": ("NAME", "cpu, cuda or cuda:1 (default: the GPU if there is one; with torchrun, one GPU each)"),
        "fsdp": ("", "shard weights and the optimizer's state over the processes, to save memory"),
        "tensorboard": ("", "also write for TensorBoard, if it is installed"),
        "progress": ("", "show a progress bar, or lines if standard error is not a terminal"),
    },
}  # fmt: skip
CHOICES = {"layout": LAYOUTS, "errors": ERRORS, "schedule": SCHEDULES, "precision": PRECISIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of `Settings`, with its default."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, (metavar, text) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", **argument(fields[name], metavar, text, CHOICES))
    parser.set_defaults(**{name: field.default for name, field in fields.items() if str(field.type) == "bool"})


def settings_of(args: argparse.Namespace) -> Settings:
    """Makes the settings from parsed arguments. Raises ValueError, with the name of the field, as `Settings` does."""
    return Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})


def parse(argv: Sequence[str] | None = None, prog: str = "python -m fastbert.training.pretrain") -> Settings:
    """Makes the settings from a command line, by default that of the process.

    Raises SystemExit as argparse does, also for values that `Settings` does not allow.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Trains a BERT on raw text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return settings_of(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


def argument(
    field: dataclasses.Field[Any], metavar: str, text: str, choices: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Returns the keyword arguments of `add_argument` for a field of settings, whose annotations are strings.

    text: the help text, to which the default is added. choices: the allowed values of each field, by its name.
    """
    annotation = str(field.type)
    if field.default is dataclasses.MISSING:
        keywords: dict[str, Any] = {"required": True}
    else:
        keywords = {"default": field.default}
        if field.default not in (None, ()) and field.default is not False:
            text += f" (default: {_written(field.default)})"
    keywords["help"] = text.replace("%", "%%")
    if annotation == "bool":
        # Python 3.10 adds its own default to the help of a BooleanOptionalAction that has a default.
        on_and_off = {"action": argparse.BooleanOptionalAction} if field.default else {"action": "store_true"}
        return {"help": keywords["help"], **on_and_off}
    if annotation.startswith("tuple"):
        keywords["nargs"] = "+"
    if field.name in choices:
        return {**keywords, "choices": choices[field.name]}
    number = int if annotation.startswith("int") else float if annotation.startswith("float") else str
    return {**keywords, "metavar": metavar, "type": number}


def _written(value: Any) -> str:
    if value is True:
        return "yes"
    return f"{value:g}" if isinstance(value, float) else str(value)
