"""A Loader makes the batches of a process in threads, ahead of the training loop.

Its result does not depend on the number of threads, because every batch is a function of the plan. One thread makes the
plan, one block of examples at a time. The others make the batches of the next steps.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from fastbert.checks import expect, positive
from fastbert.training.data.batch import Batch, Masking, make_batch
from fastbert.training.data.examples import TokenSource
from fastbert.training.data.plan import BLOCK_STEPS, Cursor, Plan, PlanStep
from fastbert.training.data.special import SpecialIds


@dataclass(frozen=True, eq=False)
class LoadedStep:
    """A LoadedStep holds the number of a step, the batches of one process, and the cursor of the next step."""

    step: int
    batches: list[Batch]
    after: Cursor


class Loader:
    """A Loader yields LoadedSteps without end. It is an iterator and a context manager.

    ``waited``: the seconds that its caller has waited for steps so far.
    """

    def __init__(
        self,
        corpus: TokenSource,
        plan: Plan,
        special: SpecialIds,
        masking: Masking,
        *,
        rank: int = 0,
        n_processes: int = 1,
        workers: int = 2,
        ahead: int = 4,
        start: Cursor | None = None,
    ) -> None:
        """Starts to make the steps from ``start`` on.

        ``rank``: the rank of this process among ``n_processes``. ``workers``: the number of threads that make batches;
        with 0, everything is made on request. ``ahead``: the number of steps to make in advance.

        Raises ValueError if the number of batches of a step is not a multiple of ``n_processes``.
        """
        n_processes = positive("n_processes", n_processes)
        expect(plan.n_batches % n_processes == 0, "n_processes", n_processes, f"a divisor of {plan.n_batches} batches")
        expect(0 <= rank < n_processes, "rank", rank, f"0 to {n_processes - 1}")
        expect(workers >= 0, "workers", workers, "0 or more")
        self.waited = 0.0
        self._mine = range(rank, plan.n_batches, n_processes)
        self._make = partial(_batch, corpus, special, masking, plan.seed)
        self._steps = plan.steps(start)
        self._step = (start or Cursor()).step
        self._ahead = positive("ahead", ahead)
        self._plans: deque[Future[PlanStep]] = deque()
        self._batches: deque[list[Future[Batch]]] = deque()
        self._planner = self._pool = None
        if workers:
            self._planner = ThreadPoolExecutor(1, "fastbert-plan")
            self._pool = ThreadPoolExecutor(workers, "fastbert-batches")
            weakref.finalize(self, _end, self._planner, self._pool)  # for a loader that is never closed
            self._fill()

    def __iter__(self) -> Iterator[LoadedStep]:
        return self

    def __next__(self) -> LoadedStep:
        """Returns the next step. Raises RuntimeError, with the number of the step, if the step cannot be made."""
        began = time.perf_counter()
        try:
            if self._pool is None:
                step = next(self._steps)
                batches = [self._make(lambda: step, i) for i in self._mine]
            else:
                if not self._plans:
                    raise ValueError("the loader is closed")
                step = self._plans[0].result()
                batches = [future.result() for future in self._batches[0]]
                self._plans.popleft()
                self._batches.popleft()
                self._fill()
        except Exception as error:
            self.close()
            raise RuntimeError(f"step {self._step}: {error}") from error
        finally:
            self.waited += time.perf_counter() - began
        self._step += 1
        return LoadedStep(step.cursor.step, batches, step.after)

    def close(self) -> None:
        """Ends the threads after their current work. May be called twice."""
        self._plans.clear()
        self._batches.clear()
        for pool in (self._planner, self._pool):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        """Submits the missing work. It plans one block ahead, so that examples are ready when the steps need them."""
        assert self._planner is not None and self._pool is not None
        while len(self._plans) < self._ahead + BLOCK_STEPS:
            self._plans.append(self._planner.submit(next, self._steps))
        while len(self._batches) < self._ahead:
            plan = self._plans[len(self._batches)]
            self._batches.append([self._pool.submit(self._make, plan.result, i) for i in self._mine])


def _end(*pools: ThreadPoolExecutor) -> None:
    """Cancels the work that is no longer needed."""
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


def _batch(
    corpus: TokenSource, special: SpecialIds, masking: Masking, seed: int, step: Callable[[], PlanStep], i: int
) -> Batch:
    """Makes batch ``i`` of a step, after its plan is ready."""
    plan = step()
    first_token = plan.first_tokens[i]
    return make_batch(
        corpus, plan.batches[i], special, seed=seed, step=plan.cursor.step, first_token=first_token, masking=masking
    )
