"""This module opens, decompresses and decodes files in parts of bounded size."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import importlib.util
import lzma
import threading
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

PART = 2**20  # bytes that are decoded at once
LONG_LINE = 2**20  # characters: a longer line is returned in parts
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)

_replaced = threading.local()


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    _replaced.n_bytes = getattr(_replaced, "n_bytes", 0) + error.end - error.start
    return "\ufffd", error.end


codecs.register_error("fastbert-replace", _replace)


def suffixes(path: Path) -> tuple[str, str]:
    """Returns the suffix of a file's content and of its compression ("" for none), in lower case."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def need_library(path: Path) -> None:
    """Raises ValueError, with the command that installs it, if the library for such a file is missing."""
    held, compression = suffixes(path)
    if held == ".parquet":
        if compression:
            raise ValueError(f"{path}: Parquet files have a compression of their own: decompress this one")
        if importlib.util.find_spec("pyarrow") is None:
            raise ValueError(f"{path}: Parquet files need pyarrow: pip install pyarrow")
    if compression == ".zst":
        _zstd(path)


def _zstd(path: Path) -> Callable[[BinaryIO], Any]:
    """Returns the opener for Zstandard: Python's module from 3.14 on, otherwise the package zstandard."""
    try:
        return importlib.import_module("compression.zstd").open
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise ValueError(f"{path}: .zst files need Python 3.14, or zstandard: pip install zstandard") from None
    return lambda raw: zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


class Stream:
    """A Stream reads one text file. ``n_read``: the number of bytes on disk that were read, for a progress bar."""

    def __init__(self, path: Path, errors: str, counts: Any) -> None:
        """Takes "strict" or "replace" for bytes that are not UTF-8. ``counts.replaced_bytes`` counts them."""
        self.path = path
        self.n_read = 0
        self._errors = errors
        self._counts = counts

    def parts(self) -> Iterator[bytes]:
        """Yields the decompressed bytes in parts. Raises ValueError, with file and offset, for a damaged file."""
        compression = suffixes(self.path)[1]
        openers: dict[str, Callable[[BinaryIO], Any]] = {"": lambda raw: raw, ".gz": gzip.open, ".bz2": bz2.open}
        openers[".xz"] = lzma.open
        opener = openers.get(compression) or _zstd(self.path)
        with self.path.open("rb") as raw:
            content = opener(raw)
            while True:
                try:
                    part = content.read(PART)
                except Exception as error:
                    if not isinstance(error, DAMAGE) and type(error).__name__ != "ZstdError":
                        raise
                    raise ValueError(f"{self.path} cannot be read at byte {raw.tell()}: {error}") from error
                self.n_read = raw.tell()
                if not part:
                    return
                yield part

    def text(self) -> Iterator[str]:
        """Yields the text in parts, without a byte order mark at the start.

        Raises ValueError, with file and offset in the decompressed bytes, for bytes that are not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("strict" if self._errors == "strict" else "fastbert-replace")
        n_bytes, is_first = 0, True
        for part in chain(self.parts(), [b""]):
            n_kept = len(decoder.getstate()[0])
            _replaced.n_bytes = 0
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is not UTF-8: {error.reason} at byte {n_bytes - n_kept + error.start}. "
                    "To continue, with U+FFFD for such bytes: --errors replace"
                ) from error
            self._counts.replaced_bytes += _replaced.n_bytes
            n_bytes += len(part)
            if is_first and text:
                text, is_first = text.removeprefix("\ufeff"), False
            if text:
                yield text

    def lines(self) -> Iterator[tuple[str, bool]]:
        """Yields (part of a line, whether the line ends with it). Only a line feed ends a line; it is omitted.

        A line of more than ``LONG_LINE`` characters is yielded in several parts. The last line needs no line feed.
        """
        kept: list[str] = []
        n_kept, is_open = 0, False
        for text in self.text():
            first, *others = text.split("\n")
            kept.append(first)
            n_kept += len(first)
            if others:
                yield "".join(kept), True
                for line in others[:-1]:
                    yield line, True
                kept, n_kept, is_open = others[-1:], len(others[-1]), False
            if n_kept > LONG_LINE:
                yield "".join(kept), False
                kept, n_kept, is_open = [], 0, True
        if n_kept or is_open:
            yield "".join(kept), True
