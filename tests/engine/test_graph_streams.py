"""Captures take streams and pools of memory from CUDA in order, as stand-ins for torch.cuda's classes show."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from fastbert.engine import capture, graphs

DEVICE = torch.device("cuda", 0)


class Cuda:
    """What torch.cuda gives: 32 streams, in turn, for each device; pools; captures, with where they went."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outer = self
        self.numbers = count()
        self.captures: list[tuple[int, int]] = []  # (stream, pool)
        self.waits: list[Any] = []

        class Stream:
            def __init__(self, number: int | None = None) -> None:
                self.number = next(outer.numbers) % 32 if number is None else number

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and other.number == self.number

            __hash__ = None  # type: ignore[assignment]

            def wait_stream(self, other: Any) -> None: ...

            def wait_event(self, event: Any) -> None:
                outer.waits.append(event)

        class Event:
            def record(self, stream: Any) -> None: ...
            def synchronize(self) -> None: ...

        self.current: Any = Stream(-1)

        @contextmanager
        def inside(*args: Any) -> Any:
            yield

        def capture(graph: Any, pool: int, stream: Any, capture_error_mode: str) -> Any:
            self.captures.append((stream.number, pool))
            return inside()

        pools = count()
        fakes = {
            "Stream": Stream, "Event": Event, "device": inside, "stream": inside, "graph": capture, "CUDAGraph": object,
            "graph_pool_handle": lambda: next(pools), "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: None,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @property
    def n_streams(self) -> int:
        return next(self.numbers)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def use(capturer: capture.CudaCapturer) -> None:
    """Does what `Graphs.run` does around a capture and a replay."""
    capturer.begin([])
    capturer.capture(lambda: None)
    capturer.end()


def test_a_hundred_new_capturers_take_two_streams(cuda: Cuda) -> None:
    """Catches streams that are made anew after each change of weights, with 32 MiB of workspace each, for ever."""
    for _ in range(100):
        capturer = capture.CudaCapturer(DEVICE)
        use(capturer)
        capturer.finish()
        del capturer
    assert cuda.n_streams == 2
    assert len({stream for stream, _ in cuda.captures}) == 1


def test_clearing_graphs_takes_no_new_streams(cuda: Cuda) -> None:
    """Catches graphs that keep their capturer when they are dropped, or drop it and its stream with it."""
    model_graphs = graphs.Graphs()
    for _ in range(10):
        model_graphs._capturer = capture.CudaCapturer(DEVICE)
        use(model_graphs._capturer)
        model_graphs.clear()
    assert cuda.n_streams == 2


def test_living_capturers_share_no_stream_and_no_pool(cuda: Cuda) -> None:
    """Catches two models whose graphs write to one workspace, or to one pool of memory, when they run at once."""
    capturers = [capture.CudaCapturer(DEVICE) for _ in range(31)]
    for capturer in [*capturers, *reversed(capturers)]:
        use(capturer)
    streams, pools = ({capture[i] for capture in cuda.captures} for i in (0, 1))
    assert len(streams) == len(pools) == 31 and len(set(cuda.captures)) == 31
    with pytest.raises(RuntimeError, match="each of the 32 streams of this GPU is used"):
        use(capture.CudaCapturer(DEVICE))
    last = capturers.pop()
    del last, capturer
    gc.collect()
    use(capture.CudaCapturer(DEVICE))  # there is one again


def test_pools_are_not_used_again(cuda: Cuda) -> None:
    """Catches a capture into a pool that has no graph any more, which PyTorch may have freed."""
    pools = []
    for _ in range(3):
        capturer = capture.CudaCapturer(DEVICE)
        use(capturer)
        use(capturer)
        pools += [pool for _, pool in cuda.captures[-2:]]
        del capturer
    assert pools == [0, 0, 1, 1, 2, 2]


def test_a_stream_is_taken_over_in_order(cuda: Cuda) -> None:
    """Catches a workspace written by a new model's graph while the last one of a model that has gone still runs."""
    first = capture.CudaCapturer(DEVICE)
    use(first)
    assert first._last is not None
    event = first._last[1]
    del first
    use(capture.CudaCapturer(DEVICE))
    assert cuda.waits == [event]


def test_devices_have_streams_of_their_own(cuda: Cuda) -> None:
    """Catches a capture on one GPU that takes a stream of another."""
    for index in (0, 1, 0, 1):
        use(capture.CudaCapturer(torch.device("cuda", index)))
    assert cuda.n_streams == 4
    assert [stream for stream, _ in cuda.captures] == [1, 3, 1, 3]
