"""A loader gives the same steps with any number of threads and processes, and leaves none behind."""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest

from corpus_cases import SPECIAL, ListedCorpus, random_corpus
from fastbert.training.data.batch import Batch, Masking, make_batch
from fastbert.training.data.loader import LoadedStep, Loader
from fastbert.training.data.plan import Cursor, Plan

OPTIONS: dict[str, Any] = {"seed": 1, "tokens_per_step": 512, "tokens_per_batch": 128, "max_length": 64}
N = 80  # steps, more than a block


def loader_of(corpus: ListedCorpus, n_processes: int = 1, **options: Any) -> Loader:
    plan = Plan(corpus, n_processes=n_processes, **OPTIONS)
    return Loader(corpus, plan, SPECIAL, Masking(), n_processes=n_processes, **options)


def content(steps: list[LoadedStep]) -> list[Any]:
    """Everything that steps hold, in a form that can be compared."""
    names = list(Batch.__dataclass_fields__)
    return [
        (step.step, step.after, [[getattr(batch, name).tolist() for name in names] for batch in step.batches])
        for step in steps
    ]


def threads() -> list[str]:
    names = "fastbert-plan", "fastbert-batches"
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.fixture(scope="module")
def corpus() -> ListedCorpus:
    return random_corpus(300)


@pytest.fixture(scope="module")
def steps(corpus: ListedCorpus) -> list[LoadedStep]:
    """The first steps, made in the calling thread."""
    return list(islice(loader_of(corpus, workers=0), N))


def test_a_loader_makes_what_is_planned(corpus: ListedCorpus, steps: list[LoadedStep]) -> None:
    """Catches a batch of another step or place than the plan says, or one with the masks of another."""
    plan = Plan(corpus, **OPTIONS)
    for planned, loaded in zip(plan.steps(), steps[:40], strict=False):
        places = zip(planned.batches, planned.first_tokens, strict=True)
        batches = [
            make_batch(
                corpus, batch, SPECIAL, seed=1, step=planned.cursor.step, first_token=first_token, masking=Masking()
            )
            for batch, first_token in places
        ]
        assert content([LoadedStep(planned.cursor.step, batches, planned.after)]) == content([loaded])


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 4), (5, 9)])
def test_threads_do_not_change_the_steps(
    corpus: ListedCorpus, steps: list[LoadedStep], workers: int, ahead: int
) -> None:
    """Catches a batch that depends on which thread makes it, or when, and steps out of order."""
    with loader_of(corpus, workers=workers, ahead=ahead) as loader:
        assert content(list(islice(loader, N))) == content(steps)
    assert threads() == []


def test_processes_share_the_steps(corpus: ListedCorpus, steps: list[LoadedStep]) -> None:
    """Catches a batch that two processes compute, or none, and masks that the number of processes changes."""
    with loader_of(corpus, 2, rank=0) as first, loader_of(corpus, 2, rank=1) as second:
        parts = list(zip(islice(first, N), islice(second, N), strict=True))
    joined = []
    for a, b in parts:
        assert a.after == b.after and len(a.batches) == len(b.batches) == 2
        joined.append(LoadedStep(a.step, [a.batches[0], b.batches[0], a.batches[1], b.batches[1]], a.after))
    assert content(joined) == content(steps)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_another_stopped(corpus: ListedCorpus, steps: list[LoadedStep], workers: int) -> None:
    """Catches a cursor that is ahead of what was used, because more was made already."""
    for i in (1, 17, N - 3):
        with loader_of(corpus, workers=workers, start=steps[i - 1].after) as loader:
            assert content(list(islice(loader, 3))) == content(steps[i : i + 3])


class Broken(ListedCorpus):
    """A corpus in which the token ``bad`` cannot be read by the method ``name``."""

    bad, name = -1, ""

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        if self.name == "take" and ((starts <= self.bad) & (self.bad < starts + lengths)).any():
            raise OSError("shard 7 is gone")
        return super().take(starts, lengths)

    def sentence_starts(self, start: int, end: int) -> np.ndarray:
        if self.name == "sentence_starts" and start <= self.bad < end:
            raise OSError("shard 7 is gone")
        return super().sentence_starts(start, end)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("name", ["take", "sentence_starts"])
def test_an_error_comes_with_its_step(workers: int, name: str) -> None:
    """Catches an error of a thread that is lost, hangs the loop, or does not say which step it is about."""
    corpus = random_corpus(900)
    corpus.__class__ = Broken
    plan = Plan(corpus, nsp=False, **OPTIONS)
    n_first = len(plan.block(0, 0))
    number = n_first if name == "sentence_starts" else 3  # a block fails as a whole, with its first step
    bad = next(islice(plan.steps(), number, None)).batches[-1].starts[0]
    corpus.bad, corpus.name = int(bad), name
    loader = Loader(corpus, plan, SPECIAL, Masking(), workers=workers, start=Cursor(100, 0, 0, 0))
    with pytest.raises(RuntimeError, match=f"^step {100 + number}: shard 7 is gone") as caught:
        for _ in loader:
            pass
    assert isinstance(caught.value.__cause__, OSError)
    assert threads() == []


def test_no_thread_survives_an_early_end(corpus: ListedCorpus) -> None:
    """Catches threads that wait for ever for a consumer that has stopped, or a close that waits for them."""
    for n in (0, 1, 5):
        loader = loader_of(corpus, workers=3)
        for _ in islice(loader, n):
            pass
        loader.close()
        loader.close()
        assert threads() == []
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)
    loader = loader_of(corpus, workers=3)
    next(loader)
    del loader
    end = time.monotonic() + 30
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == []


class Slow(ListedCorpus):
    """A corpus that takes a while to read."""

    seconds = 0.0

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        time.sleep(self.seconds)
        return super().take(starts, lengths)


def test_steps_are_made_ahead_and_waiting_is_counted() -> None:
    """Catches a loader that begins to work only when it is asked, or does not say how long its user waited."""
    corpus = random_corpus(300)
    corpus.__class__ = Slow
    corpus.seconds = 0.02
    with loader_of(corpus, workers=0) as loader:
        next(loader)
        assert loader.waited >= 4 * 0.02
    with loader_of(corpus, workers=2, ahead=3) as loader:
        deadline = time.monotonic() + 30
        while not all(future.done() for step in loader._batches for future in step) and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(3):
            next(loader)
        assert loader.waited < 0.08


def test_wrong_ranks_are_refused(corpus: ListedCorpus) -> None:
    """Catches a process that computes batches of another, or a plan that was made for other processes."""
    plan = Plan(corpus, **OPTIONS)
    for options in ({"n_processes": 3}, {"n_processes": 2, "rank": 2}, {"workers": -1}, {"ahead": 0}):
        with pytest.raises(ValueError, match="got"):
            Loader(corpus, plan, SPECIAL, Masking(), **options)
    assert threads() == []
