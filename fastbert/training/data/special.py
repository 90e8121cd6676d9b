"""SpecialIds holds the ids of the tokens that stand around text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """SpecialIds holds the ids of special tokens in a vocabulary.

    ``cls``, ``sep`` and ``mask`` are those of [CLS], [SEP] and [MASK]. ``all`` holds every special id, including these
    three. None of them is ever masked, and only ``mask`` ever replaces another token.
    """

    cls: int
    sep: int
    mask: int
    all: tuple[int, ...]
