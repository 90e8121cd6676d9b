"""This module captures and replays CUDA graphs; it holds all code for CUDA's captures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Replayable(Protocol):
    def replay(self) -> None: ...


class Capturer(Protocol):
    """A `Capturer` captures graphs on a device. `function` works only on static memory, and returns nothing."""

    def begin(self, memory: Sequence[Tensor]) -> None:
        """Makes the current stream wait for the last `end`, before it uses the static memory."""

    def end(self) -> None:
        """Marks the end of the current stream's use of the static memory."""

    def finish(self) -> None:
        """Waits, on the host, for the last `end`; after that the graphs may be deleted."""

    def capture(self, function: Callable[[], None]) -> Replayable:
        """Captures the launches of the function, which may also run. Errors are RuntimeErrors."""


class _Streams:
    """The streams of one GPU on which this process captures: one to run on before, and one for each living capturer.

    cuBLAS keeps a workspace of up to 32 MiB for every stream it ever saw, and graphs that were captured on a stream
    write to that stream's workspace when they run. So streams are used again, which bounds the memory, and no two
    living capturers have the same one, since their graphs may run at the same time.
    """

    def __init__(self) -> None:
        self.aside = torch.cuda.Stream()
        self.known = [self.aside]
        self.free: list[tuple[torch.cuda.Stream, torch.cuda.Event | None]] = []

    def take(self) -> tuple[torch.cuda.Stream, torch.cuda.Event | None]:
        """Returns a stream for captures, and the event after the earlier graphs of this stream."""
        if self.free:
            return self.free.pop()
        for _ in range(64):  # PyTorch has 32, and gives them out again from the first
            stream = torch.cuda.Stream()
            if stream not in self.known:
                self.known.append(stream)
                return stream, None
        raise RuntimeError(f"each of the {len(self.known)} streams of this GPU is used by the graphs of another model")


@functools.cache
def _streams(device: int, make: type) -> _Streams:
    """Returns the streams of the current device, whose index is given. make: torch.cuda.Stream, or a stand-in."""
    return _Streams()


class CudaCapturer:
    """This class captures as PyTorch's notes on CUDA semantics require: a run, then a capture, on side streams.

    Each capturer has its own memory pool, because graphs with the same pool must not run at the same time. Streams come
    from `_Streams`; the stream for captures is given back when the capturer is deleted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._streams: _Streams | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __del__(self) -> None:
        if self._streams is not None and self._stream is not None:
            self._streams.free.append((self._stream, None if self._last is None else self._last[1]))

    def begin(self, memory: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        for tensor in memory:
            tensor.record_stream(stream)  # should the model go while this stream still works

    def end(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event() if self._last is None else self._last[1]
        event.record(stream)
        self._last = stream, event

    def finish(self) -> None:
        if self._last is not None:
            self._last[1].synchronize()

    def capture(self, function: Callable[[], None]) -> Replayable:
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            if self._streams is None:
                index = self.device.index if self.device.index is not None else torch.cuda.current_device()
                self._streams = _streams(index, torch.cuda.Stream)
            if self._stream is None:
                self._stream, others_last = self._streams.take()
                self._pool = torch.cuda.graph_pool_handle()
                if others_last is not None:
                    before.wait_event(others_last)
            aside, capturing = self._streams.aside, self._stream
            try:
                # Whatever is made at a first use (modules, handles, workspaces) is made here, outside of the capture.
                aside.wait_stream(before)
                with torch.cuda.stream(aside):
                    function()
                before.wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                # The stream is always the same, as a shared pool wants it. Other threads may allocate meanwhile.
                with torch.cuda.graph(graph, self._pool, capturing, capture_error_mode="thread_local"):
                    function()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
        return graph


def capturer(device: torch.device) -> Capturer | None:
    """Returns the capturer for this device, or None; without one, batches are not padded to buckets either."""
    return CudaCapturer(device) if device.type == "cuda" and torch.version.hip is None else None
