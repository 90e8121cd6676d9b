"""This module reads texts for the subcommands of `fastbert`, from files and standard input, with a progress bar."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.text.files import STDIN, count_lines, read_texts


def read(path: str, field: str | None = None) -> Iterator[str]:
    """Returns the lines of a file or of standard input. A missing file raises now, and not after a model is loaded.

    field: the name of the text if the lines are JSON objects; by default "text" in a file that ends in .jsonl.
    """
    if path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("input: name a file, or pipe texts in, one a line")
    elif not os.path.exists(path):
        raise FileNotFoundError(f"input: there is no file {path!r}")
    if field is None and Path(path).suffix == ".jsonl":
        field = "text"
    return read_texts(path, field)


def remember(texts: Iterable[str], queue: deque[str]) -> Iterator[str]:
    """Yields the texts, and puts each into the queue as well: its vector comes one window later."""
    for text in texts:
        queue.append(text)
        yield text


def progress_bar(path: str) -> Any:
    """Returns a progress bar over the lines of a file on standard error, if that is a terminal."""
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    total = count_lines(path) if shown else None
    return tqdm(total=total, unit="text", file=sys.stderr, disable=not shown)
