"""A Batcher computes the requests of many callers to one model in shared packed batches."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from fastbert.serving.errors import ApiError
from fastbert.serving.work import Item, Lane, Work
from fastbert.serving.worker import Worker

logger = logging.getLogger("fastbert.serving")

HERE_SECONDS = 0.01  # the longest batch that may run in the caller's thread

Compute = Callable[[Lane, list[Item]], list[Any]]  # a result for each item
Picked = list[tuple[Work, int]]  # works and indices of their items


class Batcher:
    """A Batcher has a queue with a limit in tokens. A worker takes batches from it.

    compute: returns a result for each item. token_budget: the most tokens in a batch; a larger item is a batch by
    itself. capacity: the most tokens that wait or run at once. on_batch: is called with the numbers of items and tokens
    of each batch. compute_here: does the same as `compute` in the calling thread, or returns None if this is not
    possible. worker: may be shared with other batchers; by default this batcher has its own.

    Lanes take turns, and callers take turns within a lane: a batch takes one item of each caller, then a second one of
    each, and so on. So a caller with one text does not wait for another caller's thousand texts.
    """

    def __init__(
        self,
        compute: Compute,
        token_budget: int,
        capacity: int,
        on_batch: Callable[[int, int], None] = lambda n_items, n_tokens: None,
        compute_here: Callable[[Lane, list[Item]], list[Any] | None] | None = None,
        worker: Worker | None = None,
    ) -> None:
        self._compute, self._token_budget, self.capacity, self._on_batch = compute, token_budget, capacity, on_batch
        self._compute_here = compute_here
        self._lanes: OrderedDict[Lane, deque[Work]] = OrderedDict()
        self._worker = worker or Worker()
        self._changed = self._worker.changed
        self._closing = False
        self.n_tokens = 0  # tokens that wait or run
        self._seconds: dict[tuple[str, int], float] = {}  # times of batches, by task and bit length of n_tokens
        self._tokens_per_second = 0.0  # a moving average over batches
        self._worker.add(self)

    @property
    def alive(self) -> bool:
        """Tells whether the worker runs. An exception of a batch does not end it."""
        return self._worker.alive

    def reserve(self, n_tokens: int) -> Work:
        """Returns a work with reserved room for n_tokens tokens, or for the whole capacity if n_tokens exceeds it.

        Raises ApiError 429 if there is no room now. The room is free again when the work's future is done.
        """
        n_tokens = min(n_tokens, self.capacity)
        with self._changed:
            if self.n_tokens + n_tokens > self.capacity:
                message = f"the queue is full: {self.n_tokens} of {self.capacity} tokens wait or run"
                raise ApiError(429, "queue_full", message, retry_after=self._seconds_to_wait())
            work = Work(n_tokens)
            self.n_tokens += n_tokens
        work.future.add_done_callback(lambda _: self._release(work))
        return work

    def submit(self, work: Work, lane: Lane, items: list[Item]) -> Future[list[Any]]:
        """Puts a reserved work with its items into the queue, and returns its future."""
        with self._changed:
            if work.future.done():
                return work.future
            self._fill(work, lane, items)
            if items and not self._closing:
                self._lanes.setdefault(lane, deque()).append(work)
                self._changed.notify()
        if not items:
            _resolve(work)
        elif self._closing:
            work.future.set_exception(ApiError(503, "stopping", "the server is stopping"))
        return work.future

    def _fill(self, work: Work, lane: Lane, items: list[Item]) -> None:
        n_tokens = sum(item.n_tokens for item in items)
        self.n_tokens += n_tokens - work.n_tokens
        work.lane, work.items, work.n_tokens, work.results = lane, items, n_tokens, [None] * len(items)

    def run_here(self, work: Work, lane: Lane, items: list[Item]) -> bool:
        """Computes a reserved work in the calling thread if possible. Returns whether it did; then the future is done.

        It does so if nothing else waits or runs, and if batches of that size have taken less than HERE_SECONDS. Two
        switches of threads would then cost more than they gain.
        """
        if self._compute_here is None or not items:
            return False
        seconds = self._seconds.get(_size(lane, sum(item.n_tokens for item in items)), math.inf)
        if seconds > HERE_SECONDS or not self._worker.begin_here():
            return False
        try:
            started = time.perf_counter()
            results = self._try(self._compute_here, lane, items)
            if results is None or work.future.done():
                return False
            with self._changed:
                self._fill(work, lane, items)
            self._finish([(work, i) for i in range(len(items))], results, time.perf_counter() - started)
            return True
        finally:
            self._worker.end_here()

    @property
    def waits(self) -> bool:
        """Tells whether there is a batch to compute."""
        return bool(self._lanes)

    def next_batch(self) -> Callable[[], None]:
        """Returns a function that computes the next batch."""
        return partial(self._run, *self._pick())

    def stop(self) -> None:
        """Accepts no more work."""
        self._closing = True

    def close(self, seconds: float = 60.0) -> None:
        """Computes all queued items, and ends the worker."""
        self._worker.close(seconds)

    def _seconds_to_wait(self) -> int:
        seconds = self.n_tokens / self._tokens_per_second if self._tokens_per_second else 1.0
        return min(max(1, math.ceil(seconds)), 60)

    def _release(self, work: Work) -> None:
        with self._changed:
            self.n_tokens -= work.n_tokens
            waiting = self._lanes.get(work.lane)
            if waiting is not None and work in waiting:
                waiting.remove(work)
                if not waiting:
                    del self._lanes[work.lane]

    def _run(self, lane: Lane, picked: Picked) -> None:
        started = time.perf_counter()
        results = self._results(lane, [work.items[place] for work, place in picked])
        self._finish(picked, results, time.perf_counter() - started)

    def _finish(self, picked: Picked, results: list[Any], seconds: float) -> None:
        """Passes on the results of a batch, and records its time."""
        n_tokens = sum(work.items[place].n_tokens for work, place in picked)
        rate, size = n_tokens / max(seconds, 1e-6), _size(picked[0][0].lane, n_tokens)
        self._tokens_per_second += (rate - self._tokens_per_second) * (0.1 if self._tokens_per_second else 1.0)
        self._seconds[size] = self._seconds.get(size, seconds) * 0.8 + seconds * 0.2
        self._on_batch(len(picked), n_tokens)
        for (work, place), result in zip(picked, results, strict=True):
            work.results[place] = result
            work.n_finished += 1
            if work.n_finished == len(work.items):
                _resolve(work)

    def _pick(self) -> tuple[Lane, Picked]:
        """Removes the items of the next batch from the queue."""
        lane, waiting = next(iter(self._lanes.items()))
        picked: Picked = []
        n_tokens = 0
        while waiting:
            work = waiting[0]
            n_tokens += work.items[work.n_started].n_tokens
            if picked and n_tokens > self._token_budget:
                break
            picked.append((work, work.n_started))
            work.n_started += 1
            waiting.popleft()
            if work.n_started < len(work.items):
                waiting.append(work)
        if waiting:
            self._lanes.move_to_end(lane)
        else:
            del self._lanes[lane]
        return lane, picked

    def _results(self, lane: Lane, items: list[Item]) -> list[Any]:
        """Returns a result or an exception for each item. An item that cannot be computed fails alone."""
        results = self._try(self._compute, lane, items)
        assert results is not None
        return results

    def _try(self, compute: Callable[[Lane, list[Item]], list[Any] | None], lane: Lane, items: list[Item]) -> Any:
        try:
            return compute(lane, items)
        except Exception as error:
            log_exception("batch failed", error, n_items=len(items))
            if len(items) == 1:
                return [error]
        return [self._results(lane, [item])[0] for item in items]


def _size(lane: Lane, n_tokens: int) -> tuple[str, int]:
    """Returns a key that is equal for batches with similar times."""
    return lane.task, n_tokens.bit_length()


def _resolve(work: Work) -> None:
    """Passes the results on, unless the caller has cancelled."""
    if work.future.set_running_or_notify_cancel():
        work.future.set_result(work.results)


def log_exception(event: str, error: BaseException, **fields: Any) -> None:
    """Logs the type and the place of an error, without its message, which could contain a caller's text."""
    frame, where = error.__traceback__, ""
    while frame is not None:
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    logger.error(event, extra={"fields": {"error": type(error).__name__, "where": where, **fields}})
