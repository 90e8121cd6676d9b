"""What the subcommands `search`, `rerank` and `verify` do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.files import write_text
from fastbert.cli.commands import _encoder, _how, _progress, _read, any_model
from fastbert.diagnostics.verify.entry import verify as verify_model
from fastbert.pipelines.cross import CrossEncoder
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.files import STDIN, read_texts
from fastbert.text.tokenizer import Tokenizer
from fastbert.vectors.search import semantic_search

QUERIES = 256  # scored at once


def search(args: argparse.Namespace) -> None:
    queries = _queries(args)
    texts = None if args.input is None else list(_read(args))
    corpus = None if args.vectors is None else _matrix(args.vectors)
    if corpus is not None and texts is not None and len(corpus) != len(texts):
        raise ValueError(f"vectors: {args.vectors} has {len(corpus)} rows, but {args.input} has {len(texts)} lines")
    encoder = _encoder(args)
    if corpus is None:
        with _progress(args.input) as bar:
            parts = list(encoder.encode_stream(texts or [], prompt=_document_prompt(encoder), progress=bar.update))
        corpus = np.concatenate(parts) if parts else np.zeros((0, encoder.get_embedding_dimension()), np.float32)
    named = encoder.similarity_fn_name
    score = args.score or (named if named in ("cosine", "dot") else "cosine")
    while batch := list(islice(queries, QUERIES)):
        vectors = encoder.encode_query(batch, show_progress_bar=False)
        found = semantic_search(vectors, corpus, top_k=args.top_k, score=score, device=encoder.device)
        for query, hits in zip(batch, found, strict=True):
            if texts is not None:
                hits = [{**hit, "text": texts[hit["corpus_id"]]} for hit in hits]
            _print(query, hits)


def rerank(args: argparse.Namespace) -> None:
    if args.hits is None:
        hits = [{"corpus_id": i, "text": text} for i, text in enumerate(_read(args))]
        lists: Iterator[tuple[str, list[dict[str, Any]]]] = iter([(args.query, hits)])
    else:
        if args.hits != STDIN and not os.path.exists(args.hits):
            raise FileNotFoundError(f"hits: there is no file {args.hits!r}")
        lists = _hits(args.hits)
    encoder = CrossEncoder.from_pretrained(
        args.model, max_length=args.max_length, token_budget=args.batch_tokens, **_how(args)
    )
    if encoder.num_labels != 1:
        raise ValueError(f"{args.model}: has {encoder.num_labels} labels; one is needed to order texts by")
    while batch := list(islice(lists, QUERIES)):
        pairs = [(query, hit["text"]) for query, hits in batch for hit in hits]
        scores = iter(encoder.predict(pairs, show_progress_bar=False).tolist())
        for query, hits in batch:
            scored = [{"corpus_id": hit["corpus_id"], "score": next(scores), "text": hit["text"]} for hit in hits]
            _print(query, sorted(scored, key=lambda hit: hit["score"], reverse=True)[: args.top_k])


def verify(args: argparse.Namespace) -> int:
    for path in (args.json, args.html):
        if path not in (None, STDIN) and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"output: there is no folder {str(Path(path).parent)!r}")
    texts = None if args.input is None else list(islice(_read(args), args.limit))
    if texts == []:
        raise ValueError(f"texts: {args.input} is empty")
    model, folder = any_model(args)
    tokenizer = None
    if not isinstance(model, SentenceEncoder):
        found = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        tokenizer = Tokenizer.from_pretrained(folder) if found else None
    report = verify_model(model, texts, tokenizer=tokenizer)
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


def _queries(args: argparse.Namespace) -> Iterator[str]:
    if args.query_file is None:
        return iter(args.queries)
    if args.query_file == STDIN == args.input:
        raise ValueError("queries: standard input cannot be both the queries and the texts")
    return _read(argparse.Namespace(input=args.query_file, field=None))


def _matrix(path: str) -> np.ndarray:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"vectors: {path} is no .npy file: {error}") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2:
        raise ValueError(f"vectors: expected {path} to hold one matrix, (n, dim)")
    return matrix


def _document_prompt(encoder: SentenceEncoder) -> str:
    """The prompt of `encode_document`."""
    return encoder.prompts.get("document", "")


def _hits(path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(query, hits) of each line, as `search` printed it."""
    for number, line in enumerate(read_texts(path), start=1):
        where = f"{'standard input' if path == STDIN else path}, line {number}"
        try:
            record = json.loads(line)
            query, hits = record["query"], record["hits"]
            right = isinstance(query, str) and all(isinstance(h["text"], str) and "corpus_id" in h for h in hits)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where}: expected an object with a query and hits that have texts: {error!r}") from error
        if not right:
            raise ValueError(f"{where}: expected an object with a query and hits that have texts")
        yield query, hits


def _print(query: str, hits: Iterable[dict[str, Any]]) -> None:
    print(json.dumps({"query": query, "hits": list(hits)}, ensure_ascii=False))


__all__ = ["rerank", "search", "verify"]
