"""A Worker is the thread that computes: for one model, or for all that share a processor."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol


class Source(Protocol):
    """A Source has batches to compute."""

    @property
    def waits(self) -> bool:
        """Tells whether there is a batch."""

    def next_batch(self) -> Callable[[], None]:
        """Returns what computes a batch, which leaves the queue by this. The caller has the worker's lock."""

    def stop(self) -> None:
        """Takes no more work. The caller has the worker's lock."""


class Worker:
    """A Worker computes a batch of one of its sources after the other. They take turns.

    OpenMP keeps a group of threads for each thread that computes. A second group, even one that never computes again,
    makes both wait less eagerly, and a short batch take a fifth longer. So models that compute on the CPU share a
    worker, and what loads them and warms them up runs there, too.

    changed: the lock of all that its sources have, and what wakes the thread.
    """

    def __init__(self, name: str = "fastbert") -> None:
        self.changed = threading.Condition()
        self._is_busy = False
        self._sources: deque[Source] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_started = False

    @property
    def alive(self) -> bool:
        """Tells whether the thread can compute. No exception of a batch ends it."""
        return not self._is_started or self._thread.is_alive()

    def add(self, source: Source) -> None:
        """Computes what a source has from now on."""
        with self.changed:
            self._sources.append(source)
            self._start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns that runs in this thread. Raises what it raises."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self.changed:
            self._calls.append(run)
            self._start()
            self.changed.notify()
        return future.result()

    def begin_here(self) -> bool:
        """Tells whether another thread may compute in the place of this one, until it calls `end_here`.

        It may not where something is being computed, or waits for it.
        """
        with self.changed:
            if self._is_busy or self._is_closing or self._is_due():
                return False
            self._is_busy = True
            return True

    def end_here(self) -> None:
        """Lets this thread compute again."""
        with self.changed:
            self._is_busy = False
            if self._is_closing or self._is_due():
                self.changed.notify()

    def close(self, seconds: float = 60.0) -> None:
        """Computes what the sources have waiting, and ends the thread."""
        with self.changed:
            self._is_closing = True
            for source in self._sources:
                source.stop()
            self.changed.notify()
        if self._is_started:
            self._thread.join(seconds)

    def _start(self) -> None:
        """Starts the thread at its first work, so that a service that was never used leaves none."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self.changed:
                while self._is_busy or not self._is_due():
                    if self._is_closing and not self._is_busy:
                        return
                    self.changed.wait()
                batch, self._is_busy = self._next(), True
            batch()
            with self.changed:
                self._is_busy = False

    def _is_due(self) -> bool:
        return bool(self._calls) or any(source.waits for source in self._sources)

    def _next(self) -> Callable[[], None]:
        if self._calls:
            return self._calls.popleft()
        while True:  # to the next one that waits
            self._sources.rotate(-1)
            if self._sources[-1].waits:
                return self._sources[-1].next_batch()
