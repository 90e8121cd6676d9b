"""What subcommands of `fastbert` share: the model's options, messages, fields of JSON lines."""

from __future__ import annotations

import argparse
from typing import Any

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def add(commands: Any, name: str, summary: str, epilog: str, *, model: bool = True) -> argparse.ArgumentParser:
    """A subcommand with the options that all share. model: whether --model must be given."""
    parser = add_parser(commands, name, summary, epilog)
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=model, metavar="FOLDER", help="folder in Hugging Face layout, or hub id")
    add_how(group)
    add_messages(parser)
    return parser


def add_how(group: Any) -> None:
    """How a model is loaded."""
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    choice = "the checkpoint's, and of vectors and scores on a CPU bfloat16 where it has that in hardware"
    group.add_argument("--dtype", default="auto", help=f"float32, bfloat16 or float16 (default: {choice})")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument(
        "--backend", default="auto", choices=("auto", "triton", "cpu", "torch"), help="default: %(default)s"
    )
    group.add_argument("--precision", choices=("fp8", "int8"), help="linears on 8-bit operands: GPUs; int8 on CPUs too")
    group.add_argument("--strict", action="store_true", help="an error where the backend cannot do something")


def add_parser(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A subcommand without options."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(usage_error=parser.error)
    return parser


def add_messages(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="store_true", help="say more on standard error")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--field", metavar="NAME", help="the lines are JSON objects, with the text under this name (.jsonl: text)"
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value
