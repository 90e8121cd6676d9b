"""A Worker is a thread that computes for one model, or for all models on the CPU."""

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
        """Tells whether there is a batch to compute."""

    def next_batch(self) -> Callable[[], None]:
        """Removes a batch from the queue, and returns a function that computes it. The caller has the worker's lock."""

    def stop(self) -> None:
        """Accepts no more work. The caller has the worker's lock."""


class Worker:
    """A Worker computes the batches of its sources. The sources take turns.

    OpenMP keeps a group of threads for each thread that computes. If there is a second group, even an idle one, both
    groups spin less while they wait, and a short batch takes a fifth longer. So models on the CPU share a worker. They
    are also loaded and warmed up there.

    changed: the condition that wakes the thread; its lock protects the state of all sources.
    """

    def __init__(self, name: str = "fastbert") -> None:
        self.changed = threading.Condition()
        self._is_busy = False
        self._sources: deque[Source] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        """Tells whether the thread can compute. No exception of a batch ends it."""
        return self._thread.ident is None or self._thread.is_alive()

    def add(self, source: Source) -> None:
        """Computes the batches of a source from now on."""
        with self.changed:
            self._sources.append(source)
            self._start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the worker's thread. Returns its result, or raises its error."""
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
        """Tells whether the calling thread may compute in the place of the worker, until it calls `end_here`.

        It may not if a batch is running or waiting.
        """
        with self.changed:
            if self._is_busy or self._is_closing or self._is_due():
                return False
            self._is_busy = True
            return True

    def end_here(self) -> None:
        """Lets the worker's thread compute again."""
        with self.changed:
            self._is_busy = False
            if self._is_closing or self._is_due():
                self.changed.notify()

    def close(self, seconds: float = 60.0) -> None:
        """Computes the waiting batches of the sources, and ends the thread."""
        with self.changed:
            self._is_closing = True
            for source in self._sources:
                source.stop()
            self.changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _start(self) -> None:
        """Starts the thread at its first work, so that a service that was never used leaves none."""
        if self._thread.ident is None:
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
        while True:  # finds the next source that has a batch
            self._sources.rotate(-1)
            if self._sources[-1].waits:
                return self._sources[-1].next_batch()
