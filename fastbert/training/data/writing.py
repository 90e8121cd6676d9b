"""This module writes shards, in the format that ``shards`` describes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.files import write_text
from fastbert.training.data.shards import BEGINS, COUNTS, DOCUMENTS, FORMAT, INDEX, layout_of

SHARD_TOKENS = 2**27


class Output:
    """An Output is a file that is written once, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.blake2b(digest_size=16)
        self.n_bytes = 0

    def write(self, values: np.ndarray) -> None:
        """Writes the bytes of an array."""
        data = np.ascontiguousarray(values).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)

    def finish(self) -> dict[str, Any]:
        """Syncs the file to disk. Returns its entry for the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.n_bytes, "blake2b": self._digest.hexdigest()}

    def close(self) -> None:
        """Closes a file that is not finished."""
        self._file.close()


class Bits(Output):
    """Bits is an Output of booleans, eight per byte, with the first in the lowest bit."""

    _rest = np.empty(0, bool)

    def write(self, values: np.ndarray) -> None:
        """Writes booleans. An incomplete byte is kept until more values follow."""
        values = np.concatenate([self._rest, values])
        n = len(values) // 8 * 8
        super().write(np.packbits(values[:n], bitorder="little"))
        self._rest = values[n:]

    def finish(self) -> dict[str, Any]:
        """Writes the last byte, and finishes as an Output does."""
        super().write(np.packbits(self._rest, bitorder="little"))
        return super().finish()


class ShardWriter:
    """A ShardWriter fills a folder with shards. ``n_tokens``, ``n_documents`` and ``counts`` describe its content."""

    def __init__(
        self, folder: Path, vocab_size: int, *, begins: np.ndarray | None = None, with_words: bool = False
    ) -> None:
        """Takes an empty folder.

        ``begins``: (vocab_size,) bool, whether an id begins a word, if the vocabulary tells. ``with_words``: whether
        ``add`` gets the starts of words.
        """
        self._folder = folder
        self._vocab_size = vocab_size
        self._layout = layout_of(vocab_size)
        self.with_words = with_words
        self._begins = begins
        self._files: dict[str, dict[str, Any]] = {}
        self._shards: list[dict[str, int]] = []
        self._outputs: dict[str, Output] = {}
        self._documents = Output(folder / DOCUMENTS)
        self._documents.write(np.zeros(1, "<u8"))
        self.n_tokens = 0
        self.n_documents = 0
        self.counts = np.zeros(vocab_size, "<i8")

    def add(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, words: np.ndarray | None) -> None:
        """Appends documents.

        ``ids``: (T,) unsigned. ``starts``: (T,) bool, true where a sentence begins. ``lengths``: (k,) int64, the number
        of tokens of each document, all above 0. ``words``: (T,) bool, or None.
        """
        if not self._shards or self._shards[-1]["tokens"] + len(ids) > SHARD_TOKENS:
            self._finish_shard()
            i = len(self._shards)
            self._outputs = {"ids": Output(self._folder / f"ids-{i:05}.bin")}
            if not self._layout.start:
                self._outputs["sentences"] = Bits(self._folder / f"sentences-{i:05}.bin")
            if self.with_words:
                self._outputs["words"] = Bits(self._folder / f"words-{i:05}.bin")
            self._shards.append({"tokens": 0, "documents": 0})
        marked = ids.astype(self._layout.dtype)
        if self._layout.start:
            marked |= starts.astype(self._layout.dtype) * self._layout.dtype.type(self._layout.start)
        else:
            self._outputs["sentences"].write(starts)
        self._outputs["ids"].write(marked)
        if words is not None:
            self._outputs["words"].write(words)
        self.counts += np.bincount(ids, minlength=self._vocab_size)
        self._documents.write(np.cumsum(lengths).astype("<u8") + np.uint64(self.n_tokens))
        self.n_tokens += len(ids)
        self.n_documents += len(lengths)
        self._shards[-1]["tokens"] += len(ids)
        self._shards[-1]["documents"] += len(lengths)

    def finish(self, fingerprint: str, made_of: dict[str, Any]) -> None:
        """Writes the remaining data, and at the end the index, which makes the corpus complete."""
        self._finish_shard()
        self._files[DOCUMENTS] = self._documents.finish()
        self._write(COUNTS, Output(self._folder / COUNTS), self.counts)
        if self._begins is not None:
            self._write(BEGINS, Bits(self._folder / BEGINS), self._begins)
        index = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "vocab_size": self._vocab_size,
            "dtype": self._layout.dtype.name,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "shards": self._shards,
            "files": self._files,
            "made_of": made_of,
        }
        write_text(self._folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
        sync_folder(self._folder)

    def close(self) -> None:
        """Closes the files, unless ``finish`` has done so."""
        for output in (*self._outputs.values(), self._documents):
            with suppress(OSError):  # for a full disk, to which nothing more can be written
                output.close()

    def _write(self, name: str, output: Output, values: np.ndarray) -> None:
        output.write(values)
        self._files[name] = output.finish()

    def _finish_shard(self) -> None:
        for kind, output in self._outputs.items():
            self._files[f"{kind}-{len(self._shards) - 1:05}.bin"] = output.finish()
        self._outputs = {}


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk, if the system supports it."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
