"""A Corpus returns the token ids of documents, which are stored in shards on disk or in memory.

A folder of shards contains, in little-endian order::

    ids-00000.bin        uint16 if the vocabulary has at most 65536 ids, else uint32; concatenated documents
    sentences-00000.bin  a bit per token: does it begin a sentence? Only if the ids have no spare bit
    words-00000.bin      a bit per token: does it begin a word? Only if the vocabulary does not tell
    begins.bin           a bit per id: does it begin a word? Only if the vocabulary tells
    documents.bin        uint64: the offset of each document in tokens, and at the end the number of tokens
    counts.bin           int64: the number of occurrences of each id
    index.json           sizes, checksums and sources. It is written last: a folder without it is not complete

The top bit of an id marks the start of a sentence, if the vocabulary has at most 32768 ids, or more than 65536. No
document is in two shards.

Shards are read, not memory-mapped: mapped pages count as memory of the process, and an unreadable page kills it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbert.checkpoint.files import read_json
from fastbert.checks import positive

FORMAT = 1
INDEX = "index.json"
DOCUMENTS, COUNTS, BEGINS = "documents.bin", "counts.bin", "begins.bin"
REBUILD = "rebuild it with --rebuild"
CHUNK = 2**22  # bytes that are read at once for a checksum
READ = 2**22  # tokens that are read at once


class Layout(NamedTuple):
    """A Layout describes the stored ids of a vocabulary. ``start``: the bit of a sentence's first id, or 0 for none."""

    dtype: np.dtype[Any]
    start: int


def layout_of(vocab_size: int) -> Layout:
    """Returns the layout of a vocabulary: the smallest dtype, and the bit that marks the start of a sentence."""
    if vocab_size <= 2**16:
        return Layout(np.dtype("<u2"), 2**15 if vocab_size <= 2**15 else 0)
    return Layout(np.dtype("<u4"), 2**31)


class Array:
    """An Array in memory has the same `read` method as a File."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name = name
        self._values = values

    def read(self, start: int, end: int) -> np.ndarray:
        """Returns the items from ``start`` to ``end``."""
        return self._values[start:end]


class File:
    """A File reads parts of an array on disk. Threads may share it."""

    def __init__(self, path: Path, dtype: Any, n_bytes: int) -> None:
        """Raises ValueError if the file is missing, cannot be read, or has a size other than ``n_bytes``."""
        self.name = str(path)
        self._dtype = np.dtype(dtype)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the shard is not the cause
                raise
            raise ValueError(f"shard {path} is unreadable ({error.strerror}): {REBUILD}") from error
        weakref.finalize(self, os.close, self._fd)
        size = os.fstat(self._fd).st_size
        if size != n_bytes:
            raise ValueError(f"shard {path} has {size} bytes, expected {n_bytes}: {REBUILD}")

    def read(self, start: int, end: int) -> np.ndarray:
        """Returns the items from ``start`` to ``end``. Raises ValueError if they cannot be read."""
        width = self._dtype.itemsize
        try:
            data = os.pread(self._fd, (end - start) * width, start * width)
        except OSError as error:
            raise ValueError(f"shard {self.name} is unreadable ({error.strerror}): {REBUILD}") from error
        if len(data) != (end - start) * width:
            raise ValueError(f"shard {self.name} ends before byte {end * width}: {REBUILD}")
        return np.frombuffer(data, self._dtype)


class Shard(NamedTuple):
    """A Shard holds the ids of some documents, and the bits of starts if the ids do not contain them."""

    ids: Array | File
    sentences: Array | File | None
    words: Array | File | None


def bits(source: Array | File, start: int, end: int) -> np.ndarray:
    """Returns the bits from ``start`` to ``end`` as bool; in each byte the lowest bit comes first."""
    data = source.read(start // 8, -(-end // 8))
    return np.unpackbits(data, bitorder="little")[start % 8 : start % 8 + end - start].astype(bool)


class Corpus:
    """A Corpus is made by ``open`` or by ``from_documents``. Threads may share it, and it may be pickled.

    ``vocab_size``: all ids are smaller. ``n_documents`` and ``n_tokens``: their numbers. ``fingerprint``: hexadecimal,
    the same for the same text, tokenizer and options. ``counts``: (vocab_size,) int64, the number of occurrences of
    each id. ``document_offsets``: (n_documents + 1,) int64, in tokens. ``has_words``: whether ``word_starts`` is
    available. ``folder``: its location, or None. ``made_of``: the facts that ``prepare`` stored about its sources.
    """

    vocab_size: int
    n_documents: int
    n_tokens: int
    fingerprint: str
    counts: np.ndarray
    document_offsets: np.ndarray
    has_words: bool
    folder: Path | None
    made_of: dict[str, Any]

    def __init__(
        self,
        shards: Sequence[Shard],
        bases: Sequence[int],
        vocab_size: int,
        document_offsets: np.ndarray,
        counts: np.ndarray,
        fingerprint: str,
        begins: np.ndarray | None = None,
        folder: Path | None = None,
        made_of: dict[str, Any] | None = None,
    ) -> None:
        """``open`` and ``from_documents`` call this.

        ``bases``: the first token of each shard, and the number of tokens.
        """
        self._shards = list(shards)
        self._bases = np.array(bases, np.int64)
        self._bases_list = self._bases.tolist()
        self._begins = begins
        self._layout = layout_of(vocab_size)
        self.vocab_size = vocab_size
        self.n_documents = len(document_offsets) - 1
        self.n_tokens = int(document_offsets[-1])
        self.fingerprint = fingerprint
        self.counts = counts
        self.document_offsets = document_offsets
        self.has_words = begins is not None or all(shard.words is not None for shard in shards)
        self.folder = folder
        self.made_of = made_of or {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Opens a folder of shards. It checks that the files exist and their sizes, not their content.

        Raises FileNotFoundError if the folder has no index. Raises ValueError, with the name of the file, if a file is
        missing or has the wrong size, or if the folder has another format.
        """
        path = Path(folder)
        index = read_json(path / INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(f"{path} has format {index.get('format')!r}, expected {FORMAT}: {REBUILD}")
        sizes = {name: entry["bytes"] for name, entry in index["files"].items()}
        vocab_size, n_documents, n_tokens = (index[name] for name in ("vocab_size", "n_documents", "n_tokens"))
        ids = layout_of(vocab_size).dtype

        def file(name: str, dtype: Any = np.uint8) -> File | None:
            return File(path / name, dtype, sizes[name]) if name in sizes else None

        shards, bases = [], [0]
        for i, entry in enumerate(index["shards"]):
            n = entry["tokens"]
            if (source := file(f"ids-{i:05}.bin", ids)) is None or sizes[f"ids-{i:05}.bin"] != n * ids.itemsize:
                raise ValueError(f"{path / INDEX} contradicts itself about shard {i}: {REBUILD}")
            shards.append(Shard(source, file(f"sentences-{i:05}.bin"), file(f"words-{i:05}.bin")))
            bases.append(bases[-1] + n)
        File(path / DOCUMENTS, "<i8", 8 * (n_documents + 1))
        offsets = np.memmap(path / DOCUMENTS, "<i8", "r")
        if bases[-1] != n_tokens or int(offsets[-1]) != n_tokens:
            raise ValueError(f"{path / DOCUMENTS} ends at token {offsets[-1]}, expected {n_tokens}: {REBUILD}")
        counts = File(path / COUNTS, "<i8", 8 * vocab_size).read(0, vocab_size)
        table = file(BEGINS)
        begins = None if table is None else bits(table, 0, vocab_size)
        made_of = index.get("made_of", {})
        return cls(shards, bases, vocab_size, offsets, counts, index["fingerprint"], begins, path, made_of)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Sequence[Sequence[int]]],
        vocab_size: int,
        word_starts: Sequence[Sequence[Sequence[bool]]] | np.ndarray | None = None,
        fingerprint: str = "memory",
    ) -> Corpus:
        """Makes a corpus in memory. Each document is a list of sentences, and each sentence is a list of ids.

        ``word_starts``: for each id whether it begins a word, in lists like ``documents``, or (vocab_size,) bool.
        Raises ValueError if there is no document, for a document or a sentence without ids, for ids outside of the
        vocabulary, and for ``word_starts`` of another shape.
        """
        positive("vocab_size", vocab_size)
        if not documents:
            raise ValueError("documents: got none, expected one at least")
        for i, document in enumerate(documents):
            if not document or not all(map(len, document)):
                raise ValueError(f"documents[{i}]: got {list(map(list, document))}, expected sentences with ids")
        sentences = [sentence for document in documents for sentence in document]
        ids = np.array([i for sentence in sentences for i in sentence], np.int64)
        if (outside := (ids < 0) | (ids >= vocab_size)).any():
            raise ValueError(f"documents: got the id {ids[outside][0]}, expected 0 to {vocab_size - 1}")
        ends = np.cumsum([len(sentence) for sentence in sentences])
        starts = np.zeros(len(ids), bool)
        starts[[0, *ends[:-1]]] = True
        sizes = [sum(map(len, document)) for document in documents]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        begins = words = None
        if isinstance(word_starts, np.ndarray):
            if word_starts.shape != (vocab_size,):
                raise ValueError(f"word_starts: got shape {word_starts.shape}, expected {(vocab_size,)}")
            begins = word_starts.astype(bool)
        elif word_starts is not None:
            shape = [[len(sentence) for sentence in document] for document in documents]
            if [[len(sentence) for sentence in document] for document in word_starts] != shape:
                raise ValueError("word_starts: got lists of other lengths than those of documents")
            words = _packed([b for document in word_starts for sentence in document for b in sentence])
        layout = layout_of(vocab_size)
        marked = ids | (starts * layout.start)
        shard = Shard(
            Array("documents", marked.astype(layout.dtype)),
            None if layout.start else Array("sentences", _packed(starts)),
            None if words is None else Array("words", words),
        )
        counts = np.bincount(ids, minlength=vocab_size).astype(np.int64)
        return cls([shard], [0, len(ids)], vocab_size, offsets, counts, fingerprint, begins)

    def __reduce__(self) -> Any:
        if self.folder is not None:
            return Corpus.open, (self.folder,)
        arguments = (self._shards, self._bases, self.vocab_size, self.document_offsets, self.counts, self.fingerprint)
        return Corpus, (*arguments, self._begins)

    def __repr__(self) -> str:
        return f"Corpus(n_documents={self.n_documents}, n_tokens={self.n_tokens}, vocab_size={self.vocab_size})"

    def sentence_starts(self, start: int, end: int) -> np.ndarray:
        """Returns the tokens in [start, end) that begin a sentence: (k,) int64, as indices into the whole corpus.

        The first token of a document always begins a sentence. Raises ValueError for a range outside of the corpus.
        """
        if not 0 <= start <= end <= self.n_tokens:
            raise ValueError(f"span 0: got tokens {start} to {end}, expected a part of 0 to {self.n_tokens}")
        parts = []
        while start < end:
            i = bisect_right(self._bases_list, start) - 1
            base = self._bases_list[i]
            n = min(end, self._bases_list[i + 1], start + READ) - start
            shard = self._shards[i]
            if shard.sentences is None:
                marks = shard.ids.read(start - base, start - base + n) >= self._layout.start
            else:
                marks = bits(shard.sentences, start - base, start - base + n)
            parts.append(marks.nonzero()[0] + start)
            start += n
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        """Returns the ids of spans, concatenated: (sum of lengths,) int64.

        ``starts``, ``lengths``: (k,) integers, in tokens of the whole corpus. Raises ValueError for a span outside of
        the corpus, and, with the name of the file, for ids outside of the vocabulary.
        """
        starts, lengths = self._spans(starts, lengths)
        ids = np.empty(int(lengths.sum()), np.int64)
        mask = self._layout.start - 1 if self._layout.start else 2**16 - 1
        for shard, first, n, place in self._pieces(starts, lengths):
            ids[place : place + n] = shard.ids.read(first, first + n)
        ids &= mask
        if len(ids) and int(ids.max()) >= self.vocab_size:
            for shard, _, n, place in self._pieces(starts, lengths):
                if (worst := ids[place : place + n].max()) >= self.vocab_size:
                    raise ValueError(
                        f"shard {shard.ids.name} holds the id {worst}, expected 0 to {self.vocab_size - 1}: {REBUILD}"
                    )
        return ids

    def word_starts(self, starts: Any, lengths: Any) -> np.ndarray:
        """Returns for each id of ``take`` whether it begins a word: (sum of lengths,) bool.

        Raises ValueError if the corpus does not have the starts of words, and as ``take`` does.
        """
        if not self.has_words:
            raise ValueError("the corpus has no starts of words: prepare it with whole_words=True")
        if self._begins is not None:
            return self._begins[self.take(starts, lengths)]
        starts, lengths = self._spans(starts, lengths)
        words = np.empty(int(lengths.sum()), bool)
        for shard, first, n, place in self._pieces(starts, lengths):
            if shard.words is not None:
                words[place : place + n] = bits(shard.words, first, first + n)
        return words

    def check(self) -> None:
        """Compares the content of all files with their checksums. Raises ValueError with the name of the first bad one.

        A corpus in memory has no checksums.
        """
        if self.folder is None:
            return
        for name, entry in read_json(self.folder / INDEX)["files"].items():
            if (digest := checksum(self.folder / name)) != entry["blake2b"]:
                raise ValueError(
                    f"shard {self.folder / name} has the checksum {digest}, expected {entry['blake2b']}: {REBUILD}"
                )

    def _spans(self, starts: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns both as int64. Raises ValueError if they are no spans of the corpus."""
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        if starts.shape != lengths.shape or starts.ndim != 1:
            raise ValueError(f"starts, lengths: got shapes {starts.shape} and {lengths.shape}, expected (k,) twice")
        if (bad := (starts < 0) | (lengths < 0) | (starts + lengths > self.n_tokens)).any():
            i = int(np.argmax(bad))
            span = f"{starts[i]} to {starts[i] + lengths[i]}"
            raise ValueError(f"span {i}: got tokens {span}, expected a part of 0 to {self.n_tokens}")
        return starts, lengths

    def _pieces(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[Shard, int, int, int]]:
        """Yields (shard, first token in it, tokens, place in the result); spans that follow one another are merged."""
        if len(starts) == 0:
            return
        ends = starts + lengths
        heads = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))
        tails = np.append(heads[1:], len(starts)) - 1
        of_starts = np.searchsorted(self._bases, starts[heads], "right") - 1
        place = 0
        for start, end, i in zip(starts[heads].tolist(), ends[tails].tolist(), of_starts.tolist(), strict=True):
            while start < end:
                base, limit = int(self._bases[i]), int(self._bases[i + 1])
                n = min(end, limit, start + READ) - start
                yield self._shards[i], start - base, n, place
                start, place, i = start + n, place + n, i + (start + n == limit)


def checksum(path: Path) -> str:
    """Returns the BLAKE2b digest of a file's content, 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _packed(values: Any) -> np.ndarray:
    return np.packbits(np.asarray(values, bool), bitorder="little")
