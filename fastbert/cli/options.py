"""Subcommands of `fastbert` share these arguments: the model's, messages, the field of JSON lines."""

from __future__ import annotations

import argparse
from typing import Any

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def add_model_command(
    commands: Any, name: str, summary: str, epilog: str, *, model_required: bool = True
) -> argparse.ArgumentParser:
    """Adds a subcommand that has --model, the options of loading, and those of messages."""
    parser = add_command(commands, name, summary, epilog)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=model_required, metavar="FOLDER", help="folder in Hugging Face layout, or hub id"
    )
    add_loading_options(group)
    add_message_options(parser)
    return parser


def add_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """Adds a subcommand without options of its own."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(usage_error=parser.error)
    return parser


def add_loading_options(group: Any) -> None:
    """Adds the options that `models.loading_arguments` reads."""
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    choice = "the checkpoint's; for vectors and scores on a CPU, bfloat16 if the CPU multiplies it faster"
    group.add_argument("--dtype", default="auto", help=f"float32, bfloat16 or float16 (default: {choice})")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads on the CPU (default: the limit of the machine or container)"
    )
    group.add_argument(
        "--backend", default="auto", choices=("auto", "triton", "cpu", "torch"), help="kernels (default: %(default)s)"
    )
    group.add_argument(
        "--precision", choices=("fp8", "int8"), help="8-bit operands in linear layers: on GPUs; int8 also on CPUs"
    )
    group.add_argument("--strict", action="store_true", help="raise an error instead of a fallback")


def add_message_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `main` reads."""
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="store_true", help="print more messages on standard error")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_field_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `texts.read` reads beside the name of the file."""
    parser.add_argument(
        "--field", metavar="NAME", help="field with the text, if the lines are JSON objects (.jsonl: text)"
    )


def add_reading_options(group: Any) -> None:
    """Adds the options of a `Reading`: the form of documents in files."""
    group.add_argument(
        "--layout", default="auto", choices=("auto", "sentences", "documents", "files"),
        help="layout of plain text: one sentence on each line, and a blank line between documents (auto, sentences); "
        "or running text with one document on each line (documents) or in each file (files)",
    )  # fmt: skip
    group.add_argument(
        "--field", default="text", metavar="NAME",
        help="field of JSON lines and Parquet with running text, or a list of sentences (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--errors", default="strict", choices=("strict", "replace"),
        help="for bytes that are not UTF-8: stop, or replace them by U+FFFD and count them (default: %(default)s)",
    )  # fmt: skip


def positive_int(text: str) -> int:
    """Converts an argument that counts something. argparse shows its error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value
