"""The order of documents and all random numbers are functions of a seed and a key. This module has no state.

A key is a list of names and integers, such as ``("epoch", 3)``. Everything is computed from its BLAKE2b digest, so the
numbers are the same on every platform and for every version of NumPy.

The mixer of 64-bit words is the finaliser of SplitMix64 (Steele, Lea and Flood 2014). A permutation is a Feistel
network (Luby and Rackoff 1988) with cycle walking (Black and Rogaway 2002).
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import numpy as np

from fastbert.checks import expect, positive

ROUNDS = 8  # of the Feistel network; three are enough for ideal round functions
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: far from every multiple of itself


def digest(size: int, seed: int, *key: int | str) -> int:
    """Returns an integer of ``size`` bytes for a seed and a key. Different keys give unrelated numbers."""
    parts = [part if isinstance(part, str) else operator.index(part) for part in (seed, *key)]
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=size).digest(), "little")


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """Returns a generator whose start depends on the seed and the key; different ones give different starts.

    It is Philox 4x64 (Salmon et al. 2011) with a key of 128 bits. Raises TypeError if the seed or a part of the key is
    neither a string nor an integer.
    """
    return np.random.Generator(np.random.Philox(key=digest(16, seed, *key)))


def mixed(words: Any, key: int | np.ndarray) -> np.ndarray:
    """Returns a pseudo-random uint64 word for each of ``words``; ``key`` selects the function.

    ``words`` are integers, ``key`` is a word or uint64 words; their shapes broadcast, to at least one dimension. The
    results for the words 0, 1, ... with one key are the stream of SplitMix64 from that key.
    """
    x = np.atleast_1d(words).astype(np.uint64) * np.uint64(GOLDEN)
    x = x + np.asarray(key, np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def fractions(words: np.ndarray) -> np.ndarray:
    """Returns float64 values in [0, 1) from the top 53 bits of uint64 words."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A Permutation maps the integers from 0 to n - 1 to a random order, without a table."""

    def __init__(self, n: int, seed: int, *key: int | str) -> None:
        """Raises ValueError if ``n`` is not a positive integer."""
        self.n = positive("n", n)
        n_bits = (self.n - 1).bit_length()
        self._low_bits = np.uint64(n_bits // 2)
        self._low = np.uint64((1 << (n_bits // 2)) - 1)
        self._high = np.uint64((1 << (n_bits - n_bits // 2)) - 1)
        self._keys = [digest(8, seed, "permutation", self.n, i, *key) for i in range(ROUNDS)]

    def __call__(self, places: Any) -> np.ndarray:
        """Returns the number at each of ``places``: int64 of their shape.

        Raises IndexError for a place outside of [0, n).
        """
        places = np.asarray(places, np.int64)
        if places.size and (places.min() < 0 or places.max() >= self.n):
            raise IndexError(f"places: got {places.min()} to {places.max()}, expected 0 to {self.n - 1}")
        numbers = self._network(places.reshape(-1).astype(np.uint64))
        # The network permutes the integers below a power of two >= n. A number that is too large goes through it again.
        outside = np.flatnonzero(numbers >= self.n)
        while outside.size:
            numbers[outside] = self._network(numbers[outside])
            outside = outside[numbers[outside] >= self.n]
        return numbers.astype(np.int64).reshape(places.shape)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        low, high = numbers & self._low, numbers >> self._low_bits
        for i in range(0, ROUNDS, 2):
            high ^= mixed(low, self._keys[i]) & self._high
            low ^= mixed(high, self._keys[i + 1]) & self._low
        return (high << self._low_bits) | low


class Documents:
    """Documents splits the documents of a corpus by the seed into held-out and training documents.

    ``n_held_out``, ``n_training``: their numbers.
    """

    def __init__(self, n_documents: int, n_held_out: int, seed: int) -> None:
        """Raises ValueError if ``n_held_out`` is negative or greater than ``n_documents``."""
        expect(0 <= n_held_out <= n_documents, "held_out", n_held_out, f"0 to {n_documents}, the number of documents")
        self.n_held_out, self.n_training = n_held_out, n_documents - n_held_out
        self._seed = seed
        self._fixed = Permutation(n_documents, seed, "held out")

    def held_out(self, places: Any) -> np.ndarray:
        """Returns the numbers of held-out documents: int64. ``places``: integers in [0, n_held_out)."""
        return self._fixed(places)

    def training(self, places: Any) -> np.ndarray:
        """Returns the numbers of training documents in a fixed order: int64. ``places``: in [0, n_training)."""
        return self._fixed(np.asarray(places, np.int64) + self.n_held_out)

    def epoch(self, epoch: int, places: Any) -> np.ndarray:
        """Returns the numbers of training documents in the order of an epoch: int64. ``places``: in [0, n_training)."""
        return self.training(Permutation(self.n_training, self._seed, "epoch", epoch)(places))
