"""This module reads texts from files and writes vectors to files, for the command line. Both are streams.

An incomplete file never has its final name.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastbert.checkpoint.files import replacing
from fastbert.checks import check_text

Write = Callable[[Sequence[str], np.ndarray], None]

STDIN = "-"
FORMATS = (".npy", ".jsonl")


def read_texts(path: str, field: str | None = None) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, also empty ones; with `field`, that field of the JSON object in each line.

    "-" is standard input. Lines end in LF or CRLF. A byte order mark is omitted. Raises ValueError, with file and line,
    for a line that is not UTF-8, that is no object with a string in the field, or that has half of a UTF-16 pair.
    """
    name = "standard input" if path == STDIN else path
    with nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{name}, line {number}"
            try:
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
            if field is not None:
                text = field_of(text, field, place)
            yield text


def field_of(line: str, field: str, place: str) -> str:
    """Returns the string in `field` of a JSON line. Raises ValueError, with its position, for any other line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise ValueError(f"{place}: expected a JSON object with a string under {field!r}")
    check_text(place, record[field])
    return record[field]


def count_lines(path: str) -> int | None:
    """Returns the number of texts that `read_texts` will yield; None for a stream that can be read only once."""
    if path == STDIN or not stat.S_ISREG(os.stat(path).st_mode):
        return None
    lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def check_output(path: str) -> None:
    """Raises ValueError or FileNotFoundError for a path to which `open_output` could not write at the end."""
    if path == STDIN:
        return
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"output: got {path!r}, expected a name that ends in {' or '.join(FORMATS)}, or '-'")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {str(Path(path).parent)!r}")
    if Path(path).is_dir():
        raise ValueError(f"output: {path!r} is a folder")


@contextmanager
def open_output(path: str, dimension: int) -> Iterator[Write]:
    """Yields a function that writes texts and their (n, dimension) float32 vectors, one window at a time.

    A .npy file gets one array. A .jsonl file, or standard output for "-", gets one object per text: {"text": ...,
    "embedding": [...]}. The file appears under its name when it is complete; until then an older file stays unchanged.
    """
    if path == STDIN:
        yield lambda texts, vectors: write_jsonl(sys.stdout.write, texts, vectors)
        sys.stdout.flush()
        return
    with replacing(Path(path)) as temporary:
        if Path(path).suffix == ".npy":
            with open(temporary, "wb") as binary, _npy(binary, dimension) as write:
                yield write
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                yield lambda texts, vectors: write_jsonl(file.write, texts, vectors)


def write_jsonl(write: Callable[[str], Any], texts: Sequence[str], vectors: np.ndarray) -> None:
    """Writes one JSON line for each text and its vector, with enough digits to restore the same float32 numbers."""
    for text, vector in zip(texts, vectors, strict=True):
        numbers = ", ".join(f"{x:.9g}" for x in vector.tolist())
        write(f'{{"text": {json.dumps(text)}, "embedding": [{numbers}]}}\n')


@contextmanager
def _npy(file: BinaryIO, dimension: int) -> Iterator[Write]:
    """Appends rows. The header has room for any number of rows, and is written again at the end."""
    rows = 0

    def header() -> None:
        content = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(file, content)

    def write(texts: Sequence[str], vectors: np.ndarray) -> None:
        nonlocal rows
        file.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        rows += len(vectors)

    header()
    size = file.tell()
    yield write
    file.seek(0)
    header()
    assert file.tell() == size, "numpy's header has outgrown its place"
