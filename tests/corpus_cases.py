"""A corpus in memory for the tests of training data, and random documents for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbert.training.data.examples import Examples
from fastbert.training.data.special import SpecialIds

SPECIAL = SpecialIds(cls=1, sep=2, mask=3, all=(0, 1, 2, 3, 4))


class ListedCorpus:
    """A TokenSource of documents, each a list of sentences, each a list of ids. ``asked`` lists what was read."""

    def __init__(self, documents: list[Any], vocab_size: int, words: list[bool] | None = None) -> None:
        sentences = [sentence for document in documents for sentence in document]
        self.vocab_size = vocab_size
        self.n_documents = len(documents)
        self.ids = np.concatenate([np.asarray(sentence, np.int64) for sentence in sentences])
        self.n_tokens = len(self.ids)
        self.document_offsets = np.cumsum([0, *(sum(map(len, document)) for document in documents)])
        self.begins = np.cumsum([0, *map(len, sentences)])[:-1]
        self.words = None if words is None else np.asarray(words, bool)
        self.has_words = words is not None
        self.asked: list[tuple[int, int]] = []

    def sentence_starts(self, start: int, end: int) -> np.ndarray:
        self.asked.append((start, end))
        first, last = np.searchsorted(self.begins, [start, end])
        return self.begins[first:last]

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        ids = np.concatenate([self.ids[a : a + n] for a, n in zip(starts, lengths, strict=True)])
        if ids.max() >= self.vocab_size:
            raise ValueError(f"the id {ids.max()} is outside of the vocabulary")
        return ids

    def word_starts(self, starts: Any, lengths: Any) -> np.ndarray:
        assert self.words is not None
        return np.concatenate([self.words[a : a + n] for a, n in zip(starts, lengths, strict=True)])

    def document_of(self, tokens: Any) -> np.ndarray:
        """The documents that tokens lie in."""
        return np.searchsorted(self.document_offsets, tokens, "right") - 1


def corpus_of(sizes: list[list[int]], vocab_size: int = 100, words: bool = False) -> ListedCorpus:
    """A corpus of documents with sentences of the given sizes. Ids count up from 5, so that neighbours differ."""
    n = sum(map(sum, sizes))
    ids = iter(5 + np.arange(n) % (vocab_size - 5))
    documents = [[[next(ids) for _ in range(size)] for size in document] for document in sizes]
    return ListedCorpus(documents, vocab_size, list(np.random.default_rng(n).random(n) < 0.6) if words else None)


def random_corpus(n_documents: int, seed: int = 0, mean: int = 8, **options: Any) -> ListedCorpus:
    """A corpus of documents with about ``mean`` sentences of about 12 tokens each."""
    random = np.random.default_rng(seed)
    sizes = [(1 + random.poisson(11, max(random.poisson(mean), 1))).tolist() for _ in range(n_documents)]
    return corpus_of(sizes, **options)


def assert_same_examples(a: Examples, b: Examples) -> None:
    for name in Examples.__dataclass_fields__:
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, name)
