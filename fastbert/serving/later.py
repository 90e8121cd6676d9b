"""What no caller waits for is done later: counting and logging an answer takes longer than writing it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

SECONDS = 0.05  # until it is done, of many answers at once


class Later:
    """A `Later` is a list of calls that are made soon: by the event loop, or by a reader of their counts."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_due = False

    def add(self, function: Callable[..., None], *args: Any) -> None:
        """Adds a call, in any thread."""
        self._calls.append((function, args))

    def soon(self) -> None:
        """Has the event loop of this thread make the calls within SECONDS."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(SECONDS, self._at_last)

    def _at_last(self) -> None:
        self._is_due = False
        self.now()

    def now(self) -> None:
        """Makes the calls that have been added, in any thread."""
        while self._calls:
            try:
                function, args = self._calls.popleft()
            except IndexError:  # another thread has taken it
                return
            function(*args)
