"""The Plan determines the examples of each step and each batch. A Cursor is the position of a run in the plan.

An epoch's documents, in order, are cut into blocks with equal numbers of documents. A block has about as many tokens as
``BLOCK_STEPS`` steps in the mean. The examples of a block are made together, shuffled, and distributed over as few
steps as the budget allows, with about the same number of tokens each. So a step can be computed without the steps
before it: a start in the middle of an epoch costs the examples of one block.

Every step has the same number K of batches, and none is empty. Process r of R computes the batches r, r + R, ... K is
the number of tokens per step over the number of tokens per batch, rounded up, and rounded up again to a multiple of R.
The examples of a batch depend on K, not on R. If a step has fewer sequences than K, its longest ones are halved.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from fastbert.checks import expect, positive
from fastbert.training.data.dealing import batches_of, deal
from fastbert.training.data.examples import Examples, TokenSource
from fastbert.training.data.full_sentences import full_sentence_examples
from fastbert.training.data.order import Documents, generator
from fastbert.training.data.pairs import ONE_DOCUMENT, Pool, next_sentence_examples

logger = logging.getLogger("fastbert")

BLOCK_STEPS = 32
SAMPLE = 2**20  # tokens in the sample of documents that estimates the tokens of an epoch
LARGE = 2**27  # tokens of a block that need about a gigabyte of memory, at 6 bytes each
TOGETHER = 256  # documents whose examples are made at once, for evaluation and for the estimate


@dataclass(frozen=True)
class Cursor:
    """A Cursor identifies a step: its number in the run, its epoch, its block, and its place in the block."""

    step: int = 0
    epoch: int = 0
    block: int = 0
    place: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the four numbers by name, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        """Returns the cursor from ``as_dict``'s result. Raises ValueError for other names and for non-integers."""
        names = list(cls.__dataclass_fields__)
        if sorted(values) != sorted(names):
            raise ValueError(f"cursor: got {values!r}, expected {', '.join(names)}")
        for name, value in values.items():
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)
            expect(whole, f"cursor, {name}", value, "a whole number from 0 on")
        return cls(**{name: operator.index(value) for name, value in values.items()})


@dataclass(frozen=True, eq=False)
class PlanStep:
    """A PlanStep holds the work of a step, over all processes.

    ``cursor``: its position; ``after``: the position of the next step. ``batches``: the examples of each batch.
    ``first_tokens``: for each batch, the number of tokens of the step before it.
    """

    cursor: Cursor
    after: Cursor
    batches: list[Examples]
    first_tokens: list[int]


class Plan:
    """A Plan distributes the documents of a corpus over steps.

    ``seed``: the seed of all random numbers. ``n_batches``: K, the number of batches per step. ``n_blocks``: the number
    of blocks per epoch. ``documents``: the training and the held-out documents. ``tokens_per_epoch``: the number of
    tokens in all steps of an epoch, estimated from a sample of the documents.
    """

    def __init__(
        self,
        corpus: TokenSource,
        *,
        seed: int,
        tokens_per_step: int,
        tokens_per_batch: int,
        n_processes: int = 1,
        max_length: int,
        nsp: bool = True,
        short_probability: float = 0.1,
        held_out: int = 0,
    ) -> None:
        """Takes a corpus and the limits of steps and sequences.

        ``tokens_per_step``: the maximum number of tokens in all batches of a step; each halved sequence adds two
        tokens. ``tokens_per_batch``: the maximum number of tokens of one batch. ``max_length``: the maximum number of
        tokens of one sequence. ``nsp``: make the paper's pairs, otherwise full sentences. ``short_probability``: as in
        the modules of these two. ``held_out``: the number of documents that only ``evaluation`` uses; if all are held
        out, there are no steps.

        Raises ValueError if a number is not positive; if a batch cannot hold a sequence, or a step one for each
        process; if there are fewer documents than ``held_out``; if ``nsp`` is true and there is only one training
        document, or only one held-out document.
        """
        self._corpus = corpus
        self.seed = operator.index(seed)
        self._nsp = nsp
        self._short_probability = short_probability
        self.max_length = positive("max_length", max_length)
        self.tokens_per_step = positive("tokens_per_step", tokens_per_step)
        self.tokens_per_batch = min(positive("tokens_per_batch", tokens_per_batch), self.tokens_per_step)
        n_processes = positive("n_processes", n_processes)
        least = f"{max_length} (max_length) or more"
        expect(tokens_per_batch >= max_length, "tokens_per_batch", tokens_per_batch, least)
        least = f"{max_length} x {n_processes} (max_length x n_processes) or more"
        expect(tokens_per_step >= max_length * n_processes, "tokens_per_step", tokens_per_step, least)
        expect(0 <= short_probability <= 1, "short_probability", short_probability, "0 to 1")
        wanted = -(-self.tokens_per_step // self.tokens_per_batch)
        self.n_batches = -(-wanted // n_processes) * n_processes
        self.documents = Documents(corpus.n_documents, held_out, self.seed)
        n_training = self.documents.n_training
        if nsp and n_training == 1:
            raise ValueError(ONE_DOCUMENT.format(n=n_training))
        if nsp and held_out == 1:
            raise ValueError("held_out: got 1, expected 0, or 2 and more: next-sentence pairs need two documents")
        self.tokens_per_epoch = self._estimate()
        # A block of K documents has at least one token for each batch, however short they are.
        n_blocks = round(self.tokens_per_epoch / (BLOCK_STEPS * self.tokens_per_step))
        self.n_blocks = max(min(n_blocks, n_training // self.n_batches), 1)
        if self.tokens_per_epoch // self.n_blocks > max(LARGE, 2 * BLOCK_STEPS * self.tokens_per_step):
            logger.warning(
                "%d documents have %d tokens: they are read about %d tokens at a time, which takes memory. "
                "Give text with blank lines between documents.",
                n_training,
                corpus.n_tokens,
                self.tokens_per_epoch // self.n_blocks,
            )

    def block(self, epoch: int, block: int) -> list[list[Examples]]:
        """Returns the batches of each step of a block. Raises ValueError if it has too few tokens for ``n_batches``."""
        n = self.documents.n_training
        places = np.arange(block * n // self.n_blocks, (block + 1) * n // self.n_blocks)
        pool = Pool(n, self.documents.training)
        examples = self._examples(self.documents.epoch(epoch, places), epoch, pool)
        keys = generator(self.seed, "shuffle", epoch, block).random(len(examples))
        shuffled = examples.take(np.argsort(keys, kind="stable"))
        return deal(shuffled, self.tokens_per_step, self.tokens_per_batch, self.n_batches)

    def steps(self, cursor: Cursor | None = None) -> Iterator[PlanStep]:
        """Yields the steps from ``cursor`` on, without end.

        Raises ValueError if the plan has no such position, because the cursor is from another plan. Also raises
        ValueError if all documents are held out.
        """
        cursor = cursor or Cursor()
        n_held_out = self.documents.n_held_out
        expect(self.documents.n_training > 0, "held_out", n_held_out, "fewer than all documents, to train on the rest")
        expect(cursor.block < self.n_blocks, "cursor", cursor, f"a block below {self.n_blocks}, as this plan has")
        while True:
            steps = self.block(cursor.epoch, cursor.block)
            expect(cursor.place < len(steps), "cursor", cursor, f"a place below {len(steps)}, as this block has steps")
            for batches in steps[cursor.place :]:
                after = self._after(cursor, len(steps))
                ends = accumulate((int(batch.n_tokens().sum()) for batch in batches), initial=0)
                yield PlanStep(cursor, after, batches, list(ends)[:-1])
                cursor = after

    def evaluation(self, tokens: int | None = None) -> list[Examples]:
        """Returns the batches of the held-out documents, those of epoch 0, always the same for a seed.

        They have at most ``tokens`` tokens, but at least one sequence; with None, all sequences. They do not depend on
        the number of processes. The list is empty if nothing is held out.
        """
        n = self.documents.n_held_out
        if n == 0:
            return []
        pool = Pool(n, self.documents.held_out)
        parts, n_tokens = [], 0
        for first in range(0, n, TOGETHER):
            documents = self.documents.held_out(np.arange(first, min(first + TOGETHER, n)))
            parts.append(self._examples(documents, 0, pool))
            n_tokens += int(parts[-1].n_tokens().sum())
            if tokens is not None and n_tokens >= tokens:
                break
        examples = Examples.join(parts)
        if tokens is not None:
            n_fitting = np.searchsorted(np.cumsum(examples.n_tokens()), tokens, "right")
            examples = examples.take(np.arange(max(int(n_fitting), 1)))
        return batches_of(examples, self.tokens_per_batch)

    def _estimate(self) -> int:
        """Returns the approximate number of tokens of an epoch, from the examples of some of its documents."""
        n, n_documents = self.documents.n_training, self._corpus.n_documents
        if n == 0:
            return 0
        sample = self.documents.training(np.arange(min(n, TOGETHER)))
        bounds = np.asarray(self._corpus.document_offsets)
        lengths = (bounds[sample + 1] - bounds[sample]).astype(np.int64)
        n_sampled = max(int(np.searchsorted(np.cumsum(lengths), SAMPLE, "right")), 1)
        examples = self._examples(sample[:n_sampled], 0, Pool(n, self.documents.training))
        growth = int(examples.n_tokens().sum()) / int(lengths[:n_sampled].sum())
        return round(self._corpus.n_tokens * (n / n_documents) * growth)

    def _after(self, cursor: Cursor, n_places: int) -> Cursor:
        if cursor.place + 1 < n_places:
            return Cursor(cursor.step + 1, cursor.epoch, cursor.block, cursor.place + 1)
        if cursor.block + 1 < self.n_blocks:
            return Cursor(cursor.step + 1, cursor.epoch, cursor.block + 1)
        return Cursor(cursor.step + 1, cursor.epoch + 1)

    def _examples(self, documents: np.ndarray, epoch: int, pool: Pool) -> Examples:
        corpus, common = self._corpus, {"seed": self.seed, "epoch": epoch, "max_length": self.max_length}
        short = self._short_probability
        if self._nsp:
            return next_sentence_examples(corpus, documents, **common, short_probability=short, pool=pool)
        return full_sentence_examples(corpus, documents, **common, short_probability=short)
