"""`fastbert pretrain` makes a BERT from raw text."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import add_command, add_message_options
from fastbert.training import options


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "pretrain",
        "trains a BERT on raw text: masked tokens and next sentences",
        """The text is tokenised once and kept in a cache. After a crash, --resume continues the run, with the same
result. The result is a folder that transformers and fastbert read.

"""
        + options.EXAMPLES,
    )
    options.add_arguments(parser)
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains. Returns 0 after all steps, and 128 + the number of the signal that stopped the run before.

    Raises ValueError or OSError for settings, text and folders that do not fit.
    """
    settings = options.settings_of(args)
    from fastbert.training.pretrain import pretrain

    result = pretrain(settings)
    return 0 if result.signal is None else 128 + result.signal
