"""A block of a task ends for one of several reasons, or by itself, and leaves nothing behind."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fastbert.serving import answers
from fastbert.serving.interruption import Interruption


class Late(Exception):
    pass


class Gone(Exception):
    pass


async def end(seconds: float, late: float, unwatched: float, gone: asyncio.Event) -> str:
    with Interruption() as interrupt:
        interrupt.later(late, Late())
        interrupt.watch(unwatched, gone.wait, Gone())
        await asyncio.sleep(seconds)
    return "done"


def test_the_first_reason_is_raised() -> None:
    """Catches a wait that nothing ends, a reason that hides another, and a task that stays cancelled afterwards."""

    async def run() -> None:
        gone = asyncio.Event()
        assert await end(0.0, 60, 60, gone) == "done"
        with pytest.raises(Late):
            await end(60, 0.01, 60, gone)
        gone.set()
        with pytest.raises(Gone):
            await end(60, 60, 0.01, gone)
        with pytest.raises(Gone):
            await end(60, 0.2, 0.0, gone)
        await asyncio.sleep(0.01)  # raises where the task is still to be cancelled
        assert len(asyncio.all_tasks()) == 1, "a watcher is left"

    asyncio.run(run())


def test_errors_and_cancellation_pass_through() -> None:
    """Catches a stop of the server, or an error of a request, that is taken for a caller who has gone."""

    async def failing() -> None:
        with Interruption() as interrupt:
            interrupt.later(60, Late())
            raise ValueError("mine")

    async def run() -> None:
        with pytest.raises(ValueError, match="mine"):
            await failing()
        task = asyncio.create_task(end(60, 60, 0.0, asyncio.Event()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_both_writers_of_json_write_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer that depends on which of two modules is installed."""
    import json

    answer = {
        "vector": [0.1, 1e-05, -3.4028234663852886e38, 1 / 3],
        "text": '물 \x1f"\\',
        "labels": {0: "bad"},
        "n": None,
        "rows": [],
        "data": [{"a": 1}, {"a": 2}],
    }
    vectors = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    arrays = {"arrays": [answers.numbers(vector) for vector in vectors.T], "empty": [vectors[:0, :0]]}
    expected = {**answer, "labels": {"0": "bad"}, "arrays": vectors.T.tolist(), "empty": [[]]}
    first = answers.dump({**answer, **arrays})
    pieces = answers.dump_in_pieces({**answer, **arrays})
    monkeypatch.setattr(answers, "orjson", None)
    assert json.loads(first) == json.loads(pieces) == json.loads(answers.dump({**answer, **arrays})) == expected
