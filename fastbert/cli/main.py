"""`main` runs the command `fastbert`: it reads the arguments, shows messages and returns the exit code.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted, 141 the reader of standard output closed it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastbert._version import __version__
from fastbert.cli import (
    answer,
    bench,
    classify,
    demo,
    embed,
    entities,
    fill_mask,
    finetune,
    info,
    next_sentence,
    pretrain,
    rerank,
    search,
    serve,
    similarity,
    tokenizer,
    tune,
    verify,
)
from fastbert.cli.options import MINILM
from fastbert.threads import set_threads

# One file each, in the order of --help. `add` adds the arguments and the function to run. PyTorch is imported only in
# that function, so that --help and --version do not wait for it.
COMMANDS = (
    embed, similarity, search, rerank, fill_mask, next_sentence, classify, entities, answer, finetune, pretrain,
    tokenizer, serve, info, verify, bench, tune, demo,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `fastbert` with these arguments (those of the process by default) and returns the exit code.

    Raises SystemExit as argparse does, for --help and --version and for wrong usage.
    """
    args = _parser().parse_args(argv)
    with _messages(args.verbose):
        try:
            args.thread_limit = set_threads(getattr(args, "threads", None))
            code: int | None = args.run(args)
            sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            # Python would report the error once more at its last flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            if args.debug:
                raise
            print("fastbert: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if args.debug:
                raise
            print(f"fastbert: error: {_describe(error)}", file=sys.stderr)
            return 1


def _describe(error: Exception) -> str:
    """Returns the message of an error, with its type if the message was not written for users."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if text and isinstance(error, (ValueError, TypeError, OSError, IndexError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _messages(verbose: bool) -> Iterator[None]:
    """Shows the library's log on standard error during a command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("fastbert")
    level = logger.level
    logger.addHandler(handler)
    if verbose:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"fastbert: {record.levelname.lower()}: {record.getMessage()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbert",
        description="A fast BERT encoder: embeddings, masked words, sentence pairs, classes, entities, answers.",
        epilog="example:\n  fastbert embed texts.txt --model " + MINILM + " --output vectors.npy\n\n"
        "fastbert COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
