"""`fastbert next-sentence` prints the probability that a second sentence follows a first."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import add_model_command


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "next-sentence",
        "whether a second sentence follows a first",
        """The model needs a next-sentence head. The output has p_is_next, the probability that the second sentence
follows, and is_next.

example:
  fastbert next-sentence "He opened the door." "Nobody was there." --model google-bert/bert-base-uncased""",
    )
    parser.add_argument("first", help="first sentence")
    parser.add_argument("second", help="second sentence")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints p_is_next and is_next, one line each."""
    import torch

    from fastbert.cli import models
    from fastbert.models.tasks import BertForNextSentencePrediction

    model, tokenizer = models.load_task(BertForNextSentencePrediction, "next-sentence", args)
    encoding = tokenizer([args.first], [args.second], return_tensors="pt").to(model.device)
    with torch.inference_mode():
        p_is_next = model(**encoding).p_is_next.item()
    print(f"p_is_next\t{p_is_next:.6f}\nis_next\t{p_is_next > 0.5}")
