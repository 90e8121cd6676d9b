"""`fastbert pretrain` and `python -m fastbert.training.pretrain` have one option for each field of `Settings`.

Neither the options nor --help wait for PyTorch.
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
after a machine died, the same command with --resume"""

# By group and field: the name of the value in --help, "" for what is chosen or switched, and what is said of it.
# "(default: ...)" is added where the default of `Settings` is a value.
HELP: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "text": ("PATH", "files, folders and globs: plain text, JSON lines, Parquet; compressed ones too"),
        "tokenizer": ("FOLDER", "folder with a tokenizer, or hub id; it needs [CLS], [SEP] and [MASK]"),
        "output": ("FOLDER", "of the result; checkpoints, best model and journal lie there, too"),
        "layout": ("", "of plain text: a sentence a line with a blank line between documents (sentences, auto), a "
                   "document a line (documents), or a document a file (files)"),
        "field": ("NAME", "of the text in a JSON object or a Parquet row"),
        "errors": ("", "at bytes that are not UTF-8: stop and say where, or replace and count them"),
        "cache": ("FOLDER", "of tokenised text (default: $FASTBERT_CACHE, or fastbert/corpora in the user's cache)"),
        "rebuild": ("", "tokenise the text though the cache has it"),
        "evaluation_text": ("PATH", "held-out text (default: a share of the documents of --text)"),
        "evaluation_share": ("SHARE", "of the documents that are held out, 0 for none"),
    },
    "model and objective": {
        "model_config": ("NAME", "tiny, mini, small, medium, base or large; or a config.json; or a checkpoint, a "
                         "folder or hub id, to go on from"),
        "max_length": ("N", "tokens of a sequence, special ones included (default: 512, or what the model reads)"),
        "nsp": ("", "predict next sentences, too; --no-nsp: masked tokens alone, in sequences of full sentences"),
        "mlm_probability": ("SHARE", "of the tokens that are predicted"),
        "whole_words": ("", "mask all tokens of a word or none"),
        "short_probability": ("SHARE", "of the sequences that are made shorter"),
        "dropout": ("SHARE", "of hidden states and attention (default: the config's)"),
    },
    "steps": {
        "steps": ("N", "updates of the weights (default: as many as --epochs take)"),
        "epochs": ("N", "times that the text is read, where --steps is not named"),
        "tokens_per_step": ("N", "of all processes and accumulated batches together"),
        "sequences_per_step": ("N", "sequences of --max-length tokens of a step (default: --tokens-per-step counts)"),
        "tokens_per_batch": ("N", "that a device takes at once (default: 16384 on a GPU, 4096 on a CPU)"),
        "seed": ("N", "of weights, order, masks and dropout"),
    },
    "optimizer": {
        "learning_rate": ("RATE", "at the peak"),
        "weight_decay": ("RATE", "of AdamW; biases and norms have none"),
        "beta1": ("SHARE", "of AdamW"),
        "beta2": ("SHARE", "of AdamW"),
        "epsilon": ("VALUE", "of AdamW"),
        "clip": ("NORM", "the greatest norm of all gradients together, 0 for no limit"),
        "schedule": ("", "linear: warm-up, then down to 0; trapezoid: warm-up, constant, down to 0 at the end"),
        "warmup": ("N", "updates, or below 1 a share of all"),
        "decay": ("N", "updates at the end of a trapezoid, or below 1 a share of all"),
        "precision": ("", "of products; weights and sums are fp32. auto: bf16 where it is faster"),
    },
    "on the way": {
        "evaluate_every": ("STEPS", "between evaluations (default: a twentieth of all)"),
        "evaluation_tokens": ("N", "of the held-out documents, at most"),
        "checkpoint_every": ("STEPS", "between checkpoints"),
        "keep": ("N", "checkpoints that stay"),
        "log_every": ("STEPS", "between lines of training.jsonl"),
        "resume": ("", "go on from the newest complete checkpoint in --output"),
        "workers": ("N", "threads that make batches, 0 for none beside the training's"),
        "device": ("NAME", "cpu, cuda, cuda:1 (default: the GPU if there is one; with torchrun, one each)"),
        "fsdp": ("", "shard weights and the optimizer's state over the processes, to save memory"),
        "tensorboard": ("", "write for TensorBoard too, where it is installed"),
        "progress": ("", "show a bar, or lines where standard error is no terminal"),
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
    """Makes the settings of parsed arguments. Raises ValueError, with the name of the field, as `Settings` does."""
    return Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})


def parse(argv: Sequence[str] | None = None, prog: str = "python -m fastbert.training.pretrain") -> Settings:
    """Makes the settings of a command line, by default the process's.

    Raises SystemExit as argparse does, also for values that no run can have.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A BERT from raw text.",
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
    """Returns what argparse is told of a field of settings, whose annotations are strings.

    text: the help, to which the default is added. choices: the values of fields that have a few, by name.
    """
    annotation = str(field.type)
    if field.default is dataclasses.MISSING:
        made: dict[str, Any] = {"required": True}
    else:
        made = {"default": field.default}
        if field.default not in (None, ()) and field.default is not False:
            text += f" (default: {_written(field.default)})"
    made["help"] = text.replace("%", "%%")
    if annotation == "bool":
        # Python 3.10 adds a default of its own to the help of a BooleanOptionalAction that has one.
        on_and_off = {"action": argparse.BooleanOptionalAction} if field.default else {"action": "store_true"}
        return {"help": made["help"], **on_and_off}
    if annotation.startswith("tuple"):
        made["nargs"] = "+"
    if field.name in choices:
        return {**made, "choices": choices[field.name]}
    number = int if annotation.startswith("int") else float if annotation.startswith("float") else str
    return {**made, "metavar": metavar, "type": number}


def _written(value: Any) -> str:
    if value is True:
        return "yes"
    return f"{value:g}" if isinstance(value, float) else str(value)
