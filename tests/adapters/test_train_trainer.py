"""transformers' Trainer gives the same curves with an accelerated model, with dropout and in 16 bits as well."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from train_cases import classifier, distance

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 40}


def test_sixty_steps(train: Any) -> None:
    """Catches a curve that leaves the original's, in training or in the evaluations in between."""
    ours, theirs = (
        train(classifier(), accelerated, eval_strategy="steps", eval_steps=20) for accelerated in (True, False)
    )
    losses = ours.losses
    assert len(losses) == 60 and losses[-1] < 0.4 * losses[0]
    assert distance(ours, theirs) < 1e-5
    evaluations = [
        [(e["eval_loss"], e["eval_accuracy"]) for e in trainer.state.log_history if "eval_loss" in e]
        for trainer in (ours, theirs)
    ]
    assert len(evaluations[0]) == 3
    for (loss, accuracy), (their_loss, their_accuracy) in zip(*evaluations, strict=True):
        assert abs(loss - their_loss) < 1e-5 and accuracy == their_accuracy


def test_dropout(train: Any) -> None:
    """Catches dropout under which a model learns worse, or better, than with the original's."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for accelerated, losses in ends.items():
        for seed in range(3):
            trainer = train(classifier(p=0.1, seed=seed), accelerated, max_steps=30, seed=seed)
            losses.append(trainer.evaluate()["eval_loss"])
    noise = (sum(statistics.variance(losses) for losses in ends.values()) / 3) ** 0.5
    assert abs(statistics.mean(ends[True]) - statistics.mean(ends[False])) < 3 * noise
    assert max(ends[True]) < 1.77  # The loss of a model that has learned nothing is 1.79.


def test_sixteen_bits(train: Any) -> None:
    """Catches autocast that the encoder does not follow, or under which it trains worse than the original."""
    ours, theirs = (train(classifier(), accelerated, bf16=True, **SHORT) for accelerated in (True, False))
    exact = train(classifier(), False, **SHORT)
    assert ours.losses[-1] < 0.8 * ours.losses[0]
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert abs(ours.losses[0] - exact.losses[0]) < 0.02
    ends = [statistics.mean(trainer.losses[-10:]) for trainer in (ours, theirs, exact)]
    assert abs(ends[0] - ends[2]) < 2 * abs(ends[1] - ends[2]) + 0.05
