"""`fastbert entities` prints the entities of each text, with their positions."""

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
        "the entities of each text, with their positions",
        """The model needs a token-classification head. The output is a line of JSON for each text, with its entities:
the group, the score, the exact words, and their start and end in the text, in characters. With --lines, it is a line
for each entity: number of the text, group, score, start, end, words.
A model of plain tags, such as NOUN, gives each word its tag. A text may be longer than the model's sequence length.

examples:
  fastbert entities "Ada Lovelace was born in London." --model dslim/bert-base-NER
  fastbert entities --file news.txt --strategy first --lines --model ./my-tagger""",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts, without --file")
    parser.add_argument("--file", dest="input", help="texts, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument(
        "--strategy", choices=("none", "simple", "first", "average", "max"),
        help="none: every token has its label; simple: neighbouring tokens with the same label are joined; first, "
        "average, max: a word has the label of its first token, the best label on average, or the label of its token "
        "with the highest score (default: simple, or first for a model of plain tags, such as NOUN)",
    )  # fmt: skip
    parser.add_argument("--lines", action="store_true", help="print a tab-separated line for each entity, and no JSON")
    add_window_options(parser)
    parser.set_defaults(run=run)


def add_window_options(parser: argparse.ArgumentParser, longest: str = "the model's limit") -> None:
    """Adds --max-length, --stride and --batch-tokens."""
    parser.add_argument("--max-length", type=positive_int, metavar="N", help=f"tokens in a window (default: {longest})")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="overlap of two windows in tokens (default: 128, at most half a window)"
    )
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="greatest number of tokens in a batch")


def run(args: argparse.Namespace) -> None:
    """Prints the entities of each text, as JSON lines or a line for each entity."""
    if bool(args.texts) == (args.input is not None):
        args.usage_error("expected either texts or --file")
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
    results: Iterator[list[dict[str, Any]]] = recognizer.stream(texts.remember(lines, waiting))
    for number, entities in enumerate(results, start=1):
        text = waiting.popleft()
        if not args.lines:
            print(json.dumps({"text": text, "entities": entities}, ensure_ascii=False))
            continue
        for each in entities:
            group = each["entity" if args.strategy == "none" else "entity_group"]
            word = " ".join(each["word"].split())
            print(f"{number}\t{group}\t{each['score']:.6f}\t{each['start']}\t{each['end']}\t{word}")
