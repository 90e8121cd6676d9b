"""`fastbert verify` reports whether a model is right on the user's texts."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from fastbert.cli.options import (
    add_command,
    add_field_option,
    add_loading_options,
    add_message_options,
    positive_int,
)


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "verify",
        "checks a model on your texts: every layer is compared with float64 and with plain PyTorch",
        """If a result is wrong, the exit code is 1, and the report names the first wrong part. The reference runs in
float64 on the CPU, so a few hundred texts take minutes with a large model.

examples:
  fastbert verify ./my-model --texts texts.txt
  fastbert verify ./my-model --gradients
  fastbert verify google-bert/bert-base-uncased --dtype bfloat16 --limit 50 --texts texts.txt --html report.html""",
    )
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help="folder in Hugging Face layout, or hub id")
    add_loading_options(group)
    parser.add_argument("--texts", dest="input", metavar="FILE", help="texts, one a line (default: a dozen examples)")
    add_field_option(parser)
    parser.add_argument("--limit", type=positive_int, metavar="N", help="greatest number of texts (default: all)")
    parser.add_argument("--gradients", action="store_true", help="also check the gradient of every parameter")
    parser.add_argument("--json", metavar="FILE", help="file for the report as JSON; - is standard output, alone")
    parser.add_argument("--html", metavar="FILE", help="file for the report as a page")
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report and writes the requested files. Returns 0 if the model is right, else 1."""
    from fastbert.checkpoint.files import write_text
    from fastbert.cli import models, texts
    from fastbert.diagnostics.verify.entry import verify
    from fastbert.pipelines.sentence import SentenceEncoder
    from fastbert.text.files import STDIN
    from fastbert.text.tokenizer import Tokenizer

    for path in (args.json, args.html):
        if path not in (None, STDIN) and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"output: there is no folder {str(Path(path).parent)!r}")
    lines = None if args.input is None else list(islice(texts.read(args.input, args.field), args.limit))
    if lines == []:
        raise ValueError(f"texts: {args.input} is empty")
    model, folder = models.load_any(args)
    tokenizer = None
    if not isinstance(model, SentenceEncoder) and any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")
    ):
        tokenizer = Tokenizer.from_pretrained(folder)
    report = verify(model, lines, tokenizer=tokenizer, gradients=args.gradients)
    content = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if args.json == STDIN:
        sys.stdout.write(content)
    else:
        print(report)
        if args.json is not None:
            write_text(Path(args.json), content)
    if args.html is not None:
        write_text(Path(args.html), report.to_html())
    return 0 if report.ok else 1
