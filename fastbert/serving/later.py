"""This module delays work that no caller waits for. To count and log an answer takes longer than to write it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

SECONDS = 0.05  # the delay, after which many answers are handled at once


class Later:
    """A `Later` is a list of delayed calls. The event loop makes them, or a reader of their counts."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_due = False

    def add(self, function: Callable[..., None], *args: Any) -> None:
        """Adds a call. Any thread may do this."""
        self._calls.append((function, args))

    def soon(self) -> None:
        """Lets the event loop of this thread make the calls within SECONDS."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(SECONDS, self._at_last)

    def _at_last(self) -> None:
        self._is_due = False
        self.now()

    def now(self) -> None:
        """Makes the added calls. Any thread may do this."""
        while self._calls:
            try:
                function, args = self._calls.popleft()
            except IndexError:  # another thread has taken it
                return
            function(*args)
