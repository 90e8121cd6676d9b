"""The unigram baseline is the score of a model that knows the frequency of each token, but not its context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class UnigramBaseline:
    """A `UnigramBaseline` holds two numbers, for comparison with the scores on masked tokens.

    loss: the cross entropy, in nats per token. accuracy: the share of tokens that are the most frequent token of the
    training text. A model without context gets the best accuracy if it always predicts this token.
    """

    loss: float
    accuracy: float


def unigram_baseline(
    train_counts: ArrayLike, evaluation_counts: ArrayLike | None = None, special: Iterable[int] = ()
) -> UnigramBaseline:
    """Computes the baseline from the number of times that each id of the vocabulary occurs, (V,) whole numbers each.

    evaluation_counts: the counts of the held-out text, by default those of the training text. special: ids that are
    never masked; they are not counted. The training counts are smoothed by one, so that an id that does not occur has a
    finite loss. Raises ValueError for counts of different shapes, negative counts, and a text without tokens.
    """
    train = _counts("train_counts", train_counts)
    held_out = train if evaluation_counts is None else _counts("evaluation_counts", evaluation_counts)
    if held_out.shape != train.shape:
        raise ValueError(f"evaluation_counts: got {held_out.size} ids, expected {train.size}, those of train_counts")
    is_special = np.zeros(train.size, dtype=bool)
    is_special[list(special)] = True
    train, held_out = train[~is_special], held_out[~is_special]
    for name, counts in (("train_counts", train), ("evaluation_counts", held_out)):
        if counts.sum() == 0:
            raise ValueError(f"{name}: got no token besides special ones, expected at least one")
    log_probabilities = np.log(train + 1.0) - np.log(train.sum() + train.size)
    shares = held_out / held_out.sum()
    return UnigramBaseline(loss=float(-(shares @ log_probabilities)), accuracy=float(shares[train.argmax()]))


def _counts(name: str, values: ArrayLike) -> np.ndarray:
    counts = np.asarray(values)
    if counts.ndim != 1 or counts.size == 0 or not np.issubdtype(counts.dtype, np.number) or counts.min() < 0:
        raise ValueError(f"{name}: got {counts.dtype} of shape {counts.shape}, expected (V,) counts from 0 on")
    return counts.astype(np.float64)
