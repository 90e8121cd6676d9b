"""This script measures the tokens a second of the plan and of packed, masked batches, from mapped ids on one thread.

    OMP_NUM_THREADS=1 python benchmarks/batches.py --max-length 512 [--no-nsp] [--whole-words] [--sentences 20]

The corpus is synthetic and in memory: documents with ``--sentences`` sentences of 24 tokens in the mean, geometric and
Poisson. The time to read shards from a disk is not included.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from fastbert.training.data.batch import Masking, make_batch
from fastbert.training.data.plan import Plan
from fastbert.training.data.special import SpecialIds

VOCAB_SIZE = 30_000
SPECIAL = SpecialIds(cls=1, sep=2, mask=3, all=(0, 1, 2, 3, 4))


class Synthetic:
    """A Synthetic corpus has random ids. Two of three ids begin a word."""

    vocab_size = VOCAB_SIZE
    has_words = True

    def __init__(self, n_tokens: int, sentences: int) -> None:
        random = np.random.default_rng(0)
        counts = random.geometric(1 / sentences, n_tokens // (24 * sentences) + 2)
        lengths = 1 + random.poisson(23, counts.sum())
        ends = np.concatenate([[0], np.cumsum(lengths)])
        self.document_offsets = ends[np.concatenate([[0], np.cumsum(counts)])]
        self.n_documents, self.n_tokens = len(counts), int(ends[-1])
        self._begins = ends[:-1]
        self._ids = random.integers(5, VOCAB_SIZE, self.n_tokens).astype(np.uint16)
        self._words = random.random(VOCAB_SIZE) < 2 / 3

    def sentence_starts(self, start: int, end: int) -> np.ndarray:
        first, last = self._begins.searchsorted([start, end])
        return self._begins[first:last]

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        spans = [self._ids[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        return np.concatenate(spans).astype(np.int64)

    def word_starts(self, starts: Any, lengths: Any) -> np.ndarray:
        return self._words[self.take(starts, lengths)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--no-nsp", action="store_true")
    parser.add_argument("--whole-words", action="store_true")
    parser.add_argument("--sentences", type=int, default=20, help="of a document, in the mean")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="to make batches of")
    parser.add_argument("--tokens-per-step", type=int, default=2**17)
    parser.add_argument("--tokens-per-batch", type=int, default=2**15)
    options = parser.parse_args()
    corpus = Synthetic(options.tokens, options.sentences)
    plan = Plan(
        corpus,
        seed=0,
        tokens_per_step=options.tokens_per_step,
        tokens_per_batch=options.tokens_per_batch,
        max_length=options.max_length,
        nsp=not options.no_nsp,
    )
    masking = Masking(whole_words=options.whole_words)
    steps = plan.steps()
    n_tokens = n_steps = 0
    planned = made = 0.0
    while n_tokens < options.tokens:
        began = time.perf_counter()
        step = next(steps)
        begun = time.perf_counter()
        for examples, first_token in zip(step.batches, step.first_tokens, strict=True):
            batch = make_batch(
                corpus, examples, SPECIAL, seed=0, step=step.cursor.step, first_token=first_token, masking=masking
            )
            n_tokens += batch.n_tokens
        planned, made, n_steps = planned + begun - began, made + time.perf_counter() - begun, n_steps + 1
    rates = {"plan": planned, "batches": made, "both": planned + made}
    print(", ".join(f"{name} {n_tokens / seconds / 1e6:.1f}" for name, seconds in rates.items()), "M tokens/s")
    print(f"{n_tokens / n_steps / options.tokens_per_step:.1%} of a step's budget used, {plan.n_blocks} blocks")


if __name__ == "__main__":
    main()
