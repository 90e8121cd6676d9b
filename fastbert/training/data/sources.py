"""Files are read as documents. A document is a list of non-empty str sentences.

The name of a file determines its kind, without its compression suffix (.gz, .bz2, .xz, .zst)::

    .jsonl .ndjson .json   each line is a JSON object, which is a document
    .parquet               each row is a document
    any other              plain text, in one of the layouts of ``Reading``
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastbert.training.data.reading import Counts, Documents, Reading
from fastbert.training.data.records import read_parquet, read_records
from fastbert.training.data.streams import Stream, need_library, suffixes

__all__ = ["Counts", "Reading", "find_files", "kind_of", "read_documents"]

RECORDS = (".jsonl", ".ndjson", ".json")
IN_FOLDERS = (".txt", ".text", ".md", *RECORDS, ".parquet")


def find_files(text: Sequence[str | Path] | str | Path) -> list[Path]:
    """Returns the files of the given names: files, all files of folders, and matches of globs (``**``: any folders).

    Of a folder it returns the files that end in one of ``IN_FOLDERS``, compressed or not, in sorted order. Hidden files
    and folders are omitted, unless they are named. A file that is named twice counts once.

    Raises FileNotFoundError, with the name, for a missing file and for a glob without a match. Raises ValueError if all
    files are empty, for a path that is neither a file nor a folder, and for a file whose library is missing.
    """
    items = [text] if isinstance(text, (str, Path)) else list(text)
    if not items:
        raise ValueError("text: got no files, folders or globs")
    files: dict[str, Path] = {}
    for item in items:
        paths = _matches(item)
        if not paths:
            suffixes = ", ".join(IN_FOLDERS)
            raise FileNotFoundError(f"text: {str(item)!r} matches no file; in a folder these are taken: {suffixes}")
        for path in paths:
            need_library(path)
            files.setdefault(os.path.realpath(path), path)
    if not any(path.stat().st_size for path in files.values()):
        raise ValueError(f"text: the {len(files)} files of {', '.join(map(str, items))} are empty")
    return list(files.values())


def _matches(item: str | Path) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"text: {str(item)!r} is neither a file nor a folder, and must be read more than once")
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"text: there is no file or folder {str(item)!r}")
    paths: list[Path] = []
    for match in sorted(map(Path, glob.glob(str(path), recursive=True)), key=lambda match: match.parts):
        if match.is_file():
            # "*.log" names its matches; "*" does not.
            paths += [match] if _is_known(match) or path.name.strip("*") else []
        elif match.is_dir() and "**" not in path.parts:
            paths += _in_folder(match)
    return paths


def _in_folder(folder: Path) -> list[Path]:
    """Returns the known files below a folder, sorted by their parts. It follows each link to a folder once."""
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            paths += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted((path for path in paths if _is_known(path) and path.is_file()), key=lambda path: path.parts)


def _is_known(path: Path) -> bool:
    return suffixes(path)[0] in IN_FOLDERS


def kind_of(path: Path) -> str:
    """Returns the kind of a file, by its name: "records", "parquet" or "text"."""
    suffix = suffixes(path)[0]
    return "records" if suffix in RECORDS else "parquet" if suffix == ".parquet" else "text"


def read_documents(files: Iterable[Path], reading: Reading, counts: Counts) -> Iterator[list[str]]:
    """Yields documents, each a list of non-empty sentences, and adds to ``counts``.

    Memory is bounded for lines and documents of any length: a sentence of more than ``LONGEST`` characters is cut at
    white space, and a document of more than ``LONG_DOCUMENT`` characters between two sentences. Texts are not
    normalised.

    Raises ValueError, with file and line, row or byte, for bytes that are not UTF-8, for a line or row that is no
    record, and for a record without the field.
    """
    n_before = 0
    for path in files:
        documents = Documents(counts)
        read = {"records": read_records, "parquet": read_parquet, "text": _read_text}[kind_of(path)]
        for n_bytes in read(path, reading, documents):
            counts.read_bytes = n_before + n_bytes
            yield from documents.pop()
        documents.end()
        n_before += path.stat().st_size
        counts.read_bytes = n_before
        yield from documents.pop()


def _read_text(path: Path, reading: Reading, documents: Documents) -> Iterator[int]:
    stream = Stream(path, reading.errors, documents.counts)
    if reading.layout == "files":
        for text in stream.text():
            documents.add_running(text)
            yield stream.n_read
        documents.end_record()
        return
    is_inside = False  # whether a line continues that comes in parts
    for line, ends in stream.lines():
        if reading.layout == "documents":
            documents.add_running(line)
            if ends:
                documents.end()
        elif is_inside or not ends:
            documents.add_part(line)
            if ends:
                documents.end_sentence()
        elif line and not line.isspace():
            documents.add(line)
        else:
            documents.end()
        is_inside = not ends
        yield stream.n_read
