"""This module reads sentences of labelled tokens in CoNLL format.

The format has one token per line, and an empty line after a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastbert.training.finetuning.columns import Record, RecordError

DOCUMENT = "-DOCSTART-"
_BLANKS = re.compile("[ \t]+")  # only these characters, because a token may contain a no-break space


def read_conll(text: str, name: str, columns: Mapping[str, str]) -> list[Record]:
    """Returns one record per sentence, with "tokens" and "labels", lists of equal length. Its place is its first line.

    A line with a tab has its columns between tabs, any other line between blanks. The token is in the first column and
    the label in the last, or in the columns whose numbers ``columns`` has for "tokens" and "labels". Lines that begin
    with -DOCSTART- are skipped. Comments before a sentence are skipped too; they begin with # and have a different
    number of columns.

    Raises RecordError, with the line, if a line has a different number of columns than the first, or fewer than two.
    """
    tokens_at, labels_at = _place("tokens", columns, 1, name), _place("labels", columns, -1, name)
    if other := sorted(set(columns) - {"tokens", "labels", "label"}):
        raise RecordError(f"{name}: columns maps {', '.join(other)}; in CoNLL there are tokens and labels")
    lines = [_split(line.removesuffix("\r")) for line in text.split("\n")]
    counts = [len(cells) for cells in lines if cells and not cells[0].startswith(("#", DOCUMENT))]
    n_columns = counts[0] if counts else 0
    records: list[Record] = []
    tokens: list[str] = []
    labels: list[str] = []
    start = 0
    for number, cells in enumerate([*lines, []], start=1):
        if not cells or cells[0].startswith(DOCUMENT):
            if tokens:
                records.append(Record({"tokens": tokens, "labels": labels}, f"{name}, line {start}"))
            tokens, labels = [], []
            continue
        place = f"{name}, line {number}"
        if len(cells) != n_columns:
            if not tokens and cells[0].startswith("#"):
                continue
            raise RecordError(f"{place}: got {len(cells)} columns, expected {n_columns}, as in the first line")
        if n_columns < 2:
            raise RecordError(f"{place}: got one column, expected a token and its label")
        for ours, at in (("tokens", tokens_at), ("labels", labels_at)):
            if not -n_columns <= at < n_columns:
                raise RecordError(f"{place}: there are {n_columns} columns; columns maps {ours!r} to another one")
        if not tokens:
            start = number
        if not cells[tokens_at] or not cells[labels_at]:
            raise RecordError(f"{place}: the token or its label is empty")
        tokens.append(cells[tokens_at])
        labels.append(cells[labels_at])
    return records


def _split(line: str) -> list[str]:
    if not line.strip(" \t"):
        return []
    return line.split("\t") if "\t" in line.strip(" \t") else _BLANKS.split(line.strip(" \t"))


def _place(ours: str, columns: Mapping[str, str], default: int, name: str) -> int:
    """Returns the index of a column from its number, which counts from 1, or from -1 at the end."""
    written = columns.get(ours, columns.get("label", default) if ours == "labels" else default)
    try:
        number = int(written)
    except ValueError:
        number = 0
    if number == 0:
        raise RecordError(f"{name}: columns maps {ours!r} to {written!r}; in CoNLL a column is its number, from 1")
    return number - 1 if number > 0 else number
