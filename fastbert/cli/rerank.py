"""`fastbert rerank` prints texts in the order of a cross-encoder's scores for a query."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastbert.cli.options import add_field_option, add_model_command, positive_int

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastbert.cli.hits import Hit

BATCH = 256  # queries


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "rerank",
        "texts, sorted by the scores that a cross-encoder gives them for a query",
        """The output is a line of JSON for each query, in the format of `fastbert search`. --hits reads such lines and
computes new scores.

examples:
  fastbert rerank "How do I reset it?" --file faq.txt --top-k 3 --model cross-encoder/ms-marco-MiniLM-L6-v2
  fastbert search --queries q.txt --file faq.txt --model ./encoder > hits.jsonl
  fastbert rerank --hits hits.jsonl --model ./cross-encoder""",
    )
    parser.add_argument("query", nargs="?", metavar="QUERY", help="a query, with --file")
    parser.add_argument("--file", dest="input", metavar="FILE", help="texts to sort, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument("--hits", metavar="FILE", help="output of `fastbert search`; - is standard input")
    parser.add_argument("--top-k", type=positive_int, metavar="N", help="texts to keep for a query (default: all)")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="greatest length of a pair, in tokens")
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="greatest number of tokens in a batch")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a line of JSON for each query, with its hits in their new order."""
    if not (args.query is None) == (args.input is None) != (args.hits is None):
        args.usage_error("expected either a query and --file, or --hits")

    from fastbert.cli import hits, models, texts
    from fastbert.pipelines.cross import CrossEncoder

    queries: Iterator[tuple[str, list[Hit]]]
    if args.hits is None:
        lines = texts.read(args.input, args.field)
        queries = iter([(args.query, [{"corpus_id": i, "text": text} for i, text in enumerate(lines)])])
    else:
        queries = hits.read_lines(args.hits)
    encoder = CrossEncoder.from_pretrained(
        args.model, max_length=args.max_length, token_budget=args.batch_tokens, **models.loading_arguments(args)
    )
    if encoder.num_labels != 1:
        raise ValueError(f"{args.model}: has {encoder.num_labels} labels, expected one, to sort texts by")
    while batch := list(islice(queries, BATCH)):
        pairs = [(query, hit["text"]) for query, old_hits in batch for hit in old_hits]
        scores = iter(encoder.predict(pairs, show_progress_bar=False).tolist())
        for query, old_hits in batch:
            scored = [{"corpus_id": hit["corpus_id"], "score": next(scores), "text": hit["text"]} for hit in old_hits]
            hits.print_line(query, sorted(scored, key=lambda hit: hit["score"], reverse=True)[: args.top_k])
