"""A synthetic corpus has random ids in documents and sentences of realistic lengths, in shards for pre-training.

Lengths are lognormal. Documents are like those of an encyclopaedia: half have fewer than 13 sentences, the mean is 27.
Sentences have 24 tokens in the mean. Ids are Zipf-distributed like words, so that the same rows of the embedding are
read often.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import workloads

from fastbert.training.data.shards import Corpus
from fastbert.training.data.special import SpecialIds
from fastbert.training.data.writing import ShardWriter

SPECIAL = SpecialIds(cls=1, sep=2, mask=3, all=(0, 1, 2, 3, 4))
SENTENCES, SENTENCES_SIGMA, MOST_SENTENCES = 13, 1.2, 2000  # of a document: median, spread of the logarithm, at most
TOKENS, TOKENS_SIGMA, MOST_TOKENS = 20, 0.6, 200  # of a sentence, likewise
TOKENS_OF_A_DOCUMENT = SENTENCES * np.exp(SENTENCES_SIGMA**2 / 2) * TOKENS * np.exp(TOKENS_SIGMA**2 / 2)  # the mean


def write_corpus(folder: Path, vocab_size: int, n_tokens: int) -> Corpus:
    """Writes a corpus of about so many tokens into an empty folder, and opens it. The corpus is always the same."""
    draw = np.random.default_rng([workloads.SEED, n_tokens])
    n_documents = max(8, round(n_tokens / TOKENS_OF_A_DOCUMENT))
    sentences = _lognormal(draw, n_documents, SENTENCES, SENTENCES_SIGMA, 2, MOST_SENTENCES)
    lengths = _lognormal(draw, int(sentences.sum()), TOKENS, TOKENS_SIGMA, 3, MOST_TOKENS)
    ends = np.cumsum(lengths)
    starts = np.zeros(ends[-1], bool)
    starts[ends - lengths] = True
    sizes = np.diff(ends[np.cumsum(sentences) - 1], prepend=0)
    writer = ShardWriter(folder, vocab_size)
    writer.add(_ids(draw, len(starts), vocab_size), starts, sizes, None)
    writer.finish(f"synthetic-{vocab_size}-{n_tokens}", {})
    return Corpus.open(folder)


def _lognormal(draw: np.random.Generator, n: int, median: float, sigma: float, least: int, most: int) -> np.ndarray:
    return np.clip(np.rint(draw.lognormal(np.log(median), sigma, n)), least, most).astype(np.int64)


def _ids(draw: np.random.Generator, n: int, vocab_size: int) -> np.ndarray:
    """Returns ids behind the special ones. The k-th of them is drawn with a probability of about 1 / k."""
    first = len(SPECIAL.all)
    ranks = np.exp(draw.random(n) * np.log(vocab_size - first)).astype(np.int64)
    return (first - 1 + ranks).astype(np.uint32)
