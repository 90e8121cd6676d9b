"""The workloads of every suite are lengths and texts. They are drawn from a fixed seed and described only here.

Lengths are tokens a sequence, special tokens included. These are the `valid tokens`. `padding waste` is the share of
the other positions in a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED = 20240229


@dataclass(frozen=True)
class Workload:
    """A Workload has sequences of these lengths, run `batch_size` at a time (None: all at once)."""

    name: str
    description: str
    lengths: tuple[int, ...]
    batch_size: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def batches(self) -> list[tuple[int, ...]]:
        """Returns the lengths of each batch, in the order of the sequences."""
        size = self.batch_size or len(self.lengths)
        return [self.lengths[i : i + size] for i in range(0, len(self.lengths), size)]

    def padding_waste(self) -> float:
        """Returns the share of padding if each batch of successive sequences is padded to its longest one."""
        padded = sum(max(batch) * len(batch) for batch in self.batches())
        return 1.0 - self.tokens / padded


def squad(n: int = 1024) -> Workload:
    """(a) Draws lengths as in BERT-large on SQuAD v1.1: at most 384, mean about 170. 1,024 at a time."""
    lengths = np.random.default_rng(SEED).lognormal(np.log(157.0), 0.42, n)
    return Workload("squad", f"SQuAD-like lengths, max 384, {n:,} at a time", _clipped(lengths, 24, 384))


def fixed(length: int, batch_size: int) -> Workload:
    """(b) Gives every sequence the same length."""
    name = f"S{length} b{batch_size}"
    return Workload(name, f"{batch_size} sequences of {length} tokens", (length,) * batch_size)


FIXED_LENGTHS = (128, 384, 512)
FIXED_BATCHES = (1, 8, 32, 128)


def byte_transformer(longest: int, n: int = 16) -> Workload:
    """(c) Draws lengths as in ByteTransformer (Zhai et al., arXiv:2210.03052): 16 sequences, mean 0.6 times the
    longest.
    """
    lengths = np.random.default_rng(SEED).uniform(0.2 * longest, longest, n)
    lengths *= 0.6 * longest / lengths.mean()
    lengths[lengths.argmax()] = longest
    name = f"bt{longest}"
    return Workload(name, f"{n} sequences, at most {longest}, mean 0.6 of that", _clipped(lengths, 1, longest))


BYTE_TRANSFORMER_LONGEST = (64, 128, 256, 512, 1024)


def half_padded(longest: int, n: int) -> Workload:
    """Draws lengths of typical training batches: they vary widely, and half of the batch is padding."""
    lengths = np.random.default_rng(SEED).uniform(0.1 * longest, longest, n)
    first = lengths.argmax()
    lengths[first] = 0.0
    lengths *= (0.5 * n - 1.0) * longest / lengths.sum()
    lengths[first] = longest
    text = f"{n} sequences of at most {longest} tokens, half of the batch padding"
    return Workload(f"half padding {longest} b{n}", text, _clipped(lengths, 1, longest))


def documents(variable: bool, n: int = 8192, batch_size: int = 64) -> Workload:
    """(d) Draws lengths as in the ModernBERT paper (Warner et al., arXiv:2412.13663): fixed 512 against normal(256)."""
    if not variable:
        return Workload("documents fixed", f"{n:,} documents of 512 tokens", (512,) * n, batch_size)
    lengths = np.random.default_rng(SEED).normal(256.0, 64.0, n)
    text = f"{n:,} documents, lengths normal(256, 64), at most 512"
    return Workload("documents variable", text, _clipped(lengths, 8, 512), batch_size)


def mixed(n: int = 1024) -> Workload:
    """(e) Mixes short queries, mean 20 tokens, with one long document, 256 to 512 tokens, in sixteen, shuffled."""
    draw = np.random.default_rng(SEED)
    lengths = 4 + draw.poisson(16.0, n)
    long = draw.random(n) < 1 / 16
    lengths = np.where(long, draw.integers(256, 513, n), lengths)
    text = "queries of about 20 tokens, one in sixteen a document of 256 to 512"
    return Workload("mixed", text, _clipped(lengths, 4, 512))


def queries(n: int = 3277) -> Workload:
    """Draws texts of 20 tokens on average, about as many tokens in all as `fixed(512, 128)` has."""
    lengths = 4 + np.random.default_rng(SEED).poisson(16.0, n)
    return Workload("queries", "texts of about 20 tokens", _clipped(lengths, 4, 64))


def token_ids(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    """Returns random ids, one int64 array a sequence."""
    draw = np.random.default_rng([SEED, seed])
    return [draw.integers(0, vocab_size, n) for n in lengths]


def _clipped(lengths: np.ndarray, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.clip(np.rint(lengths), low, high))
