"""A corpus gives the tokens it was made of, in memory and from disk, for vocabularies of every size."""

from __future__ import annotations

import errno
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.training.data import shards, writing
from fastbert.training.data.shards import Corpus
from fastbert.training.data.writing import ShardWriter

SIZES = (200, 2**15, 2**15 + 1, 2**16, 2**16 + 1, 250_000)
Documents = list[list[list[int]]]


def random_documents(vocab_size: int, n: int = 60) -> Documents:
    """Documents of one to six sentences of one to nine ids, with the highest id among them."""
    rng = np.random.default_rng(vocab_size)
    documents = [
        [rng.integers(0, vocab_size, rng.integers(1, 10)).tolist() for _ in range(rng.integers(1, 7))] for _ in range(n)
    ]
    documents[0][0][0] = vocab_size - 1
    return documents


def written(folder: Path, documents: Documents, vocab_size: int, words: Any = None, batch: int = 7) -> Corpus:
    """The documents on disk, in batches. `words`: a bool for each token, or for each id of the vocabulary."""
    folder.mkdir()
    begins = words if words is not None and len(words) == vocab_size else None
    writer = ShardWriter(folder, vocab_size, begins=begins, with_words=words is not None and begins is None)
    place = 0
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        ids = np.array([i for document in part for sentence in document for i in sentence], np.uint32)
        marks = np.array([j == 0 for document in part for sentence in document for j in range(len(sentence))])
        lengths = np.array([sum(map(len, document)) for document in part])
        bits = np.asarray(words)[place : place + len(ids)] if writer.with_words else None
        writer.add(ids, marks, lengths, bits)
        place += len(ids)
    writer.finish("f" * 32, {"text": "t"})
    return Corpus.open(folder)


def assert_holds(corpus: Corpus, documents: Documents) -> None:
    """The corpus holds these documents."""
    flat = [i for document in documents for sentence in document for i in sentence]
    lengths = [len(sentence) for document in documents for sentence in document]
    offsets = np.cumsum([0, *(sum(map(len, document)) for document in documents)])
    assert (corpus.n_documents, corpus.n_tokens) == (len(documents), len(flat))
    assert np.issubdtype(corpus.document_offsets.dtype, np.integer)
    assert corpus.document_offsets.tolist() == offsets.tolist()
    starts = corpus.sentence_starts(0, len(flat))
    assert starts.dtype == np.int64 and starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    ids = corpus.take([0], [len(flat)])
    assert ids.dtype == np.int64 and ids.tolist() == flat
    assert corpus.counts.dtype == np.int64 and corpus.counts.shape == (corpus.vocab_size,)
    assert corpus.counts.tolist() == np.bincount(flat, minlength=corpus.vocab_size).tolist()
    rng = np.random.default_rng(1)
    spans = np.sort(rng.integers(0, len(flat) + 1, (50, 2)))
    spans[5] = (7, 7)
    spans[6] = (3, 9)
    spans[7] = (9, 15)  # follows the one before
    expected = [i for a, b in spans for i in flat[a:b]]
    assert corpus.take(spans[:, 0], spans[:, 1] - spans[:, 0]).tolist() == expected
    for a, b in spans:
        assert corpus.sentence_starts(a, b).tolist() == starts[(starts >= a) & (starts < b)].tolist()
    assert corpus.take([], []).tolist() == [] and corpus.take([], []).dtype == np.int64


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("tokens", [2**27, 40])
def test_shards_hold_documents(vocab_size: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong dtype, mask or bitmap at the borders of 15, 16 and 32 bits, and spans across shards."""
    monkeypatch.setattr(writing, "SHARD_TOKENS", tokens)
    monkeypatch.setattr(shards, "READ", 16)
    documents = random_documents(vocab_size)
    corpus = written(tmp_path / "corpus", documents, vocab_size, batch=1)
    assert_holds(corpus, documents)
    assert_holds(Corpus.from_documents(documents, vocab_size), documents)
    sizes = json.loads((tmp_path / "corpus/index.json").read_text())["shards"]
    assert sum(shard["tokens"] for shard in sizes) == corpus.n_tokens
    assert sum(shard["documents"] for shard in sizes) == len(documents)
    assert all(shard["tokens"] <= max(tokens, 54) for shard in sizes) and (len(sizes) > 5) == (tokens == 40)
    assert (corpus.vocab_size, corpus.fingerprint, corpus.folder) == (vocab_size, "f" * 32, tmp_path / "corpus")
    corpus.check()


def test_cache_takes_two_bytes_a_token_and_eight_a_document(tmp_path: Path) -> None:
    """Catches a cache that grows: an id takes 16 bits up to 32768 ids, with the start of a sentence in it."""
    documents = random_documents(30_000)
    corpus = written(tmp_path / "corpus", documents, 30_000, np.ones(30_000, bool))
    size = {path.name: path.stat().st_size for path in (tmp_path / "corpus").iterdir()}
    assert size["ids-00000.bin"] == 2 * corpus.n_tokens and size["documents.bin"] == 8 * (len(documents) + 1)
    assert set(size) == {"ids-00000.bin", "documents.bin", "counts.bin", "begins.bin", "index.json"}
    assert size["counts.bin"] + size["begins.bin"] + size["index.json"] < 250_000  # whatever the size of the text


def test_starts_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bits of words that are shifted, by batches, by shards or by bytes, and words that nobody wrote."""
    monkeypatch.setattr(writing, "SHARD_TOKENS", 40)
    documents = random_documents(200)
    nested = [[[i % 3 == 0 for i in sentence] for sentence in document] for document in documents]
    flat = [b for document in nested for sentence in document for b in sentence]
    table = np.arange(200) % 3 == 0
    corpora = [
        written(tmp_path / "bits", documents, 200, flat),
        written(tmp_path / "table", documents, 200, table),
        Corpus.from_documents(documents, 200, nested),
        Corpus.from_documents(documents, 200, table),
    ]
    starts, lengths = [3, 50, 0, 11, 2], [9, 41, 0, 100, 1]
    expected = [b for a, n in zip(starts, lengths, strict=True) for b in flat[a : a + n]]
    for corpus in corpora:
        assert corpus.has_words
        words = corpus.word_starts(starts, lengths)
        assert words.dtype == bool and words.tolist() == expected
    without = written(tmp_path / "without", documents, 200)
    assert not without.has_words and not Corpus.from_documents(documents, 200).has_words
    with pytest.raises(ValueError, match="whole_words=True"):
        without.word_starts([0], [1])


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_corpus_may_be_pickled(on_disk: bool, tmp_path: Path) -> None:
    """Catches a corpus that cannot go to another process, or loses something on the way."""
    documents = random_documents(40_000)
    table = np.arange(40_000) % 2 == 0
    corpus = (
        written(tmp_path / "c", documents, 40_000, table)
        if on_disk
        else Corpus.from_documents(documents, 40_000, table)
    )
    copy = pickle.loads(pickle.dumps(corpus))
    assert_holds(copy, documents)
    assert copy.fingerprint == corpus.fingerprint and copy.folder == corpus.folder
    assert copy.word_starts([0], [9]).tolist() == corpus.word_starts([0], [9]).tolist()
    assert len(pickle.dumps(corpus)) < 500 or not on_disk


def test_threads_share_a_corpus(tmp_path: Path) -> None:
    """Catches a place in a file that threads share."""
    documents = random_documents(200)
    corpus = written(tmp_path / "c", documents, 200)
    flat = corpus.take([0], [corpus.n_tokens])
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for start in rng.integers(0, corpus.n_tokens - 9, 500).tolist():
            if corpus.take([start], [9]).tolist() != flat[start : start + 9].tolist():
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["ids-00000.bin", "documents.bin", "counts.bin"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    """Catches a shard that is short, long, missing or changed, and an error that does not say which and what to do."""
    written(tmp_path / "c", random_documents(200), 200)
    path = tmp_path / "c" / name
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes([content[8] ^ 1]) + content[9:])
    with pytest.raises(ValueError, match=f"{name} has the checksum .* --rebuild"):
        Corpus.open(tmp_path / "c").check()
    for damaged in (content[:-1], content + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} has {len(damaged)} bytes, expected {len(content)}: .*--rebuild"):
            Corpus.open(tmp_path / "c")
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is unreadable .*--rebuild"):
        Corpus.open(tmp_path / "c")


def test_a_folder_without_index_is_no_corpus(tmp_path: Path) -> None:
    """Catches a folder in which a build stopped, and one of another format, that pass for a corpus."""
    written(tmp_path / "c", random_documents(200), 200)
    index = tmp_path / "c/index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"format": 0}))
    with pytest.raises(ValueError, match=r"format 0, expected .*--rebuild"):
        Corpus.open(tmp_path / "c")
    index.unlink()
    with pytest.raises(FileNotFoundError):
        Corpus.open(tmp_path / "c")


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """Catches garbage in a shard of the right size that goes to the embedding, and a read behind a file's end."""
    corpus = written(tmp_path / "c", random_documents(200), 200)
    path = tmp_path / "c/ids-00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff\x7f" + content[22:])
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus.take([0], [10])) == 10
    with pytest.raises(ValueError, match=r"ids-00000.bin holds the id 32767, expected 0 to 199: .*--rebuild"):
        corpus.take([2], [10])
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"ids-00000.bin ends before byte .*--rebuild"):
        corpus.take([40], [20])


@pytest.mark.parametrize(("starts", "lengths"), [([-1], [2]), ([0], [10**6]), ([5], [-1]), ([0, 1], [1])])
def test_spans_outside_of_the_corpus_are_refused(starts: list[int], lengths: list[int]) -> None:
    """Catches a span that wraps around, or is cut without a word."""
    corpus = Corpus.from_documents([[[1, 2, 3], [4]]] * 3, 9)
    with pytest.raises(ValueError, match="span|shapes"):
        corpus.take(starts, lengths)
    with pytest.raises(ValueError, match="span"):
        corpus.sentence_starts(3, 100)


@pytest.mark.parametrize(
    ("documents", "words", "message"),
    [
        ([], None, "documents: got none"),
        ([[[1]], []], None, r"documents\[1\]"),
        ([[[1], []]], None, r"documents\[0\]"),
        ([[[9]]], None, "got the id 9, expected 0 to 8"),
        ([[[-1]]], None, "got the id -1"),
        ([[[1, 2]]], [[[True]]], "word_starts: got lists"),
        ([[[1, 2]]], np.ones(3, bool), r"word_starts: got shape \(3,\)"),
    ],
)
def test_bad_documents_are_refused(documents: Documents, words: Any, message: str) -> None:
    """Catches documents without tokens, and ids that no embedding has."""
    with pytest.raises(ValueError, match=message):
        Corpus.from_documents(documents, 9, words)


def test_a_limit_of_open_files_is_not_a_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice to rebuild hundreds of shards where `ulimit -n` is too low."""
    written(tmp_path / "c", random_documents(200), 200)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shards.os, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        Corpus.open(tmp_path / "c")
