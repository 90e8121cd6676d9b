"""`fastbert bench` compares fastbert with its alternatives on the user's model, texts and device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastbert.bench.options import LIMIT, BenchOptions
from fastbert.cli.options import add_command, add_message_options, positive_int

FORMATS = (".html", ".md", ".json")


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "bench",
        "speed of fastbert, transformers and others, on your model, texts and device",
        """fastbert and transformers eager always take part, because the error bound comes from transformers eager.
The report lists packages that are not installed.

examples:
  fastbert bench ./my-model
  fastbert bench ./my-model --texts texts.txt --dtype bfloat16 --out report.html""",
    )
    parser.add_argument("model", metavar="MODEL", help="folder in Hugging Face layout, or hub id")
    parser.add_argument("--texts", metavar="FILE", help="texts, one a line, UTF-8 (default: Python's docstrings)")
    parser.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help=f"number of texts, drawn evenly (default: {LIMIT['cuda']} on a GPU, up to {LIMIT['cpu']} on a CPU)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cpu", "torch"), help="fastbert's")
    parser.add_argument("--peers", metavar="NAME,...", help="only these competitors, by their names in the table")
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=BenchOptions.rounds,
        metavar="N",
        help="greatest number of rounds over all texts (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=BenchOptions.seconds,
        metavar="S",
        help="seconds after which no new round begins, if three are done (default: %(default)g)",
    )
    parser.add_argument(
        "--latency", action=argparse.BooleanOptionalAction, default=True, help="also measure single short texts"
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU, encode all texts once more in a separate process for each competitor, for its peak memory",
    )
    parser.add_argument("--out", metavar="FILE", help="file for the report (.html, .md) or the results (.json)")
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes --out. Returns 0 if fastbert's output was right, else 1.

    Raises ValueError or OSError for arguments that do not fit and files that cannot be read or written.
    """
    from fastbert.bench.report import render_terminal, write_report
    from fastbert.bench.run import measure

    check_output(args.out)
    results = measure(BenchOptions(**{name: getattr(args, name) for name in BenchOptions.__dataclass_fields__}))
    print(render_terminal(results))
    if args.out is not None:
        if Path(args.out).suffix == ".json":
            results.save(args.out)
        else:
            write_report(results, args.out)
    return 0 if all(row.status == "ok" for row in results.rows if row.competitor == "fastbert") else 1


def check_output(path: str | None) -> None:
    """Raises ValueError or FileNotFoundError before the work for an --out that could not be written after it."""
    if path is None:
        return
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"out: got {path!r}, expected a name that ends in {', '.join(FORMATS)}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {str(Path(path).parent)!r}")
