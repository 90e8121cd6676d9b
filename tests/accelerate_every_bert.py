"""A plugin for pytest, `-p accelerate_every_bert`: every BertModel of transformers is accelerated as it is made.

For transformers' own tests: see CONTRIBUTING.md.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import transformers

import fastbert
from fastbert.adapters.calls import Counted

_states: list[Counted] = []


def pytest_configure() -> None:
    before = transformers.BertModel.__init__

    @functools.wraps(before)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        fastbert.accelerate(self)
        _states.append(self.__dict__["_fastbert"])

    transformers.BertModel.__init__ = init


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total: Counter[str] = Counter()
    for state in _states:
        total.update(state.counts)
    terminalreporter.section("calls of accelerated models")
    for reason, n in total.most_common():
        terminalreporter.write_line(f"{n:6} {reason}")
