"""SpecialIds names the tokens that stand around text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """SpecialIds holds the ids of special tokens in a vocabulary.

    ``cls``, ``sep`` and ``mask`` are those of [CLS], [SEP] and [MASK]. ``all`` holds every special id, these three
    included: none of them is ever masked, and none of them ever stands in another token's place but ``mask``.
    """

    cls: int
    sep: int
    mask: int
    all: tuple[int, ...]
