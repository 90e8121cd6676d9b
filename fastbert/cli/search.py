"""`fastbert search` prints the texts of a file, or the rows of a matrix, that are nearest to each query."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastbert.cli.options import MINILM, add_field_option, add_model_command, positive_int

if TYPE_CHECKING:
    import numpy as np

BATCH = 256  # queries


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "search",
        "the texts of a file, or the vectors of a matrix, nearest to each query",
        f"""The output is a line of JSON for each query:
{{"query": ..., "hits": [{{"corpus_id": ..., "score": ..., "text": ...}}]}}; corpus_id counts lines from 0.
--vectors is the output of `fastbert embed` for the file, which is then not embedded again; it is read in parts.

examples:
  fastbert search "How do I reset it?" --file faq.txt --model {MINILM}
  fastbert search --queries queries.txt --file articles.jsonl --vectors articles.npy --top-k 100 --model ./my-model""",
    )
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="queries, without --queries")
    parser.add_argument("--queries", dest="query_file", metavar="FILE", help="queries, one a line; - is standard input")
    parser.add_argument("--file", dest="input", metavar="FILE", help="texts to search, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument("--vectors", metavar="FILE", help=".npy file with the vectors of the texts, (n, dim)")
    parser.add_argument(
        "--top-k", type=positive_int, default=10, metavar="N", help="hits for a query (default: %(default)s)"
    )
    parser.add_argument(
        "--score", choices=("cosine", "dot"), help="similarity function (default: the model's, or cosine)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a line of JSON for each query, with its hits."""
    if bool(args.queries) == (args.query_file is not None):
        args.usage_error("expected either queries or --queries")
    if args.input is None and args.vectors is None:
        args.usage_error("expected --file, --vectors or both")
    import numpy as np

    from fastbert.cli import hits, models, texts
    from fastbert.vectors.search import semantic_search

    queries = _queries(args)
    corpus_texts = None if args.input is None else list(texts.read(args.input, args.field))
    corpus = None if args.vectors is None else _matrix(args.vectors)
    if corpus is not None and corpus_texts is not None and len(corpus) != len(corpus_texts):
        sizes = f"{len(corpus)} rows, but {args.input} has {len(corpus_texts)} lines"
        raise ValueError(f"vectors: {args.vectors} has {sizes}")
    encoder = models.load_encoder(args)
    if corpus is None:
        prompt = encoder.prompts.get("document", "")  # in the form of `encode_document`
        with texts.progress_bar(args.input) as bar:
            parts = list(encoder.encode_stream(corpus_texts or [], prompt=prompt, progress=bar.update))
        corpus = np.concatenate(parts) if parts else np.zeros((0, encoder.get_embedding_dimension()), np.float32)
    own_score = encoder.similarity_fn_name
    score = args.score or (own_score if own_score in ("cosine", "dot") else "cosine")
    while batch := list(islice(queries, BATCH)):
        vectors = encoder.encode_query(batch, show_progress_bar=False)
        hit_lists = semantic_search(vectors, corpus, top_k=args.top_k, score=score, device=encoder.device)
        for query, hit_list in zip(batch, hit_lists, strict=True):
            if corpus_texts is not None:
                hit_list = [{**hit, "text": corpus_texts[hit["corpus_id"]]} for hit in hit_list]
            hits.print_line(query, hit_list)


def _queries(args: argparse.Namespace) -> Iterator[str]:
    """Returns the queries of the command line, or of a file."""
    from fastbert.cli import texts
    from fastbert.text.files import STDIN

    if args.query_file is None:
        return iter(args.queries)
    if args.query_file == STDIN == args.input:
        raise ValueError("queries: standard input cannot be both the queries and the texts")
    return texts.read(args.query_file)


def _matrix(path: str) -> np.ndarray:
    """Returns the (n, dim) vectors of a .npy file, which are read piece by piece."""
    import numpy as np

    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"vectors: {path} is no .npy file: {error}") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2:
        raise ValueError(f"vectors: expected {path} to hold one matrix, (n, dim)")
    return matrix
