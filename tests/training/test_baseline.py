"""The unigram baseline is what frequencies alone can do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastbert.training.baseline import unigram_baseline


def test_against_a_loop() -> None:
    """Catches smoothing over special tokens, another logarithm, and an accuracy of the wrong text."""
    train, held_out, special = [9, 4, 0, 6, 0, 100], [0, 1, 1, 2, 0, 50], [0, 5]
    ids = [i for i in range(6) if i not in special]
    total = sum(train[i] + 1 for i in ids)
    loss = -sum(held_out[i] / 4 * math.log((train[i] + 1) / total) for i in ids)
    baseline = unigram_baseline(train, held_out, special)
    assert baseline.loss == pytest.approx(loss, rel=1e-12)
    assert baseline.accuracy == 0.5  # id 3 is the most frequent one in training


def test_uniform_text() -> None:
    """Catches a loss that is not the logarithm of the vocabulary where all tokens are as frequent."""
    baseline = unigram_baseline(np.full(1000, 7))
    assert baseline.loss == pytest.approx(math.log(1000)) and baseline.accuracy == pytest.approx(1e-3)


def test_a_token_that_training_lacks_costs_a_finite_loss() -> None:
    """Catches an infinite baseline, beside which nothing can be read."""
    assert math.isfinite(unigram_baseline([5, 0], [0, 5]).loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "train_counts: got float64 of shape .0,."),
        (([1, -1],), "train_counts"),
        (([1, 2], [1, 2, 3]), "evaluation_counts: got 3 ids, expected 2"),
        (([3, 0], [3, 0], [0]), "train_counts: got no token besides special ones"),
        (([3, 1], [3, 0], [0]), "evaluation_counts: got no token besides special ones"),
    ],
)
def test_bad_counts_are_named(arguments: tuple, message: str) -> None:
    """Catches NaN in place of an error."""
    with pytest.raises(ValueError, match=message):
        unigram_baseline(*arguments)
