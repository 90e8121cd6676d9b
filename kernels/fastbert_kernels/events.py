"""Counts what can make a launch stall: kernels compiled, kernels loaded from Triton's cache on disk, tunings.

Triton tells its compilation listener (triton.knobs.compilation.listener) of every kernel that it compiles, or finds
in its cache on disk, when a specialisation is launched for the first time in a process. Only kernels of this package
count.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import triton

_PACKAGE = __name__.partition(".")[0]
_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(what: str) -> None:
    """Counts one more: "compilations", "loads" or "tunings"."""
    with _lock:
        _counts[what] += 1


def counts() -> dict[str, int]:
    """How many there were in this process so far."""
    with _lock:
        return {what: _counts[what] for what in ("compilations", "loads", "tunings")}


class _Listener:
    """Counts, and passes on to whoever listened before."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, *, src: Any, cache_hit: bool, **rest: Any) -> None:
        kernel = getattr(getattr(src, "fn", None), "fn", None)
        if getattr(kernel, "__module__", "").partition(".")[0] == _PACKAGE:
            count("loads" if cache_hit else "compilations")
        if self.other is not None:
            self.other(src=src, cache_hit=cache_hit, **rest)


def listen() -> None:
    """Puts the counter in the place of Triton's listener; again, if somebody took that place since."""
    if not isinstance(triton.knobs.compilation.listener, _Listener):
        triton.knobs.compilation.listener = _Listener(triton.knobs.compilation.listener)
