"""A run that is killed at any moment goes on, and ends with the bits of one that nobody stopped."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pretraining_cases as cases
from fastbert.training import run
from fastbert.training.pretrain import pretrain

KILLS = 10


def test_killed_ten_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Catches a torn checkpoint, data or masks or dropout that restart elsewhere, and a journal with a step twice."""
    output, uninterrupted, chance = tmp_path / "model", tmp_path / "whole", random.Random(20)
    pretrain(cases.long_settings(uninterrupted))
    settings = cases.long_settings(output)
    places = sorted(chance.sample(range(1, cases.LONG_STEPS - 2), KILLS))
    for place in places:
        process = cases.start(settings)
        cases.wait_until(lambda place=place: cases.last_step(output) >= place, process)
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert cases.run(settings).returncode == 0
    assert cases.weights(output) == cases.weights(uninterrupted)
    assert cases.journal(output) == cases.journal(uninterrupted)
    assert cases.weights(output / run.BEST) == cases.weights(uninterrupted / run.BEST)
