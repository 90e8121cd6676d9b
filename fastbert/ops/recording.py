"""This module records the decisions of operations, for `fastbert.explain` and for tests.

    with recording.recorded() as recorder:
        model(input_ids)
    recorder.records

An operation calls `note` with its decision if its thread has a recorder. In a dry run it then returns an empty result
instead of computing one. A dry run logs nothing, raises no BackendError, and launches no kernel. Its tensors are
`StandIn` tensors, which have a shape, a dtype and the device of the recorder.

Operations read `on` first, so that the recording costs nothing when it is off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

on = 0  # the number of recorders in the process
_lock = threading.Lock()


@dataclass(frozen=True)
class Record:
    """A `Record` holds the decision of an operation.

    reason: why the backend is not the requested one, or why the operation is refused. raises: whether a call raises
    BackendError. before and after: the shapes of its input and output; before is None for ids. facts: other decisions,
    such as the selected matrix product, and arguments that select a kernel. module: the name of its module, in a dry
    run.
    """

    op: str
    backend: str
    reason: str | None
    raises: bool
    before: Shape | None
    after: Shape
    dtype: torch.dtype
    facts: Mapping[str, Any]
    module: str = field(default="", compare=False)


@dataclass
class Recorder:
    """A `Recorder` collects the records of one thread.

    dry: whether operations only decide. device: the device of a dry run. arch: the compute capability of its GPU, which
    need not be present. names: the names of modules and weights, by their id. place: the name of the module that is
    running.
    """

    dry: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    arch: int | None = None
    names: dict[int, str] = field(default_factory=dict)
    place: str = ""
    records: list[Record] = field(default_factory=list)
    _reasons: dict[str, tuple[str | None, bool]] = field(default_factory=dict)  # op -> the reason, whether it raises

    def add(
        self, op: str, backend: str, before: Shape | None, after: Shape, dtype: torch.dtype, weight: Any, facts: Any
    ) -> None:
        reason, raises = self.take_reason(op)
        module = self.names.get(id(weight), self.place)
        before = None if before is None else tuple(before)
        self.records.append(Record(op, backend, reason, raises, before, tuple(after), dtype, facts, module))

    def take_reason(self, op: str) -> tuple[str | None, bool]:
        """Returns the reason that was kept for the operation, and whether it raises."""
        return self._reasons.pop(op, (None, False))

    def set_reason(self, op: str, reason: str | None, raises: bool) -> None:
        """Keeps the reason for the next record of the operation."""
        self._reasons[op] = reason, raises

    def refuse(self, op: str, reason: str) -> None:
        """Keeps the reason why the operation would raise, unless there is one already."""
        if not self._reasons.get(op, (None, False))[1]:
            self._reasons[op] = reason, True

    def called(self, module: Any, x: Tensor) -> Tensor | None:
        """Records a call of an unknown module, in a dry run."""
        return None


class StandIn(Tensor):
    """A `StandIn` replaces a tensor in a dry run. It has a shape and a dtype, and is on the recorder's device."""

    inference = False  # whether it replaces an inference tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        recorder = _current.get()
        return torch.device("cpu") if recorder is None else recorder.device

    def is_inference(self) -> bool:
        return self.inference


def stand_in(shape: Shape, dtype: torch.dtype) -> StandIn:
    """Returns a `StandIn` of zeros with this shape and dtype."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(1, dtype=dtype, device="cpu").expand(shape).as_subclass(StandIn)


_current: ContextVar[Recorder | None] = ContextVar("fastbert recorder", default=None)


@contextmanager
def recorded(recorder: Recorder | None = None) -> Iterator[Recorder]:
    """Lets the operations of this thread record their decisions. By default they also run as usual."""
    global on
    recorder = Recorder() if recorder is None else recorder
    token = _current.set(recorder)
    with _lock:
        on += 1
    try:
        yield recorder
    finally:
        with _lock:
            on -= 1
        _current.reset(token)


def note(
    op: str,
    backend: str,
    before: Shape | None,
    after: Shape,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    **facts: Any,
) -> bool:
    """Records the decision of an operation. Returns whether this is a dry run, in which it must not compute."""
    recorder = _current.get()
    if recorder is None:
        return False
    recorder.add(op, backend, before, after, dtype, weight, facts)
    return recorder.dry


def note_reason(op: str, reason: str | None, raises: bool) -> bool:
    """Records why an operation falls back, or None. Returns whether the fallback must not be logged or raised."""
    recorder = _current.get()
    if recorder is None:
        return False
    recorder.set_reason(op, reason, raises and reason is not None)
    return recorder.dry


def note_refusal(op: str, reason: str) -> bool:
    """Records why an operation raises. Returns whether this is a dry run, in which it must not raise."""
    recorder = _current.get()
    if recorder is None:
        return False
    recorder.refuse(op, reason)
    return recorder.dry


def call(module: Any, x: Tensor) -> Tensor | None:
    """Records a call of a module on x. Returns a stand-in for its output in a dry run, and otherwise None."""
    recorder = _current.get()
    return None if recorder is None else recorder.called(module, x)


def enter(module: Any) -> None:
    """Assigns the following operations to the module."""
    recorder = _current.get()
    if recorder is not None:
        recorder.place = recorder.names.get(id(module), recorder.place)


def is_on() -> bool:
    """Tells whether this thread has a recorder."""
    return _current.get() is not None


def is_dry() -> bool:
    """Tells whether operations of this thread only decide."""
    recorder = _current.get()
    return recorder is not None and recorder.dry


def assumed_arch() -> int | None:
    """Returns the compute capability of the recorder's GPU, which need not be present, or None without one."""
    recorder = _current.get()
    return None if recorder is None else recorder.arch
