"""A callback of the Trainer keeps the time of a run's steps, and its peak of memory is read."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any


def clock() -> Any:
    """Returns a TrainerCallback whose `facts()` say how long the steps took, and how much memory the run held."""
    return _clock_class()()


@functools.cache
def _clock_class() -> type:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times each update: forward, backward and the optimizer's step, without evaluations and checkpoints."""

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.start = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(time.perf_counter() - self.start)

        def facts(self) -> dict[str, Any]:
            """Returns seconds of all steps and of a median one, and peaks in bytes, as JSON has them.

            The peak of the host is of the process since its start, None where the system does not say. The peak of the
            GPU is of PyTorch's allocator since training began, None without a GPU. After a resume, steps are those
            of the last process.
            """
            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            return {
                "seconds_of_steps": sum(self.steps),
                "seconds_of_a_step": statistics.median(self.steps) if self.steps else None,
                "peak_bytes": {"host": _host_peak(), "gpu": gpu or None},
            }

    return Clock


def _host_peak() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
