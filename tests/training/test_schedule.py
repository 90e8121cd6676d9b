"""The learning rate of a step follows from the step alone."""

from __future__ import annotations

from typing import Any

import pytest

from fastbert.training.schedule import learning_rate_factor


def factors(**settings: Any) -> list[float]:
    return [learning_rate_factor(step, **settings) for step in range(settings["steps"])]


def test_linear() -> None:
    """Catches a first update at rate 0, a peak that is never or twice reached, and a decay that ends early."""
    assert factors(steps=8, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(steps=4, warmup=0) == [1.0, 0.75, 0.5, 0.25]
    assert factors(steps=2, warmup=2) == [0.5, 1.0]
    assert learning_rate_factor(8, steps=8, warmup=4) == learning_rate_factor(99, steps=8, warmup=4) == 0.0


def test_trapezoid() -> None:
    """Catches a plateau that is missing, and a decay over more or fewer updates than asked for."""
    assert factors(steps=8, warmup=2, decay=4, kind="trapezoid") == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(steps=3, warmup=0, decay=0, kind="trapezoid") == [1.0, 1.0, 1.0]
    assert learning_rate_factor(3, steps=3, warmup=0, decay=0, kind="trapezoid") == 0.0


def test_a_longer_run_shares_the_trapezoid() -> None:
    """Catches a plateau that depends on the number of steps, so that a run could not be made longer."""
    short = factors(steps=10, warmup=3, decay=2, kind="trapezoid")
    assert factors(steps=30, warmup=3, decay=2, kind="trapezoid")[:8] == short[:8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "kind: got 'cosine', expected one of 'linear', 'trapezoid'"),
        ({"steps": 0}, "steps: got 0"),
        ({"warmup": 11}, "warmup: got 11, expected 0 to 10"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"kind": "trapezoid", "decay": 9}, "decay: got 9, expected 0 to 8"),
        ({"kind": "trapezoid", "decay": -1}, "decay: got -1"),
        ({"step": -1}, "step: got -1"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], message: str) -> None:
    """Catches a schedule that goes on with values that have no meaning."""
    arguments: dict[str, Any] = {"step": 0, "steps": 10, "warmup": 2, **settings}
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(arguments.pop("step"), **arguments)
