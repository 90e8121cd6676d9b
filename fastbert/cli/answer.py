"""`fastbert answer` prints the answers to questions: exact pieces of a context."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.cli.entities import add_window_options
from fastbert.cli.options import add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "answer",
        "the answers to questions, as exact pieces of a context",
        """The model needs a question-answering head. The output is a line of JSON for each question, with its answers:
the score, the exact words, and their start and end in the context, in characters. With --lines, it is a line for each
answer: number of the question, score, start, end, words. A context may be longer than the model's sequence length.

examples:
  fastbert answer "Where was Ada born?" --context "Ada was born in London." --model deepset/minilm-uncased-squad2
  fastbert answer "Who paid?" "When?" --context-file report.txt --no-answer --model ./my-reader
  fastbert answer --file questions.jsonl --top-k 3 --model ./my-reader""",
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="questions about one context, without --file")
    parser.add_argument("--context", metavar="TEXT", help="text that holds the answers")
    parser.add_argument("--context-file", metavar="FILE", help="file with the context; - is standard input")
    parser.add_argument("--file", dest="input", help="JSON lines with a question and a context; - is standard input")
    parser.add_argument("--field", default="question", metavar="NAME", help="question in --file, default: %(default)s")
    parser.add_argument(
        "--context-field", default="context", metavar="NAME", help="context in --file, default: %(default)s"
    )
    parser.add_argument(
        "--top-k", type=positive_int, default=1, metavar="N", help="number of answers (default: %(default)s)"
    )
    parser.add_argument("--no-answer", action="store_true", help="the context may hold no answer, as in SQuAD 2")
    parser.add_argument(
        "--threshold", type=float, metavar="X",
        help="with --no-answer: the empty answer wins if its logits exceed the best answer's by more than X "
        "(default: scores decide)",
    )  # fmt: skip
    parser.add_argument(
        "--answer-length", type=positive_int, default=15, metavar="N",
        help="greatest length of an answer, in tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--any-place", action="store_true", help="answers may begin and end inside words")
    parser.add_argument("--lines", action="store_true", help="print a tab-separated line for each answer, and no JSON")
    add_window_options(parser, "384, or the model's limit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the answers to each question, as JSON lines or a line for each answer."""
    contexts = [each for each in (args.context, args.context_file) if each is not None]
    if (args.input is None) != bool(args.questions) or len(contexts) != (args.input is None):
        args.usage_error("expected questions with --context or --context-file, or --file alone")
    if args.threshold is not None and not args.no_answer:
        args.usage_error("--threshold: expected --no-answer beside it")

    from fastbert.cli import models
    from fastbert.models.tasks import BertForQuestionAnswering
    from fastbert.pipelines.answers import QuestionAnswerer

    pairs = _pairs(args)
    model, tokenizer = models.load_task(BertForQuestionAnswering, "question-answering", args)
    answerer = QuestionAnswerer(
        model, tokenizer, top_k=args.top_k, no_answer=args.no_answer, threshold=args.threshold,
        max_answer_length=args.answer_length, whole_words=not args.any_place, max_length=args.max_length,
        stride=args.stride, token_budget=args.batch_tokens,
    )  # fmt: skip
    waiting: deque[str] = deque()

    def remembered() -> Iterator[tuple[str, str]]:
        for question, context in pairs:
            waiting.append(question)
            yield question, context

    for number, answers in enumerate(answerer.stream(remembered()), start=1):
        question = waiting.popleft()
        if not args.lines:
            print(json.dumps({"question": question, "answers": answers}, ensure_ascii=False))
            continue
        for each in answers:
            words = " ".join(each["answer"].split())
            print(f"{number}\t{each['score']:.6f}\t{each['start']}\t{each['end']}\t{words}")


def _pairs(args: argparse.Namespace) -> Iterable[tuple[str, str]]:
    """Returns questions with their contexts. A missing file raises now, and not after a model is loaded."""
    from fastbert.text.files import STDIN

    if args.input is not None:
        if args.input != STDIN and not Path(args.input).exists():
            raise FileNotFoundError(f"input: there is no file {args.input!r}")
        return _read(args.input, args.field, args.context_field)
    if args.context is not None:
        context = args.context
    elif args.context_file == STDIN:
        context = sys.stdin.read()
    else:
        context = Path(args.context_file).read_text(encoding="utf-8-sig")
    return [(question, context) for question in args.questions]


def _read(path: str, *fields: str) -> Iterator[tuple[str, str]]:
    """Yields the question and the context of each line. Raises ValueError, with the line, for one without them."""
    from fastbert.checks import check_text
    from fastbert.text.files import STDIN, read_texts

    for number, line in enumerate(read_texts(path), start=1):
        place = f"{'standard input' if path == STDIN else path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in fields):
            raise ValueError(f"{place}: expected a JSON object with strings under {' and '.join(map(repr, fields))}")
        question, context = (record[field] for field in fields)
        check_text(place, question + context)
        yield question, context
