"""This module counts events that delay a launch: compilations, loads, captures and tunings."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CompileEvents:
    """A `CompileEvents` holds the counts of such events since the process started, or the difference of two counts.

    compilations: compiled Triton kernels of this library. loads: kernels loaded from Triton's cache on disk. captures:
    captured CUDA graphs. tunings: measurements of block sizes.
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
    """Runs a capture and counts it. Only one capture runs at a time in a process, as torch.cuda.graph requires."""
    global _captures
    with _capturing:
        graph = capture()
        _captures += 1
    return graph


def compile_events() -> CompileEvents:
    """Returns the counts of compilations, loads of compiled kernels, captures and tunings since the process started.

    After `fastbert.warmup(model)` no batch adds to them. This function does not import a compiler.
    """
    kernels = sys.modules.get("fastbert_kernels.events")  # without it, no kernel was launched
    return CompileEvents(captures=_captures, **(kernels.counts() if kernels is not None else {}))
