"""This module counts events that make a launch stall: kernels compiled or loaded from disk, and tunings.

When a specialisation is launched for the first time in a process, Triton compiles it or finds it in its cache on disk,
and calls its compilation listener (triton.knobs.compilation.listener). Only kernels of this package count.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import triton

_PACKAGE = __name__.partition(".")[0]
_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(event: str) -> None:
    """Adds one to a count: "compilations", "loads" or "tunings"."""
    with _lock:
        _counts[event] += 1


def counts() -> dict[str, int]:
    """Returns the counts of this process so far."""
    with _lock:
        return {event: _counts[event] for event in ("compilations", "loads", "tunings")}


class _Listener:
    """A `_Listener` counts, and calls the earlier listener."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, *, src: Any, cache_hit: bool, **rest: Any) -> None:
        kernel = getattr(getattr(src, "fn", None), "fn", None)
        if getattr(kernel, "__module__", "").partition(".")[0] == _PACKAGE:
            count("loads" if cache_hit else "compilations")
        if self.other is not None:
            self.other(src=src, cache_hit=cache_hit, **rest)


def listen() -> None:
    """Makes the counter Triton's listener, again if it was replaced."""
    if not isinstance(triton.knobs.compilation.listener, _Listener):
        triton.knobs.compilation.listener = _Listener(triton.knobs.compilation.listener)
