"""This module lets a diagnosis call an accelerated encoder without a trace in the counts of its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastbert.adapters.acceleration import parts
from fastbert.adapters.state import OURS, STATE, EncoderState


def first_encoder(model: Any) -> nn.Module | None:
    """Returns the first accelerated encoder in a model, as its user has it, or None without one."""
    return next((part for part in parts(model) if isinstance(part.__dict__[STATE], EncoderState)), None)


@contextmanager
def uncounted(model: Any) -> Iterator[list[str]]:
    """Leaves the counts of calls as they were.

    Gives a list that has in the end the reasons why calls within ran as before.
    """
    reasons: list[str] = []
    before = {part: Counter(part.__dict__[STATE].counts) for part in parts(model)}
    try:
        yield reasons
    finally:
        for part, counts in before.items():
            state = part.__dict__[STATE]
            reasons += [reason for reason in state.counts - counts if reason != OURS]
            state.counts = counts
