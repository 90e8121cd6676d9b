"""Next-sentence pairs are made as in the paper, from spans of the corpus.

Devlin et al. 2018, and ``create_instances_from_document`` in google-research/bert, ``create_pretraining_data.py``:
sentences of a document fill a chunk up to a target length. A random split gives the first part. The second part is the
rest of the chunk, or text of a random document. In that case the sentences of the rest are used again.

There are three differences. A chunk of one sentence has no next part, so it becomes a sequence without a pair. The
paper always takes a random second part for it; so here next and random pairs are one half each. A sentence longer than
a sequence is split into pieces. For a long document, the random sentence is the first one after a random token, so that
the whole document need not be read.

All chunks of a block of documents advance together, one chunk per document at a time. So the loop is over the longest
document, not over the tokens. Every random number is computed from (seed, epoch, document, index of the chunk).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastbert.checks import expect
from fastbert.training.data.examples import Examples, Sentences, TokenSource, sentences_of
from fastbert.training.data.order import digest, fractions, mixed

WINDOW = 2**12  # tokens: for one span, a longer document is not read as a whole
BITS = np.array([bin(i).count("1") for i in range(256)], np.int64)  # the number of set bits of each byte
ONE_DOCUMENT = (
    "next-sentence pairs need two documents or more, got {n}: pass nsp=False (--no-nsp), "
    "or give text with blank lines between documents"
)


@dataclass(frozen=True)
class Pool:
    """A Pool holds ``n`` different documents; ``at`` returns the numbers of those at places in [0, n), as int64."""

    n: int
    at: Callable[[np.ndarray], np.ndarray]


class Chunks(NamedTuple):
    """Chunks holds runs of sentences, with indices over all documents of the block.

    ``documents``: the index of the document in the block. ``words``: uint64, the source of further random numbers.
    Sentences ``starts`` to ``splits`` are the first part, and those up to ``ends`` the second. ``is_next``: int8 as in
    Examples.
    """

    documents: np.ndarray
    words: np.ndarray
    starts: np.ndarray
    splits: np.ndarray
    ends: np.ndarray
    is_next: np.ndarray


def next_sentence_examples(
    corpus: TokenSource,
    documents: Any,
    *,
    seed: int,
    epoch: int,
    max_length: int,
    short_probability: float = 0.1,
    pool: Pool | np.ndarray | None = None,
) -> Examples:
    """Returns the pairs of documents, in the order of the documents and their text.

    ``documents``: (n,) integers. ``max_length``: the maximum number of tokens per sequence, with [CLS] and two [SEP].
    With ``short_probability``, the target length of a document is random, at least 2 tokens. ``pool``: the source
    documents of random parts, as a Pool or as different integers; with None, all documents of the corpus.

    The examples of a document depend only on the seed, the epoch, the document and the pool.

    Raises ValueError if the pool has fewer than two documents, or if ``max_length`` is less than 5.
    """
    expect(max_length >= 5, "max_length", max_length, "5 or more, to hold two tokens and three special ones")
    documents = np.asarray(documents, np.int64)
    pool = pool_of(corpus, pool)
    limit = max_length - 3
    sentences = sentences_of(corpus, documents, limit)
    words = mixed(documents, digest(8, seed, "pairs", epoch))
    short = fractions(mixed(1, words)) < short_probability
    targets = np.where(short, 2 + (fractions(mixed(2, words)) * (limit - 1)).astype(np.int64), limit)
    chunks = _chunks(sentences, targets, mixed(3, words))

    a_starts = sentences.starts[chunks.starts]
    a_lengths = sentences.ends[chunks.splits] - sentences.ends[chunks.starts]
    b_starts = np.append(sentences.starts, 0)[chunks.splits]
    b_lengths = sentences.ends[chunks.ends] - sentences.ends[chunks.splits]
    random = np.flatnonzero(chunks.is_next == 0)
    wanted = np.maximum(targets[chunks.documents[random]] - a_lengths[random], 1)
    origins = documents[chunks.documents[random]]
    b_starts[random], b_lengths[random] = _random_spans(corpus, pool, origins, wanted, chunks.words[random])

    a_cuts, b_cuts = cuts(a_lengths, b_lengths, limit)
    a_starts = a_starts + heads(a_cuts, mixed(1, chunks.words))
    b_starts = b_starts + heads(b_cuts, mixed(2, chunks.words))

    pairs = np.flatnonzero(chunks.is_next >= 0)
    offsets = np.concatenate([[0], np.cumsum(1 + (chunks.is_next >= 0))])
    segments = np.zeros(offsets[-1], np.int64)
    segments[offsets[pairs] + 1] = 1
    starts, lengths = np.empty_like(segments), np.empty_like(segments)
    starts[offsets[:-1]], lengths[offsets[:-1]] = a_starts, a_lengths - a_cuts
    starts[offsets[pairs] + 1], lengths[offsets[pairs] + 1] = b_starts[pairs], (b_lengths - b_cuts)[pairs]
    return Examples(starts, lengths, segments, offsets, chunks.is_next, documents[chunks.documents])


def pool_of(corpus: TokenSource, pool: Pool | np.ndarray | None) -> Pool:
    """Returns the Pool of ``next_sentence_examples``. Raises ValueError if it has fewer than two documents."""
    if pool is None:
        pool = Pool(corpus.n_documents, lambda places: places)
    elif not isinstance(pool, Pool):
        numbers = np.asarray(pool, np.int64)
        pool = Pool(len(numbers), lambda places: numbers[places])
    if pool.n < 2:
        raise ValueError(ONE_DOCUMENT.format(n=pool.n))
    return pool


def cuts(a_lengths: np.ndarray, b_lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of tokens to cut from each part of a pair, so that both fit into ``limit``: two (n,) int64.

    Tokens are cut one at a time from the longer part; from the second if both are equal.
    """
    excess = np.maximum(a_lengths + b_lengths - limit, 0)
    until_equal = np.minimum(excess, np.abs(a_lengths - b_lengths))
    rest = excess - until_equal
    a_longer = a_lengths > b_lengths
    return until_equal * a_longer + rest // 2, until_equal * ~a_longer + (rest + 1) // 2


def heads(counts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Returns the number of heads in ``counts`` tosses of a fair coin: (n,) int64. ``words``: (n,) uint64, random."""
    result = np.zeros(len(counts), np.int64)
    tossed = np.flatnonzero(counts)
    n_words = -(-counts[tossed] // 64)
    offsets = np.concatenate([[0], np.cumsum(n_words)])
    owners = np.repeat(np.arange(len(tossed)), n_words)
    places = np.arange(offsets[-1]) - offsets[owners]
    n_bits = np.minimum(counts[tossed][owners] - 64 * places, 64)
    tosses = mixed(places, words[tossed][owners]) >> (64 - n_bits).astype(np.uint64)
    ones = BITS[tosses.view(np.uint8)].reshape(-1, 8).sum(1)
    result[tossed] = np.diff(np.concatenate([[0], np.cumsum(ones)])[offsets])
    return result


def _chunks(sentences: Sentences, targets: np.ndarray, words: np.ndarray) -> Chunks:
    """Cuts documents into chunks, one per document at a time, and splits them.

    ``targets``, ``words``: (n_documents,).
    """
    ends = sentences.ends
    active = np.arange(len(targets))
    starts, lasts = sentences.offsets[:-1], sentences.offsets[1:]
    rounds: list[Chunks] = []
    while active.size:
        # The chunk ends with the first sentence that brings it to the target length.
        chunk_ends = np.minimum(np.searchsorted(ends, ends[starts] + targets), lasts)
        n_sentences = chunk_ends - starts
        draws = mixed(len(rounds), words)
        splits = starts + 1 + (fractions(draws) * (n_sentences - 1)).astype(np.int64)
        is_next = (draws & np.uint64(1)).astype(np.int8)
        is_next[n_sentences == 1] = -1
        rounds.append(Chunks(active, draws, starts, splits, chunk_ends, is_next))
        starts = np.where(is_next == 0, splits, chunk_ends)
        more = starts < lasts
        active, starts, lasts, targets, words = active[more], starts[more], lasts[more], targets[more], words[more]
    if not rounds:
        none = np.empty(0, np.int64)
        return Chunks(none, none.astype(np.uint64), none, none, none, none.astype(np.int8))
    columns = [np.concatenate(column) for column in zip(*rounds, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Chunks(*(column[order] for column in columns))


def _random_spans(
    corpus: TokenSource, pool: Pool, origins: np.ndarray, wanted: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns first tokens and lengths of spans from documents other than ``origins``, each from a random sentence on.

    They have whole sentences, and at least ``wanted`` tokens if the document has as many. In a document of more than
    ``WINDOW`` tokens, the span starts with the first sentence after a random token, and uses at most the sentences of
    one window.
    """
    places = (fractions(mixed(3, words)) * pool.n).astype(np.int64)
    others = (places + 1 + (fractions(mixed(4, words)) * (pool.n - 1)).astype(np.int64)) % pool.n
    documents = pool.at(places)
    documents = np.where(documents == origins, pool.at(others), documents)
    bounds = np.asarray(corpus.document_offsets)
    firsts, lasts = bounds[documents].tolist(), bounds[documents + 1].tolist()
    which = fractions(mixed(5, words)).tolist()
    starts, lengths = np.empty_like(origins), np.empty_like(origins)
    for i, (first, last, fraction, n) in enumerate(zip(firsts, lasts, which, wanted.tolist(), strict=True)):
        begins = np.empty(0, np.int64)
        if last - first > WINDOW:
            place = first + int(fraction * (last - first))
            end = min(place + WINDOW + n, last)
            begins, number = corpus.sentence_starts(place, end), 0
        if not len(begins):
            end = last
            begins = corpus.sentence_starts(first, last)
            number = int(fraction * len(begins))
        start = int(begins[number])
        after = int(begins.searchsorted(start + n))
        starts[i] = start
        lengths[i] = (int(begins[after]) if after < len(begins) else end) - start
    return starts, lengths
