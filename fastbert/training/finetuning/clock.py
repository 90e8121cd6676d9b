"""A callback of the Trainer measures the time of a run's steps, and reads its peak memory."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any


def clock() -> Any:
    """Returns a TrainerCallback whose `facts()` returns the durations of the steps and the peak memory of the run."""
    return _clock_class()()


@functools.cache
def _clock_class() -> type:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """The clock times each update (forward, backward, optimizer step), without evaluations and checkpoints."""

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
            """Returns the seconds of all steps and of a median step, and peak memory in bytes, as JSON values.

            The host's peak is that of the process since its start; None if the system does not report it. The GPU's
            peak is that of PyTorch's allocator since the start of training; None without a GPU. After a resume, the
            steps are those of the last process.
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
