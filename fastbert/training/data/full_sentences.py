"""Sequences for masked-token prediction alone contain full sentences, also across the ends of documents.

Liu et al. 2019 (RoBERTa), FULL-SENTENCES: sentences are added in order until the next one does not fit. If a document
ends within a sequence, a [SEP] separates it from the next document.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from fastbert.checks import expect
from fastbert.training.data.examples import Examples, TokenSource, sentences_of
from fastbert.training.data.order import digest, fractions, mixed


def full_sentence_examples(
    corpus: TokenSource,
    documents: Any,
    *,
    seed: int,
    epoch: int,
    max_length: int,
    short_probability: float = 0.0,
) -> Examples:
    """Returns sequences that contain each token of the documents once, in order.

    ``documents``: (n,) integers. ``max_length``: the maximum number of tokens per sequence, with [CLS] and a [SEP]
    after each span. With ``short_probability``, the length of a sequence is random, with at least 2 tokens of text. A
    sentence longer than a sequence is split into pieces. ``documents`` of the result are those of the first spans.

    Raises ValueError if ``max_length`` is less than 4.
    """
    expect(max_length >= 4, "max_length", max_length, "4 or more, to hold two tokens and two special ones")
    documents = np.asarray(documents, np.int64)
    longest = max_length - 2
    starts, ends, offsets = sentences_of(corpus, documents, longest)
    words = mixed(starts, digest(8, seed, "full sentences", epoch))
    short = fractions(words) < short_probability
    targets = np.where(short, 2 + (fractions(mixed(1, words)) * (longest - 1)).astype(np.int64), longest)

    # A sentence that opens a document costs one more token, its [SEP]. A sequence needs a [SEP] for its first sentence
    # anyway.
    opens = np.zeros(len(starts) + 1, np.int64)
    opens[offsets[:-1]] = 1
    costs = ends + np.cumsum(opens)  # of all earlier sentences, and of the opening of this one
    cuts = _cuts((costs - opens).tolist(), (costs[:-1] + targets).tolist())

    # A span ends at the end of a sequence and at the end of a document.
    edges = np.union1d(cuts, offsets)
    spans = edges[:-1]
    numbers = np.searchsorted(offsets, np.array(cuts[:-1], np.int64), "right") - 1
    n = len(cuts) - 1
    return Examples(
        starts[spans],
        np.diff(ends[edges]),
        np.zeros(len(spans), np.int64),
        np.searchsorted(edges, cuts),
        np.full(n, -1, np.int8),
        documents[numbers],
    )


def _cuts(costs: list[int], limits: list[int]) -> list[int]:
    """Returns the sentences at which sequences begin, and at the end the number of sentences.

    A sequence that begins at sentence i ends with the last j for which ``costs[j]`` is at most ``limits[i]``, but
    contains at least one sentence.
    """
    cuts = [0]
    last = len(costs) - 1
    while cuts[-1] < last:
        i = cuts[-1]
        cuts.append(max(bisect_right(costs, limits[i], i + 1) - 1, i + 1))
    return cuts
