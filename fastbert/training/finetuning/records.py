"""This module reads and checks records from files and from memory. Each record has its position.

The name of a file determines its kind, without its compression suffix (.gz, .bz2, .xz, .zst)::

    .csv                        a header, then one record per row; quoted cells may contain separators and line ends
    .tsv .tab                   the same with tabs
    .jsonl .ndjson              one JSON object per line
    .json                       JSON objects, one per line or in one list; or SQuAD's form
    .parquet                    one record per row
    .conll .conllu .bio .iob    one token per line, with its label last; an empty line ends a sentence

All files are UTF-8. `columns` maps columns to fastbert's names. All records are held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastbert.checks import one_of
from fastbert.training.data.streams import Stream, need_library, suffixes
from fastbert.training.finetuning.columns import ALIASES, Builder, Record, RecordError
from fastbert.training.finetuning.conll import read_conll
from fastbert.training.finetuning.squad import is_squad, squad_rows
from fastbert.training.finetuning.tables import class_names, class_names_in_schema, read_table, with_names

__all__ = ["ALIASES", "KINDS", "Record", "RecordError", "read_records"]

KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    **dict.fromkeys((".conll", ".conllu", ".conll03", ".bio", ".bio2", ".iob", ".iob2", ".ner"), "conll"),
}
NAMES = "csv", "tsv", "jsonl", "parquet", "squad", "conll"


def read_records(source: Any, *, kind: str = "auto", columns: Mapping[str, str] | None = None) -> list[Record]:
    """Returns the records of a file, of an iterable of dicts, of a datasets.Dataset or of a pandas.DataFrame.

    kind: csv, tsv, jsonl, parquet, squad, conll, or "auto" to use the file's name or content. columns: {fastbert's
    name: the file's name}; in CoNLL a column is its number, from 1, or from -1 at the end. A record has cells under
    both names. Labels that datasets stores as numbers with names are returned by name.

    Raises FileNotFoundError for a missing file. Raises RecordError, with file and line, row, record or byte, for
    content that cannot be read: bytes that are not UTF-8, no records, rows with a length other than the header's, a
    duplicate or ambiguous column, and invalid JSON. Warns of empty cells, with their count and lines.
    """
    one_of("kind", kind, "auto", *NAMES)
    columns = dict(columns or {})
    if not isinstance(source, (str, os.PathLike)):
        if kind != "auto":
            raise ValueError(f"kind: got {kind!r} for a {type(source).__name__}; kinds are of files")
        return _in_memory(source, columns)
    path = Path(source).expanduser()
    if path.is_dir():
        raise RecordError(f"{path}: expected a file, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    kind = _kind(path) if kind == "auto" else kind
    try:
        need_library(path)
    except ValueError as error:
        raise RecordError(str(error)) from None
    if kind == "parquet":
        return _parquet(path, columns)
    text = _text(path)
    if not text or text.isspace():
        raise RecordError(f"{path.name}: the file is empty")
    builder = Builder(path.name, columns, texts=kind in ("csv", "tsv"))
    if kind == "conll":
        return builder.finish(read_conll(text, path.name, columns))
    rows = {"csv": read_table, "tsv": read_table, "jsonl": _json, "squad": _squad}[kind](text, path.name, kind)
    return builder.finish([builder.record(row, place) for row, place in rows])


def _kind(path: Path) -> str:
    held = suffixes(path)[0]
    if held not in KINDS:
        raise RecordError(
            f"{path.name}: what it holds is not clear from its name, which ends in none of {', '.join(KINDS)}; "
            f"to say it: kind, one of {', '.join(NAMES)}"
        )
    return KINDS[held]


def _text(path: Path) -> str:
    """Returns the whole text, without a byte order mark. Line ends are unchanged."""
    try:
        content = b"".join(Stream(path, "strict", SimpleNamespace(replaced_bytes=0)).parts())
    except ValueError as error:
        raise RecordError(str(error)) from error
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = "; its first bytes are those of UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise RecordError(
            f"{path.name}, line {line}: not UTF-8: {error.reason} at byte {error.start} of the file{hint}"
        ) from None


# JSON


def _json(text: str, name: str, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the rows of JSON lines, of a list of objects, or of a SQuAD file."""
    start = text.lstrip()[:1]
    if start == "[":
        yield from _listed(_loaded(text, name), name)
        return
    if start == "{" and '"data"' in text and is_squad(_loaded(text, name, fails=False)):
        yield from squad_rows(_loaded(text, name), name)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.isspace():
            place = f"{name}, line {number}"
            row = _loaded(line, place)
            if not isinstance(row, dict):
                raise RecordError(f"{place}: got a JSON {type(row).__name__}, expected one object in each line")
            yield row, place


def _listed(rows: Any, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, row in enumerate(rows, start=1):
        place = f"{name}, record {number}"
        if not isinstance(row, dict):
            raise RecordError(f"{place}: got a JSON {type(row).__name__}, expected a list of objects")
        yield row, place


def _squad(text: str, name: str, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    whole = _loaded(text, name)
    if not is_squad(whole):
        raise RecordError(f'{name}: not in SQuAD\'s form, {{"data": [{{"paragraphs": [...]}}, ...]}}')
    yield from squad_rows(whole, name)


def _loaded(text: str, place: str, *, fails: bool = True) -> Any:
    """Returns the value of a JSON text. With fails=False, returns None for invalid JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs) and fails:
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RecordError(f"{place}: the key {twice!r} is there twice in an object")
        return record

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        if not fails:
            return None
        at = f"{place}, line {error.lineno}" if error.lineno > 1 else place
        raise RecordError(f"{at}: not JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError) as error:
        if not fails:
            return None
        raise RecordError(f"{place}: not JSON: {error}") from None


# Parquet, and records in memory


def _parquet(path: Path, columns: Mapping[str, str]) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"{path.name}: cannot be read as Parquet: {error}") from error
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecordError(f"{path.name}: columns are there twice: {', '.join(map(repr, twice))}")
    cells = {}
    for name in names:
        try:
            cells[name] = table.column(name).to_pylist()
        except UnicodeDecodeError:
            cells[name] = _row_by_row(table.column(name), f"{path.name}, row {{}}: column {name!r}")
    classes = class_names_in_schema(table.schema.metadata or {})
    builder = Builder(path.name, columns)
    rows = (dict(zip(names, row, strict=True)) for row in zip(*cells.values(), strict=True))
    records = []
    for number, row in enumerate(rows, start=1):
        place = f"{path.name}, row {number}"
        records.append(builder.record(with_names(row, classes, place), place))
    return builder.finish(records)


def _row_by_row(column: Any, place: str) -> list[Any]:
    cells = []
    for number, cell in enumerate(column, start=1):
        try:
            cells.append(cell.as_py())
        except UnicodeDecodeError as error:
            raise RecordError(f"{place.format(number)} is not UTF-8: {error.reason} at byte {error.start}") from None
    return cells


def _in_memory(source: Any, columns: Mapping[str, str]) -> list[Record]:
    if hasattr(source, "to_dict") and hasattr(source, "iterrows"):  # pandas.DataFrame
        names = list(map(str, source.columns))
        if len(set(names)) < len(names):
            raise RecordError(f"records: columns are there twice: {', '.join(names)}")
        source = source.to_dict("records")
    if isinstance(source, Mapping):
        raise RecordError(f"records: expected an iterable of dicts, got a mapping of {', '.join(map(str, source))}")
    if not isinstance(source, Iterable):
        raise TypeError(f"records: expected a path or an iterable of dicts, got {type(source).__name__}")
    classes = class_names(getattr(source, "features", None))
    if hasattr(source, "with_format"):  # datasets.Dataset: returns numbers and lists, not tensors
        source = source.with_format(None)
    builder = Builder("records", columns)
    records = []
    for number, row in enumerate(source, start=1):
        place = f"record {number}"
        if isinstance(row, Record):
            records.append(row)
            continue
        if not isinstance(row, Mapping):
            raise RecordError(f"{place}: got {type(row).__name__}, expected a dict")
        if other := [key for key in row if not isinstance(key, str)]:
            raise RecordError(f"{place}: got the key {other[0]!r}, expected names of columns")
        records.append(builder.record(with_names(row, classes, place), place))
    return builder.finish(records)
