"""One caller of a short text is answered without a change of thread, where nobody else is kept waiting by it."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbert.serving import batcher as batching
from fastbert.serving import later
from fastbert.serving.batcher import Batcher
from fastbert.serving.limits import Limits
from fastbert.serving.service import Service, Settings
from fastbert.serving.work import Item, Lane
from fastbert.serving.worker import Worker
from serving_cases import TEXTS, client_of, figure, loaders, save_models, wait_until

LANE = Lane("embed")
HERE = threading.current_thread


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


def items_of(*lengths: int) -> list[Item]:
    return [Item(torch.full((n,), n), torch.zeros(n, dtype=torch.int64), [n]) for n in lengths]


def results_of(batcher: Batcher, *lengths: int) -> tuple[bool, list[Any]]:
    """Whether a work ran in this thread, and its results, wherever they were computed."""
    work, items = batcher.reserve(sum(lengths)), items_of(*lengths)
    ran_here = batcher.run_here(work, LANE, items)
    results = (work.future if ran_here else batcher.submit(work, LANE, items)).result(30)
    wait_for(batcher)
    return ran_here, results


def wait_for(batcher: Batcher) -> None:
    """Waits for the end of a batch whose results have been handed over."""
    wait_until(batcher._worker.begin_here)
    batcher._worker.end_here()


def test_a_short_batch_runs_in_the_callers_thread() -> None:
    """Catches a batch of unknown or long duration that holds the event loop, and one that is not counted."""
    threads, batches, seconds = [], [], 0.0

    def compute(lane: Lane, items: list[Item]) -> list[Any]:
        threads.append(HERE())
        time.sleep(seconds)
        if any(item.n_tokens == 3 for item in items):
            raise RuntimeError
        return [item.n_tokens for item in items]

    batcher = Batcher(compute, 100, 100, lambda *sizes: batches.append(sizes), compute)
    assert [results_of(batcher, 2, 2) for _ in range(3)] == [(False, [2, 2]), (True, [2, 2]), (True, [2, 2])]
    assert threads[0] is not HERE() and threads[1:] == [HERE()] * 2 and batches == [(2, 4)] * 3
    assert results_of(batcher, 40)[0] is False, "nobody knows how long that takes"
    ran_here, (result, error) = results_of(batcher, 2, 3)
    assert ran_here and result == 2 and isinstance(error, RuntimeError), "a text that fails fails alone"
    seconds = 1.5 * batching.HERE_SECONDS
    while results_of(batcher, 4)[0]:
        assert len(threads) < 100
    assert results_of(batcher, 4)[0] is False and batcher.n_tokens == 0
    batcher.close()
    assert batcher.run_here(batcher.reserve(4), LANE, items_of(4)) is False


def test_nothing_runs_here_while_the_worker_is_busy() -> None:
    """Catches two batches at once, a batch that overtakes what waits, and a worker that sleeps on when it may go on."""
    gate, entered = threading.Event(), threading.Event()

    def slow(lane: Lane, items: list[Item]) -> list[Any]:
        entered.set()
        assert gate.wait(30)
        return [item.n_tokens for item in items]

    worker = Worker()
    busy = Batcher(slow, 100, 100, worker=worker)
    quick = Batcher(lambda lane, items: [None], 100, 100, compute_here=lambda lane, items: [1], worker=worker)
    assert results_of(quick, 2) == (False, [None]) and results_of(quick, 2) == (True, [1])
    running = busy.submit(busy.reserve(5), LANE, items_of(5))
    assert entered.wait(30)
    work = quick.reserve(2)
    assert not quick.run_here(work, LANE, items_of(2)), "another model computes"
    gate.set()
    assert running.result(30) == [5] and quick.submit(work, LANE, items_of(2)).result(30) == [None]
    wait_until(worker.begin_here)  # the worker has handed its results over, but may not have ended its batch yet
    waiting = busy.submit(busy.reserve(1), LANE, items_of(1))
    time.sleep(0.01)
    assert not waiting.done() and not worker.begin_here()
    worker.end_here()
    assert waiting.result(30) == [1]
    worker.close(30)
    assert not worker.alive and not busy.alive


def test_batchers_of_a_worker_take_turns() -> None:
    """Catches a model that waits until another one has nothing left to do, and a call whose error is lost."""
    order: list[str] = []
    worker = Worker()

    def named(name: str) -> Batcher:
        def compute(lane: Lane, items: list[Item]) -> list[Any]:
            order.append(name)
            return [0] * len(items)

        return Batcher(compute, 1, 100, worker=worker)

    a, b = named("a"), named("b")
    assert worker.begin_here()
    futures = [each.submit(each.reserve(2), LANE, items_of(1, 1)) for each in (a, a, b)]
    worker.end_here()
    assert [future.result(30) for future in futures] == [[0, 0]] * 3 and order[:4] == ["a", "b", "a", "b"]
    assert worker.call(HERE) is not HERE()
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert worker.alive
    worker.close(30)


def test_who_is_the_only_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a caller who holds the event loop while another one waits for it."""
    now = 100.0
    monkeypatch.setattr("fastbert.serving.service.time.perf_counter", lambda: now)
    service = Service({})
    assert service.is_only_caller("a") and service.is_only_caller("a")
    now += 0.01
    assert not service.is_only_caller("b") and not service.is_only_caller("b")
    now += 0.05
    assert not service.is_only_caller("b")
    now += 0.06
    assert service.is_only_caller("b"), "the other one has not asked for a while"
    now += 0.2
    assert service.is_only_caller("c"), "a new connection, long after the last one"


def test_models_on_a_cpu_share_a_thread(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second group of OpenMP's threads: where models are loaded, warmed up, or where another one computes."""
    threads: list[str] = []

    def noted(function: Any) -> Any:
        def note(*args: Any) -> Any:
            threads.append(HERE().name)
            return function(*args)

        return note

    monkeypatch.setattr("fastbert.serving.service.warmup", noted(lambda model: None))
    service = Service({name: noted(load) for name, load in loaders(models, "encoder", "reranker").items()})
    with client_of(service) as client:
        for name, model in service.models.items():
            monkeypatch.setattr(model, "_compute", noted(model._compute))
            service.batchers[name]._compute_here = None
        for path, body in (("/embed", {"inputs": "fish"}), ("/rerank", {"query": "a", "texts": ["b"]})):
            assert [client.post(path, json=body).status_code for _ in range(3)] == [200] * 3
    assert threads == ["fastbert-cpu"] * 10


def test_answers_are_the_same_wherever_they_are_computed(models: SimpleNamespace) -> None:
    """Catches bits, or figures, that depend on the thread; and a caller who waits longer than was allowed."""
    service = Service(loaders(models, "encoder"))
    with client_of(service) as client:
        model, ran = service.models["encoder"], []
        compute_here: Any = model.compute_here

        def here(lane: Any, items: Any) -> Any:
            results = compute_here(lane, items)
            ran.append(results is not None)
            return results

        batcher = service.batchers["encoder"]
        batcher._compute_here = here
        answers = []
        for _ in range(4):
            answers.append(client.post("/embed", json={"inputs": TEXTS[0]}).json())
            wait_for(batcher)
            batcher._seconds.update(dict.fromkeys(batcher._seconds, 0.001))  # however busy this machine is
        assert answers == [answers[0]] * 4 and len(ran) == 3 and (torch.get_num_threads() > 1 or all(ran))
        page = client.get("/metrics").text
        n_tokens = model.encode(LANE, TEXTS[:1]).n_tokens
        for name, value in (("batch_texts", 4), ("texts", 4), ("tokens", 4 * n_tokens), ("requests", 4)):
            assert figure(page, f"fastbert_{name}_total") == value, name
        assert figure(page, "fastbert_requests_in_flight") == 0


def test_what_is_done_later_is_done() -> None:
    """Catches a log line or a figure that never comes, or comes twice."""
    done: list[int] = []

    async def run() -> None:
        soon = later.Later()
        for i in range(3):
            soon.add(done.append, i)
            soon.soon()
        assert not done
        await asyncio.sleep(2 * later.SECONDS)
        assert done == [0, 1, 2]
        soon.add(done.append, 3)
        soon.soon()
        soon.now()
        assert done == [0, 1, 2, 3], "whoever reads the figures does not wait"
        await asyncio.sleep(2 * later.SECONDS)

    asyncio.run(run())
    assert done == [0, 1, 2, 3]


def test_time_that_passes_here_counts(models: SimpleNamespace) -> None:
    """Catches an answer that is late, and said to be in time."""
    service = Service(loaders(models, "encoder"), Settings(Limits(seconds=0.3)))
    with client_of(service) as client:
        assert client.post("/embed", json={"inputs": "fish"}).status_code == 200
        batcher = service.batchers["encoder"]
        wait_for(batcher)
        batcher._seconds.update(dict.fromkeys(batcher._seconds, 0.001))  # however busy this machine is

        def slow(lane: Lane, items: list[Item]) -> list[Any]:
            time.sleep(0.4)
            return [None]

        batcher._compute_here = slow
        assert client.post("/embed", json={"inputs": "fish"}).status_code == 504
