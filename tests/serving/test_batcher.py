"""A Batcher fills batches across callers, in turns, and no caller's mistake reaches another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastbert.serving.batcher import Batcher
from fastbert.serving.errors import ApiError
from fastbert.serving.work import Item, Lane, join, split
from serving_cases import wait_until

LANE, OTHER = Lane("embed"), Lane("embed", normalize=True)


def items_of(*lengths: int) -> list[Item]:
    return [Item(torch.full((n,), n), torch.zeros(n, dtype=torch.int64), [n]) for n in lengths]


class Model:
    """A Model stands in for a model: it notes its batches, and its first batch waits until the gate is open."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[tuple[Lane, list[int]]] = []
        self.bad: set[int] = set()

    def __call__(self, lane: Lane, items: list[Item]) -> list[Any]:
        self.entered.set()
        assert self.gate.wait(30)
        lengths = [item.n_tokens for item in items]
        self.batches.append((lane, lengths))
        if self.bad & set(lengths):
            raise RuntimeError("a secret text")
        return lengths


@contextmanager
def batcher_of(model: Model, budget: int = 10, capacity: int = 100) -> Iterator[Batcher]:
    batcher = Batcher(model, budget, capacity)
    try:
        yield batcher
    finally:
        model.gate.set()
        batcher.close(30)
        assert not batcher.alive and batcher.n_tokens == 0


def submit(batcher: Batcher, *lengths: int, lane: Lane = LANE) -> Any:
    return batcher.submit(batcher.reserve(sum(lengths)), lane, items_of(*lengths))


def test_batches_take_turns_among_callers_and_lanes() -> None:
    """Catches a batch over the budget, one of two lanes, and a caller of one text who waits for another's long list."""
    model = Model()
    with batcher_of(model) as batcher:
        first = submit(batcher, 1)
        assert model.entered.wait(30)
        long = submit(batcher, 4, 4, 4, 4, 4, 30)
        short, other = submit(batcher, 2), submit(batcher, 3, 3, lane=OTHER)
        model.gate.set()
        results = [future.result(30) for future in (first, long, short, other)]
    assert results == [[1], [4, 4, 4, 4, 4, 30], [2], [3, 3]]
    assert model.batches == [
        (LANE, [1]), (LANE, [4, 2, 4]), (OTHER, [3, 3]), (LANE, [4, 4]), (LANE, [4]), (LANE, [30]),
    ]  # fmt: skip


def test_a_full_queue_refuses_one_text_as_it_refuses_a_list() -> None:
    """Catches a queue that takes a list where it refuses a single text, and one that lets a request grow past it."""
    model = Model()
    with batcher_of(model, capacity=20) as batcher:
        running = submit(batcher, 12)
        for lengths in ((9,), (3, 3, 3), (1,) * 9):
            with pytest.raises(ApiError, match="12 of 20 tokens") as error:
                submit(batcher, *lengths)
            assert error.value.status == 429 and int(error.value.headers["Retry-After"]) >= 1
        fits = [submit(batcher, 4), submit(batcher, 2, 2)]
        model.gate.set()
        assert running.result(30) == [12] and [future.result(30) for future in fits] == [[4], [2, 2]]
        wait_until(lambda: batcher.n_tokens == 0)
        assert batcher.reserve(1000).future.cancel(), "more than there is room for waits for an empty queue"


def test_a_cancelled_work_leaves_the_queue() -> None:
    """Catches texts that are computed for a caller who has gone, and room in the queue that is never free again."""
    model = Model()
    with batcher_of(model) as batcher:
        running = submit(batcher, 1)
        assert model.entered.wait(30)
        gone, stays = submit(batcher, 5, 5), submit(batcher, 7)
        assert batcher.n_tokens == 18
        assert gone.cancel() and batcher.n_tokens == 8
        assert running.cancel(), "also while its batch runs"
        late = batcher.reserve(3)
        late.future.cancel()
        assert batcher.submit(late, LANE, items_of(3)).cancelled()
        model.gate.set()
        assert stays.result(30) == [7]
    assert model.batches == [(LANE, [1]), (LANE, [7])]


def test_a_text_that_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a thread that an exception ends, callers who get another's error, and a text in the log."""
    model = Model()
    model.gate.set()
    model.bad = {3}
    with batcher_of(model, budget=100) as batcher:
        futures = [submit(batcher, 1, 2), submit(batcher, 2, 3), submit(batcher, 4)]
        (one, two), (three, bad), (four,) = (future.result(30) for future in futures)
        assert (one, two, three, four) == (1, 2, 2, 4) and isinstance(bad, RuntimeError)
        assert batcher.alive and submit(batcher, 5).result(30) == [5]
    fields: Any = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert {each["error"] for each in fields} == {"RuntimeError"} and "secret" not in caplog.text + str(fields)


def test_closing_computes_what_waits() -> None:
    """Catches a stop that leaves callers without an answer, and work that is taken after it."""
    model = Model()
    with batcher_of(model) as batcher:
        futures = [submit(batcher, 5) for _ in range(6)]
        model.gate.set()
        batcher.close(30)
        assert [future.result(0) for future in futures] == [[5]] * 6
        with pytest.raises(ApiError, match="stopping"):
            submit(batcher, 1).result(0)


def test_items_are_rows_of_an_encoding() -> None:
    """Catches tokens that get into another row when encodings are split and joined."""
    items = [*items_of(2, 3), Item(torch.arange(5), torch.ones(5, dtype=torch.int64), [1, 4])]
    tokens = join(items)
    assert tokens.cu_seqlens.tolist() == [0, 2, 5, 6, 10] and tokens.cu_seqlens.dtype == torch.int32
    rows = split(tokens)
    assert [row.input_ids.tolist() for row in rows] == [[2, 2], [3, 3, 3], [0], [1, 2, 3, 4]]
    assert [row.token_type_ids.tolist() for row in rows] == [[0, 0], [0, 0, 0], [1], [1, 1, 1, 1]]
