"""The Plan says which examples each step and each batch has. A Cursor says where in the plan a run stands.

An epoch's documents, in their order, are cut into blocks: an even number of documents each, as many as about
``BLOCK_STEPS`` steps have tokens in the mean. The examples of a block are made together, shuffled, and dealt out to
as few steps as the budget allows, with about as many tokens each. So a step is known without those before it: to
stand in the middle of an epoch costs the examples of one block.

Every step has the same number K of batches, and none of them is empty. Process r of R computes the batches r, r + R,
... K is the tokens of a step over the tokens of a batch, rounded up, and up again to a multiple of R. Which examples
a batch has depends on K, not on R. Where a step has fewer sequences than K, its longest ones are halved.
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
SAMPLE = 2**20  # tokens of the documents from which the tokens of an epoch are estimated
LARGE = 2**27  # tokens of a block that need a gigabyte of memory or so: 6 bytes each
TOGETHER = 256  # documents whose examples are made together, for evaluation and for the estimate


@dataclass(frozen=True)
class Cursor:
    """A Cursor names a step: its number since the run began, its epoch, the block in that, its place in the block."""

    step: int = 0
    epoch: int = 0
    block: int = 0
    place: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the four numbers by their names, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        """Returns the cursor of ``as_dict``. Raises ValueError for other names, and for anything but whole numbers."""
        names = list(cls.__dataclass_fields__)
        if sorted(values) != sorted(names):
            raise ValueError(f"cursor: got {values!r}, expected {', '.join(names)}")
        for name, value in values.items():
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)
            expect(whole, f"cursor, {name}", value, "a whole number from 0 on")
        return cls(**{name: operator.index(value) for name, value in values.items()})


@dataclass(frozen=True, eq=False)
class PlanStep:
    """A PlanStep holds what a step computes, over all processes.

    ``cursor``: where it stands; ``after``: where the next step stands. ``batches``: the examples of each batch.
    ``first_tokens``: for each batch, the tokens of the step that come before it.
    """

    cursor: Cursor
    after: Cursor
    batches: list[Examples]
    first_tokens: list[int]


class Plan:
    """A Plan deals the documents of a corpus out to steps.

    ``seed``: that of everything random. ``n_batches``: K, the batches of a step. ``n_blocks``: the blocks of an
    epoch. ``documents``: those of training and those held out. ``tokens_per_epoch``: the tokens that all steps of an
    epoch have, estimated from a sample of the documents.
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
        """Takes a corpus and what is asked of steps and sequences.

        ``tokens_per_step``: tokens of all batches of a step at most; two more are there for each sequence that had to
        be halved. ``tokens_per_batch``: tokens of one batch at most. ``max_length``: tokens of one sequence at most.
        ``nsp``: pairs of the paper, or else full sentences. ``short_probability``: as in the modules of these two.
        ``held_out``: the number of documents that only ``evaluation`` sees; if it is all of them, there are no steps.

        Raises ValueError if a number is not positive; if a batch cannot hold a sequence, or a step one for each
        process; if there are fewer documents than ``held_out``; if ``nsp`` is true and the documents of training, or
        those held out, are only one.
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
        # A block of K documents has a token for each batch, however short they are.
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

        Raises ValueError if the plan has no such place: then the cursor is from another plan. Raises it too if all
        documents are held out.
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

        They have ``tokens`` tokens at most, but one sequence at least; all there are, if it is None. They do not depend
        on the number of processes. The list is empty if nothing is held out.
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
        """Returns about how many tokens an epoch has, by the examples of some of its documents."""
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
