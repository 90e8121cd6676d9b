"""Counts of what stalls a launch: compilations, loads, captures and tunings."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CompileEvents:
    """The events that have stalled a launch in this process so far, or, as the difference of two, in between.

    compilations: Triton kernels of this library compiled. loads: those found compiled in Triton's cache on disk, and
    loaded. captures: CUDA graphs captured. tunings: block sizes measured.
    """

    compilations: int = 0
    loads: int = 0
    captures: int = 0
    tunings: int = 0

    @property
    def total(self) -> int:
        return self.compilations + self.loads + self.captures + self.tunings

    def __sub__(self, earlier: CompileEvents) -> CompileEvents:
        return CompileEvents(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


_captures = 0
_capturing = threading.Lock()


def count_capture(capture: Callable[[], Any]) -> Any:
    """Runs a capture and counts it. One capture runs at a time in a process, as torch.cuda.graph demands."""
    global _captures
    with _capturing:
        graph = capture()
        _captures += 1
    return graph


def compile_events() -> CompileEvents:
    """Counts compilations, loads of compiled kernels, captures and tunings since the process started.

    After `fastbert.warmup(model)` no batch of any lengths adds to them. Imports no compiler.
    """
    kernels = sys.modules.get("fastbert_kernels.events")  # without it, no kernel was launched
    return CompileEvents(captures=_captures, **(kernels.counts() if kernels is not None else {}))
