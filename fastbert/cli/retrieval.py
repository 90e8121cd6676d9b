"""Arguments of the subcommands that search, score pairs and verify; what they do is in commands_retrieval.py."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import MINILM, add, add_field, add_how, add_messages, add_parser, positive

_MODULE = "fastbert.cli.commands_retrieval"


def check(args: argparse.Namespace) -> None:
    """Ends with wrong usage where arguments do not go together."""
    if args.command == "search":
        if bool(args.queries) == (args.query_file is not None):
            args.usage_error("expected queries or --queries, one of the two")
        if args.input is None and args.vectors is None:
            args.usage_error("expected --file, --vectors or both")
    if args.command == "rerank" and not (args.query is None) == (args.input is None) != (args.hits is None):
        args.usage_error("expected a query and --file, or --hits")


def add_search(commands: Any) -> None:
    parser = add(
        commands,
        "search",
        "the texts of a file, or the vectors of a matrix, nearest to each query",
        f"""A line of JSON for each query: {{"query": ..., "hits": [{{"corpus_id": ..., "score": ..., "text": ...}}]}};
lines count from 0. --vectors is what `fastbert embed` wrote for the file, which is then not embedded again; it is read
a piece at a time.

examples:
  fastbert search "How do I reset it?" --file faq.txt --model {MINILM}
  fastbert search --queries queries.txt --file articles.jsonl --vectors articles.npy --top-k 100 --model ./my-model""",
    )
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="queries, if there is no --queries")
    parser.add_argument("--queries", dest="query_file", metavar="FILE", help="queries, one a line; - is standard input")
    parser.add_argument("--file", dest="input", metavar="FILE", help="texts to search, one a line; - is standard input")
    add_field(parser)
    parser.add_argument("--vectors", metavar="FILE", help=".npy file with their vectors, (n, dim)")
    parser.add_argument("--top-k", type=positive, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--score", choices=("cosine", "dot"), help="default: what the model was trained for, if that is one of the two"
    )
    parser.set_defaults(module=_MODULE)


def add_rerank(commands: Any) -> None:
    parser = add(
        commands,
        "rerank",
        "texts in the order of a cross-encoder's scores beside a query",
        """A line of JSON for each query, as `fastbert search` prints it; --hits takes such lines and scores them anew.

examples:
  fastbert rerank "How do I reset it?" --file faq.txt --top-k 3 --model cross-encoder/ms-marco-MiniLM-L6-v2
  fastbert search --queries q.txt --file faq.txt --model ./encoder > hits.jsonl
  fastbert rerank --hits hits.jsonl --model ./cross-encoder""",
    )
    parser.add_argument("query", nargs="?", metavar="QUERY", help="a query, with --file")
    parser.add_argument("--file", dest="input", metavar="FILE", help="texts to order, one a line; - is standard input")
    add_field(parser)
    parser.add_argument("--hits", metavar="FILE", help="what `fastbert search` printed; - is standard input")
    parser.add_argument("--top-k", type=positive, metavar="N", help="texts of a query that are kept (default: all)")
    parser.add_argument("--max-length", type=positive, metavar="N", help="tokens of a pair that are read")
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens in a batch")
    parser.set_defaults(module=_MODULE)


def add_verify(commands: Any) -> None:
    parser = add_parser(
        commands,
        "verify",
        "whether a model is right on your texts: every layer beside float64 and plain PyTorch",
        """The exit code is 1 if something is wrong; the first part that is off is named. The reference runs in float64
on the CPU: some hundred texts take minutes with a large model.

examples:
  fastbert verify ./my-model --texts texts.txt
  fastbert verify google-bert/bert-base-uncased --dtype bfloat16 --limit 50 --texts texts.txt --html report.html""",
    )
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help="folder in Hugging Face layout, or hub id")
    add_how(group)
    parser.add_argument("--texts", dest="input", metavar="FILE", help="texts, one a line (default: a dozen built in)")
    add_field(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="texts that are read (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON too; - is standard output, alone")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page too")
    add_messages(parser)
    parser.set_defaults(module=_MODULE)
