"""This module converts documents to shards of token ids. A later call with the same text and options opens them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert._version import __version__
from fastbert.checkpoint.files import read_json
from fastbert.training.data.cache import building, content_hashes, identity, name_of
from fastbert.training.data.encoding import Encoded, Encoder, special_ids, word_begins
from fastbert.training.data.shards import FORMAT, INDEX, Corpus
from fastbert.training.data.sources import Counts, Reading, kind_of, read_documents
from fastbert.training.data.streams import suffixes
from fastbert.training.data.writing import ShardWriter

if TYPE_CHECKING:
    from fastbert.text.tokenizer import Tokenizer

__all__ = ["describe", "prepare", "special_ids"]

logger = logging.getLogger("fastbert")

BATCH = 2**20  # characters that are tokenised at once, unless one document is longer
MANY_UNKNOWN = 0.02  # a larger share of [UNK] logs a warning


def prepare(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    cache: str | os.PathLike[str],
    *,
    reading: Reading | None = None,
    whole_words: bool = False,
    rebuild: bool = False,
    show_progress: bool = True,
) -> Corpus:
    """Returns the corpus of files, from the folder ``cache`` if it is there; otherwise tokenises and stores it.

    ``files``: as ``find_files`` returns them; their order matters, paths and times do not. ``whole_words``: store the
    starts of words, from the tokenizer's word ids; a WordPiece vocabulary provides them anyway. ``rebuild``: tokenise
    in any case. ``show_progress``: show bars on standard error, if that is a terminal.

    Special tokens in a text are treated as text. Sentences and documents without a token are dropped and counted. The
    counts are logged, and are in ``made_of``.

    Raises ValueError if the tokenizer lacks [CLS], [SEP] or [MASK], if there is no token, for a bad file (as in
    ``read_documents``), for a file that changes meanwhile, and for a shard that differs from what was written. Raises
    OSError if the disk is full; nothing is left on it.
    """
    from tqdm import tqdm

    special_ids(tokenizer)
    reading = reading or Reading()
    path = Path(cache)
    path.mkdir(parents=True, exist_ok=True)
    before = [identity(file) for file in files]
    total = sum(file.stat().st_size for file in files)
    disable = None if show_progress else True  # None: disabled if standard error is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading", disable=disable, leave=False) as bar:
        hashes = content_hashes(files, path, bar.update)
    begins = word_begins(tokenizer)
    with_words = whole_words and begins is None
    content = {
        "format": FORMAT,
        "files": [[digest, kind_of(file), suffixes(file)[1]] for digest, file in zip(hashes, files, strict=True)],
        "tokenizer": name_of([tokenizer.for_raw_text().to_str(), tokenizer.vocab_size]),
        "reading": [reading.layout, reading.field, reading.errors],
        "with_words": with_words,
    }
    name = name_of(content)
    folder = path / name
    if rebuild or not (folder / INDEX).exists():
        logger.info("tokenising %d files, %d bytes, to %s", len(files), total, folder)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="Tokenising", disable=disable)
        with building(folder, replace=rebuild) as temporary, bar:
            writer = ShardWriter(temporary, tokenizer.vocab_size, begins=begins, with_words=with_words)
            with closing(writer):
                counts = Counts()
                dropped, seconds = _write(read_documents(files, reading, counts), tokenizer, writer, counts, bar)
                if [identity(file) for file in files] != before:
                    raise ValueError("text: files changed while they were read")
                if not writer.n_tokens:
                    raise ValueError(f"text: {len(files)} files of {total} bytes hold no document with tokens")
                made_of = {**content, "text": name_of(content["files"]), **vars(counts)}
                made_of["files"] = {"number": len(files), "bytes": total}
                made_of |= {"dropped_documents": dropped, "seconds": round(seconds, 3)}
                made_of["unknown_tokens"] = int(writer.counts[tokenizer.unk_token_id])
                made_of["versions"] = {"fastbert": __version__, "tokenizers": version("tokenizers")}
                writer.finish(name, made_of)
    corpus = Corpus.open(folder)
    logger.info(describe(corpus))
    for warning in _warnings(corpus):
        logger.warning(warning)
    return corpus


def describe(corpus: Corpus) -> str:
    """Returns a line with the counts of a corpus."""
    line = f"{corpus.n_documents:,} documents, {corpus.n_tokens:,} tokens of {corpus.vocab_size:,} kinds"
    if corpus.folder is None:
        return line
    made_of = corpus.made_of
    n_bytes = sum(entry["bytes"] for entry in read_json(corpus.folder / INDEX)["files"].values())
    dropped = made_of["empty_documents"] + made_of["dropped_documents"]
    return (
        f"{line}, {made_of['sentences']:,} sentences, {n_bytes / corpus.n_tokens:.3f} bytes a token on disk; "
        f"[UNK]: {made_of['unknown_tokens'] / corpus.n_tokens:.3%}; documents without tokens, dropped: {dropped:,}"
    )


def _warnings(corpus: Corpus) -> Iterator[str]:
    made_of = corpus.made_of
    if made_of["replaced_bytes"]:
        yield f"{made_of['replaced_bytes']:,} bytes were not UTF-8: U+FFFD stands in their place"
    if made_of["cut_sentences"] or made_of["cut_documents"]:
        yield (
            f"{made_of['cut_sentences']:,} sentences and {made_of['cut_documents']:,} documents were too long and cut: "
            "does the layout fit the text?"
        )
    share = made_of["unknown_tokens"] / corpus.n_tokens
    if share > MANY_UNKNOWN:
        yield f"{share:.1%} of the tokens are unknown to the vocabulary: it was learnt from other text"


def _write(
    documents: Iterable[list[str]], tokenizer: Tokenizer, writer: ShardWriter, counts: Counts, bar: Any
) -> tuple[int, float]:
    """Tokenises a batch in another thread while the next is read.

    Returns the number of dropped documents, and seconds.
    """
    encoder = Encoder(tokenizer, writer.with_words)
    start = time.perf_counter()
    dropped = 0
    waiting: list[tuple[list[list[str]], Future[Encoded]]] = []
    with ThreadPoolExecutor(1, "fastbert-tokenise") as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(encoder.encode_documents, batch)))
            if len(waiting) > 1:
                dropped += _add(*waiting.pop(0), writer)
            bar.update(counts.read_bytes - bar.n)
            bar.set_postfix_str(f"{writer.n_tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
        for each in waiting:
            dropped += _add(*each, writer)
    return dropped, time.perf_counter() - start


def _batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(batch: list[list[str]], future: Future[Encoded], writer: ShardWriter) -> int:
    """Writes a batch of documents. Returns the number of documents without a token."""
    ids, lengths, words = future.result()
    ends = np.cumsum(lengths)
    starts = np.zeros(len(ids), bool)
    starts[(ends - lengths)[lengths > 0]] = True
    sizes = np.diff(ends[np.cumsum([len(document) for document in batch]) - 1], prepend=0)
    kept = sizes[sizes > 0]
    if len(kept):
        writer.add(ids, starts, kept, words)
    return len(sizes) - len(kept)
