"""Records become documents. A record is a JSON object, one per line, or a row of a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbert.training.data.reading import Documents, Reading
from fastbert.training.data.streams import Stream

LONG_RECORD = 2**26  # maximum number of characters in a line of JSON
ROWS = 64  # rows of a Parquet file that are read at once


def read_records(path: Path, reading: Reading, documents: Documents) -> Iterator[int]:
    """Adds the documents of a JSONL file. Yields the number of bytes on disk that were read so far."""
    stream = Stream(path, reading.errors, documents.counts)
    parts: list[str] = []
    number = 1
    for line, ends in stream.lines():
        parts.append(line)
        place = f"{path}, line {number}"
        if sum(map(len, parts)) > LONG_RECORD:
            raise ValueError(f"{place}: got a record of more than {LONG_RECORD} characters")
        if ends:
            text, parts = "".join(parts), []
            if text and not text.isspace():
                _add_field(_record(text, place), reading, documents, place)
            number += 1
        yield stream.n_read


def _record(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}; expected one object in each line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: got a JSON {type(record).__name__}, expected one object in each line")
    return record


def read_parquet(path: Path, reading: Reading, documents: Documents) -> Iterator[int]:
    """Adds the documents of a Parquet file. Yields the approximate number of bytes on disk that were read so far."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        # Read buffered and in small batches, because a whole row group can be larger than memory.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            names, n_rows = file.schema_arrow.names, max(file.metadata.num_rows, 1)
            if reading.field not in names:
                raise ValueError(f"{path}: no field {reading.field!r}; there are {', '.join(map(repr, names))}")
            row = 0
            for batch in file.iter_batches(ROWS, columns=[reading.field], use_threads=False):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    # The column may contain bytes that are not UTF-8.
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    row += 1
                    place = f"{path}, row {row}"
                    _add_field({reading.field: _decoded(value, reading, documents, place)}, reading, documents, place)
                yield path.stat().st_size * row // n_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


def _decoded(value: Any, reading: Reading, documents: Documents, place: str) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        if reading.errors == "strict":
            raise ValueError(
                f"{place} is not UTF-8: {error.reason} at byte {error.start} of the field. "
                "To continue: --errors replace"
            ) from error
    text = value.decode(errors="replace")
    documents.counts.replaced_bytes += text.count("\ufffd")
    return text


def _add_field(record: dict[str, Any], reading: Reading, documents: Documents, place: str) -> None:
    """Adds the document of a record."""
    if reading.field not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{place}: no field {reading.field!r}; there are {names}. To choose one: --field")
    value = record[reading.field]
    sentences = value if isinstance(value, list) else None
    if isinstance(value, str) and reading.layout == "sentences":
        sentences = value.split("\n")
    if sentences is not None:
        for sentence in sentences:
            if not isinstance(sentence, str):
                name = type(sentence).__name__
                raise ValueError(f"{place}: got a list with a {name} in field {reading.field!r}, expected sentences")
            documents.add(_without_halves(sentence, reading, documents, place))
    elif isinstance(value, str):
        documents.add_running(_without_halves(value, reading, documents, place))
    elif value is not None:
        name = type(value).__name__
        raise ValueError(f"{place}: got {name} in field {reading.field!r}, expected a text or a list of sentences")
    documents.end_record()


def _without_halves(text: str, reading: Reading, documents: Documents, place: str) -> str:
    """Returns the text without halves of UTF-16 pairs, which are possible in JSON but not in UTF-8."""
    try:
        _ = text.isascii() or text.encode()
        return text
    except UnicodeEncodeError as error:
        if reading.errors == "strict":
            raise ValueError(
                f"{place}: half of a UTF-16 pair at character {error.start} of field {reading.field!r}. "
                "To continue, with U+FFFD in its place: --errors replace"
            ) from None
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    documents.counts.replaced_bytes += joined.count("\ufffd")
    return joined
