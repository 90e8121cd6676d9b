"""`fastbert entities` prints the entities of each text, with their places."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from fastbert.cli.options import add_field_option, add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "entities",
        "the entities of each text, with their places",
        """The model needs a token-classification head. A line of JSON for each text: the text and its entities, each
with its group, score, exact words, and first and last character as in Python. With --lines, a line for each entity:
number of the text, group, score, start, end, words.
A model of tags, such as NOUN, gives each word its tag. Longer texts than the model reads are read in windows.

examples:
  fastbert entities "Ada Lovelace was born in London." --model dslim/bert-base-NER
  fastbert entities --file news.txt --strategy first --lines --model ./my-tagger""",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts, if there is no --file")
    parser.add_argument("--file", dest="input", help="texts, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument(
        "--strategy", choices=("none", "simple", "first", "average", "max"),
        help="none: every token with its label; simple: tokens of one label together; the others give a word one "
        "label, its first token's, the best on average, or that of the token with the highest score "
        "(default: simple, or first for a model of tags, such as NOUN)",
    )  # fmt: skip
    parser.add_argument("--lines", action="store_true", help="a line for each entity, tab-separated, and no JSON")
    add_window_options(parser)
    parser.set_defaults(run=run)


def add_window_options(parser: argparse.ArgumentParser, longest: str = "as many as the model reads") -> None:
    """Adds --max-length, --stride and --batch-tokens."""
    parser.add_argument("--max-length", type=positive_int, metavar="N", help=f"tokens of a window (default: {longest})")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens that two windows share (default: 128, half a window at most)"
    )
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="tokens in a batch, at most")


def run(args: argparse.Namespace) -> None:
    """Prints the entities of each text, as JSON lines or a line for each entity."""
    if bool(args.texts) == (args.input is not None):
        args.usage_error("expected texts or --file, one of the two")
    import json
    from collections import deque

    from fastbert.cli import models, texts
    from fastbert.models.tasks import BertForTokenClassification
    from fastbert.pipelines.entities import EntityRecognizer

    lines: Iterable[str] = args.texts if args.input is None else texts.read(args.input, args.field)
    model, tokenizer = models.load_task(BertForTokenClassification, "token-classification", args)
    recognizer = EntityRecognizer(
        model, tokenizer, strategy=args.strategy, max_length=args.max_length, stride=args.stride,
        token_budget=args.batch_tokens,
    )  # fmt: skip
    waiting: deque[str] = deque()
    found: Iterator[list[dict[str, Any]]] = recognizer.stream(texts.remember(lines, waiting))
    for number, entities in enumerate(found, start=1):
        text = waiting.popleft()
        if not args.lines:
            print(json.dumps({"text": text, "entities": entities}, ensure_ascii=False))
            continue
        for each in entities:
            group = each["entity" if args.strategy == "none" else "entity_group"]
            word = " ".join(each["word"].split())
            print(f"{number}\t{group}\t{each['score']:.6f}\t{each['start']}\t{each['end']}\t{word}")
