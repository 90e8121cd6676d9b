"""`fastbert search` prints lines of hits, and `fastbert rerank` reads them and prints its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from fastbert.text.files import STDIN, read_texts

Hit = dict[str, Any]  # corpus_id, score and text


def print_line(query: str, hits: Sequence[Hit]) -> None:
    """Prints a query and its hits as one line of JSON."""
    print(json.dumps({"query": query, "hits": hits}, ensure_ascii=False))


def read_lines(path: str) -> Iterator[tuple[str, list[Hit]]]:
    """Returns the query and the hits of each line that `print_line` printed.

    Raises FileNotFoundError at once, and ValueError that names the line for other content.
    """
    if path != STDIN and not os.path.exists(path):
        raise FileNotFoundError(f"hits: there is no file {path!r}")
    return _parsed(path)


def _parsed(path: str) -> Iterator[tuple[str, list[Hit]]]:
    for number, line in enumerate(read_texts(path), start=1):
        place = f"{'standard input' if path == STDIN else path}, line {number}"
        try:
            record = json.loads(line)
            query, hits = record["query"], record["hits"]
            is_right = isinstance(query, str) and all(isinstance(h["text"], str) and "corpus_id" in h for h in hits)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place}: expected an object with a query and hits that have texts: {error!r}") from error
        if not is_right:
            raise ValueError(f"{place}: expected an object with a query and hits that have texts")
        yield query, hits
