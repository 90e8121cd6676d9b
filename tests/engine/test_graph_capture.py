"""A capture may fail, run in several threads, and meet other streams."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastbert
import fastbert.models.bert
from fastbert.engine import capture
from fastbert.ops import Policy
from graph_cases import (
    StandIn,
    cheap,
    encode,
    make,
    packed,
    random_lengths,
    without_graphs,
)

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


def test_a_capture_that_fails(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, silence, or a try at every batch where a driver cannot capture."""
    stand_in = StandIn(RuntimeError("operation not permitted when stream is capturing"))
    monkeypatch.setattr(capture, "capturer", lambda device: stand_in)
    model = make(device)
    with caplog.at_level(logging.WARNING, "fastbert"):
        first = encode(model, [9, 4])
        assert torch.equal(encode(model, [9, 4]), first)
    assert len(caplog.records) == 1 and "operation not permitted" in caplog.text
    stand_in.error = None
    assert torch.equal(first, without_graphs(model, [9, 4])) and stand_in.captures == 0
    report = fastbert.warmup(model, max_tokens=40)
    assert report.buckets == (32, 64) and not report.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_up_captures_every_kind_of_batch(dtype: torch.dtype, stand_in: StandIn, device: torch.device) -> None:
    """Catches a batch that takes the plain path after a warm-up, because its tiles are smaller or more than others'."""
    model = make(device).to(dtype)
    cheap(model)
    for max_tokens in (288, 1152):
        fastbert.warmup(model, max_tokens=max_tokens)
        captures, small, large = stand_in.captures, max_tokens - 24, [200] * (max_tokens // 200)
        for lengths in ([1, 65] * (max_tokens // 66), [20] * (small // 20), large, [1, 129] * (max_tokens // 130)):
            replays = stand_in.replays
            encode(model, lengths)
            assert (stand_in.captures, stand_in.replays) == (captures, replays + 1), lengths
    assert len(model.engine.graphs) > (1 if dtype == torch.float32 else 2) * len(model.engine.graphs.captured())


def test_errors_of_the_model(stand_in: StandIn, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a strict policy's error, or one of mixed dtypes, taken for a driver that cannot capture."""
    relu = make(device, hidden_act="relu")
    mixed = make(device)
    mixed.encoder.layer[0].intermediate.dense.double()
    mixed.policy = Policy("triton")
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            with pytest.raises(fastbert.BackendError, match="no Triton kernel for 'relu'"):
                encode(relu, [9, 4])
            with pytest.raises(TypeError, match="expected one dtype"):
                encode(mixed, [9, 4])
    assert "CUDA graphs" not in caplog.text and not stand_in.busy


def test_threads(stand_in: StandIn, device: torch.device) -> None:
    """Catches a thread's batch in another thread's static memory."""
    model = make(device)
    cheap(model)
    cases = [(random_lengths(seed, 1500), seed) for seed in range(120)]
    with ThreadPoolExecutor(6) as pool:
        outs = list(pool.map(lambda case: encode(model, *case), cases))
    for (lengths, seed), out in zip(cases, outs, strict=True):
        assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
    assert stand_in.captures == len(model.engine.graphs), "two threads captured the same bucket"


def test_two_models_capture_one_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two captures at a time in one process, which CUDA forbids."""
    inside, most = [0], [0]
    guard = threading.Lock()

    class Counting(StandIn):
        def capture(self, function: Callable[[], None]) -> Any:
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            captured = super().capture(function)
            threading.Event().wait(0.002)
            with guard:
                inside[0] -= 1
            return captured

    monkeypatch.setattr(capture, "capturer", lambda device: Counting())
    models = [make(device) for _ in range(3)]
    for model in models:
        cheap(model)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda model: [encode(model, [n]) for n in (20, 50, 100, 180)], models))
    assert most[0] == 1 and all(len(model.engine.graphs) == 5 for model in models)


class FakeStream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def test_another_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that writes to the static memory while another still copies a result out of it."""
    streams = [FakeStream(), FakeStream()]
    current = [streams[0]]
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("finished")

    class Memory:
        def record_stream(self, stream: Any) -> None:
            recorded.append((self, stream))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    memory: Any = Memory()
    capturer = capture.CudaCapturer(torch.device("cuda", 0))
    capturer.finish()
    for stream, n_waits in ((streams[0], 0), (streams[0], 0), (streams[1], 1), (streams[1], 1), (streams[0], 2)):
        current[0] = stream
        capturer.begin([memory])
        capturer.end()
        assert len(streams[0].waited) + len(streams[1].waited) == n_waits
    used = [streams[0], streams[0], streams[1], streams[1], streams[0]]
    assert recorded == [entry for stream in used for entry in ((memory, stream), stream)]
    capturer.finish()
    assert recorded[-1] == "finished"


@pytest.mark.parametrize("fails", [False, True], ids=["captures", "fails"])
def test_the_order_of_a_capture(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a capture of what never ran, or on the stream it ran on, in another pool, or one that keeps a stream."""
    log: list[Any] = []
    current = ["caller's"]
    streams = iter(["aside", "capturing"])

    class Stream:
        def __init__(self, name: str | None = None) -> None:
            self.name = name or next(streams)

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Inside:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream.name

        def __exit__(self, *args: Any) -> None:
            current[0] = self.before

    class Capture(Inside):
        def __init__(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> None:
            super().__init__(stream)
            log.append((pool, capture_error_mode))

        def __exit__(self, *args: Any) -> None:
            if fails:  # as torch.cuda.graph does, which then leaves its stream current
                raise RuntimeError("capture failed")
            super().__exit__()

    class Device:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: Any) -> None: ...

    fakes = {
        "device": Device, "Stream": Stream, "stream": Inside, "graph": Capture, "CUDAGraph": object,
        "graph_pool_handle": lambda: "pool", "current_stream": lambda: Stream(current[0]),
        "set_stream": lambda stream: current.__setitem__(0, stream.name),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capturer = capture.CudaCapturer(torch.device("cuda", 0))
    first = ["aside waits for caller's", "aside", "caller's waits for aside", ("pool", "thread_local"), "capturing"]
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="capture failed"):
                capturer.capture(lambda: log.append(current[0]))
        else:
            capturer.capture(lambda: log.append(current[0]))
        assert current == ["caller's"]
    assert log == first * 2
