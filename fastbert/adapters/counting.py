"""This module lets a diagnosis call an accelerated model without a change of its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import nn

from fastbert.adapters.acceleration import parts
from fastbert.adapters.live_encoder import Unsupported
from fastbert.adapters.state import OURS, STATE, EncoderState
from fastbert.models.bert import BertModel


def first_encoder(model: Any) -> nn.Module | None:
    """Returns the first accelerated encoder in a model, as its user has it, or None without one."""
    return next((part for part in parts(model) if isinstance(part.__dict__[STATE], EncoderState)), None)


def twins(model: Any) -> Iterator[tuple[nn.Module, BertModel]]:
    """Yields every accelerated encoder in a model with fastbert's encoder on its modules, if there is one."""
    for part in parts(model):
        state = part.__dict__[STATE]
        if isinstance(state, EncoderState):
            with suppress(Unsupported):
                yield part, state.encoder(part).model


@contextmanager
def uncounted(model: Any) -> Iterator[list[str]]:
    """Restores the counts of calls at the end.

    Yields a list, to which the reasons are added why the original code ran calls within.
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


@contextmanager
def lenient(model: Any) -> Iterator[None]:
    """Lets the original code run unsupported calls within, also with strict=True, and restores the counts."""
    options = {part: part.__dict__[STATE].options for part in parts(model)}
    try:
        for part, before in options.items():
            part.__dict__[STATE].options = replace(before, strict=False)
        with uncounted(model):
            yield
    finally:
        for part, before in options.items():
            part.__dict__[STATE].options = before
