"""This module reads tables (CSV, TSV), and replaces class numbers from datasets by class names."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastbert.training.finetuning.columns import RecordError, several

logger = logging.getLogger("fastbert")

Row = tuple[list[str], int]  # cells, and the line of the file at which they begin
_limit = threading.Lock()


def read_table(text: str, name: str, kind: str) -> Iterator[tuple[dict[str, str], str]]:
    """Yields (cells by column, place) of a CSV or TSV text whose first row is the header.

    Empty lines are skipped. Rows with only empty cells are skipped too, with a warning.

    CSV: if the header has no comma, the separator is a semicolon or a tab. TSV: quotes delimit cells, as Excel writes
    them. But if every line has the same number of cells when quotes are read as text, and reading them as delimiters
    would join lines or fail, then they are part of the text, as in GLUE's files.

    Raises RecordError, with the line, for rows with a length other than the header's, for duplicate columns, and for a
    quote that is not closed.
    """
    separator = "\t" if kind == "tsv" else _separator(text)
    rows = _tsv_rows(text, name) if kind == "tsv" else _rows(text, separator, name)
    header, first = rows[0]
    header = _header(header, f"{name}, line {first}")
    blank: list[str] = []
    for cells, line in rows[1:]:
        place = f"{name}, line {line}"
        if not any(cells) or all(map(str.isspace, cells)):
            blank.append(place)
            continue
        if len(cells) != len(header):
            raise RecordError(f"{place}: got {len(cells)} cells, expected {len(header)}, as in the header")
        yield dict(zip(header, cells, strict=True)), place
    if blank:
        logger.warning("%s: rows without any text are left out: %s", name, several(blank))


def _separator(text: str) -> str:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    return next((each for each in ",;\t" if each in header), ",")


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    twice = {name: [n for n, other in enumerate(names, start=1) if other == name] for name in names}
    for name, numbers in twice.items():
        if len(numbers) > 1:
            raise RecordError(f"{place}: column {name!r} is there twice, as columns {' and '.join(map(str, numbers))}")
    return names


def _tsv_rows(text: str, name: str) -> list[Row]:
    if '"' not in text:
        return _rows(text, "\t", name)
    plain = [
        (line.removesuffix("\r").split("\t"), number)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip("\r\n")
    ]
    is_even = len({len(cells) for cells, _ in plain}) == 1
    try:
        quoted = _rows(text, "\t", name)
    except RecordError:
        if not is_even:
            raise
        quoted = []
    if not is_even or [line for _, line in quoted] == [line for _, line in plain]:
        return quoted
    logger.warning("%s: quotes are part of the text; read as quotes of cells they would join lines or not close", name)
    return plain


def _rows(text: str, separator: str, name: str) -> list[Row]:
    rows: list[Row] = []
    # newline="" preserves line ends inside of cells, and the reader counts the lines of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    with _long_cells():
        try:
            for cells in reader:
                if cells and cells != [""]:
                    rows.append((cells, line))
                line = reader.line_num + 1
        except csv.Error as error:
            last = f" to {reader.line_num}" if reader.line_num > line else ""
            raise RecordError(f"{name}, line {line}{last}: {error}; a quote inside of a cell is doubled") from None
    return rows


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allows cells longer than 131,072 characters; the limit is global in Python, and is restored afterwards."""
    with _limit:
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def class_names(features: Any) -> dict[str, list[str]]:
    """Returns {column: names of its classes} from the features of a datasets.Dataset, including lists of classes."""
    found: dict[str, list[str]] = {}
    for column, feature in (features or {}).items() if isinstance(features, Mapping) else ():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if isinstance(names, list) and names:
            found[column] = names
    return found


def class_names_in_schema(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Returns the same from the metadata of a Parquet file written by datasets; {} for other files."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = inner["names"]
    return found


def with_names(row: Mapping[str, Any], classes: Mapping[str, list[str]], place: str) -> dict[str, Any]:
    """Returns the row with class names instead of class numbers; -1, which means no class, becomes None.

    Raises RecordError for a number without a name.
    """
    named = dict(row)
    for column, names in classes.items():
        cell = named.get(column)
        if isinstance(cell, list):
            named[column] = [_name(number, names, column, place) for number in cell]
        elif cell is not None:
            named[column] = _name(cell, names, column, place)
    return named


def _name(number: Any, names: list[str], column: str, place: str) -> Any:
    if number == -1 or not isinstance(number, int):
        return None if number == -1 else number
    if not 0 <= number < len(names):
        raise RecordError(f"{place}: column {column!r} has class {number}, and there are names for {len(names)}")
    return names[number]
