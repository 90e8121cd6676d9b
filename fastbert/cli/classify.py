"""`fastbert classify` prints the labels of each text."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

from fastbert.cli.options import add_field_option, add_model_command, positive_int

BATCH = 64  # texts


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "classify",
        "the class of each text",
        """The model needs a classification head. The output is a line for each text: its labels, each followed by its
probability, the most probable first. For a regression model it is the predicted values.

examples:
  fastbert classify "What a film!" "I left early." --model ./my-classifier
  fastbert classify --file reviews.txt --top-k 1 --model ./my-classifier""",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts, without --file")
    parser.add_argument("--file", dest="input", help="texts, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument("--top-k", type=positive_int, metavar="N", help="labels in a line (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a line for each text: labels and their probabilities, or the values of a regression."""
    if bool(args.texts) == (args.input is not None):
        args.usage_error("expected either texts or --file")
    import torch

    from fastbert.cli import models, texts
    from fastbert.models.tasks import BertForSequenceClassification

    lines = iter(args.texts) if args.input is None else texts.read(args.input, args.field)
    model, tokenizer = models.load_task(BertForSequenceClassification, "classification", args)
    labels, problem = model.config.id2label, model.config.problem_type
    is_regression = problem == "regression" or (problem is None and len(labels) == 1)
    while batch := list(islice(lines, BATCH)):
        with torch.inference_mode():
            logits = model(**tokenizer(batch, padding=True, return_tensors="pt").to(model.device)).logits.float()
        if not is_regression:
            logits = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
        for row in logits.tolist():
            order = range(len(row)) if is_regression else sorted(range(len(row)), key=lambda i: -row[i])
            print("\t".join(f"{labels[i]}\t{row[i]:.6f}" for i in islice(order, args.top_k)))
