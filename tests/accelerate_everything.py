"""This plugin for pytest, `-p accelerate_everything`, accelerates whatever `fastbert.accelerate` covers.

With it the unmodified tests of transformers, sentence-transformers and PEFT meet accelerated models. See
docs/upstream-tests.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from typing import Any

import fastbert
from fastbert.adapters.covered import COVERED
from fastbert.adapters.state import AcceleratedState

_counts: list[Counter[str]] = []  # one per accelerated object, copies included


def covered_classes() -> list[type]:
    """The encoders of transformers, and the classes of sentence-transformers where it is installed."""
    classes = [getattr(importlib.import_module(mapping.module), mapping.model) for mapping in COVERED]
    try:
        import sentence_transformers
    except ImportError:
        return classes
    return [*classes, sentence_transformers.SentenceTransformer, sentence_transformers.CrossEncoder]


def _accelerate_after(before: Any) -> Any:
    @functools.wraps(before)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        with contextlib.suppress(ValueError):  # of a class derived from a covered one, or without a covered encoder
            fastbert.accelerate(self)

    return init


def pytest_configure() -> None:
    for kind in covered_classes():
        kind.__init__ = _accelerate_after(kind.__init__)  # type: ignore[misc]
    before = AcceleratedState.__init__

    def init(self: AcceleratedState, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        _counts.append(self.counts)

    AcceleratedState.__init__ = init  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total: Counter[str] = Counter()
    for counts in _counts:
        total.update(counts)
    terminalreporter.section("calls of accelerated models")
    for reason, n in total.most_common():
        terminalreporter.write_line(f"{n:6} {reason}")
