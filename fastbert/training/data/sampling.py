"""This module draws an even sample of sentences, in one pass over text of any size.

Each sentence gets a random number, and the sentences below a threshold are kept. Whenever the sample is larger than its
limit, the threshold is lowered, and the sentences above it are dropped. So every sentence has the same chance, wherever
it is.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT = 0.01  # the share of sentences that are excluded from learning
HELD_OUT_BYTES = 2**20
LOWER = 0.75  # factor of the threshold when the sample exceeds its limit


@dataclass
class Sample:
    """A Sample describes a drawn sample. Sizes are in bytes of UTF-8, with a line feed for each sentence.

    ``sentences`` and ``size``: the drawn part of ``all_sentences`` and ``all_size``. ``whole``: all sentences except
    those of ``held_out`` were drawn. ``held_out``: about ``HELD_OUT`` of all sentences, up to ``HELD_OUT_BYTES``.
    """

    sentences: int = 0
    size: int = 0
    all_sentences: int = 0
    all_size: int = 0
    whole: bool = True
    held_out: list[str] = field(default_factory=list)


class _Kept:
    """The lines below a threshold are kept in a file."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.size = 0
        self._limit = limit
        self.threshold = 1.0
        self._numbers = array("d")
        self._file = path.open("w+b")

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, line: bytes, number: float) -> None:
        if number >= self.threshold:
            return
        self._numbers.append(number)
        self._file.write(line)
        self.size += len(line)
        while self.size > self._limit and self.threshold > 1e-12:
            self._lower()

    def _lower(self) -> None:
        self.threshold *= LOWER
        self._file.seek(0)
        other = self.path.with_name(self.path.name + ".new")
        numbers, self._numbers, self.size = self._numbers, array("d"), 0
        with other.open("wb") as new:
            for number, line in zip(numbers, self._file, strict=True):
                if number < self.threshold:
                    self._numbers.append(number)
                    self.size += new.write(line)
        self._file.close()
        other.replace(self.path)
        self._file = self.path.open("r+b")
        self._file.seek(0, 2)

    def close(self) -> None:
        self._file.close()


def draw(documents: Iterable[list[str]], limit: int, seed: int, path: Path) -> Sample:
    """Draws at most ``limit`` bytes of sentences into the file ``path``, one per line. The seed decides which ones.

    If the text does not exceed the limit, all of it is drawn except the held-out part. Otherwise the sample has at
    least about three quarters of the limit.
    """
    rng = random.Random(seed)
    sample = Sample()
    kept = _Kept(path, limit)
    held_out = _Kept(path.with_name(path.name + ".held-out"), HELD_OUT_BYTES)
    try:
        for document in documents:
            for sentence in document:
                line = " ".join(sentence.splitlines()).encode() + b"\n"
                sample.all_sentences += 1
                sample.all_size += len(line)
                is_held_out, number = rng.random() < HELD_OUT, rng.random()
                (held_out if is_held_out else kept).add(line, number)
    finally:
        kept.close()
        held_out.close()
    sample.sentences, sample.size = len(kept), kept.size
    sample.whole = kept.threshold == 1.0
    sample.held_out = held_out.path.read_text(encoding="utf-8").split("\n")[:-1]
    held_out.path.unlink()
    return sample
