"""An Interruption cancels the wait of a task. It creates no task, because each task slows a request of one text."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any


class Interruption:
    """An Interruption is a context of a task. It raises the first of its reasons that occurs.

    The task's wait inside the context is cancelled. Nothing of an Interruption remains active after its context.
    """

    def __enter__(self) -> Interruption:
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._reason: Exception | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._watchers: list[asyncio.Task[None]] = []
        return self

    def later(self, seconds: float, reason: Exception) -> None:
        """Raises the reason when the context takes longer than `seconds`."""
        self._timers.append(self._loop.call_later(seconds, self._interrupt, reason))

    def watch(self, seconds: float, until: Callable[[], Awaitable[Any]], reason: Exception) -> None:
        """Raises the reason when the awaitable of `until` is done. `until` is called after `seconds` in the context."""
        self._timers.append(self._loop.call_later(seconds, self._begin, until, reason))

    def _begin(self, until: Callable[[], Awaitable[Any]], reason: Exception) -> None:
        async def watch() -> None:
            await until()
            self._interrupt(reason)

        self._watchers.append(self._loop.create_task(watch()))

    def _interrupt(self, reason: Exception) -> None:
        if self._reason is None and self._task is not None:
            self._reason = reason
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        for watcher in self._watchers:
            watcher.cancel()
        task, self._task = self._task, None
        if self._reason is None or kind is not asyncio.CancelledError:
            return
        if task is not None and hasattr(task, "uncancel"):  # from Python 3.11 on
            task.uncancel()
        raise self._reason from None
