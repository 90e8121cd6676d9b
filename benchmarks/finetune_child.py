"""This script runs one `fastbert finetune` in its own process, times the steps and keeps the losses.

    python benchmarks/finetune_child.py RECORD.json finetune classify --train ...

The arguments after RECORD.json are those of `fastbert`. The record has `step_seconds` (forward, backward and update of
each step), `losses` ((step, loss) as the trainer logs them), `training_seconds`, `seconds` of the whole command without
imports of Python, and `peak_bytes`, the peak memory of the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.cli.main import main as fastbert


def timed(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the command in this process; returns its record, with the exit status as `status`."""
    import transformers

    class Clock(transformers.TrainerCallback):
        steps: list[float] = []
        losses: list[tuple[int, float]] = []
        begin = began = trained = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            Clock.began = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            Clock.trained = time.perf_counter() - Clock.began

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            Clock.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            Clock.steps.append(time.perf_counter() - Clock.begin)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                Clock.losses.append((state.global_step, float(logs["loss"])))

    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(Clock)
    start = time.perf_counter()
    try:
        status = fastbert(list(arguments))
    finally:
        callbacks.remove(Clock)
    return {
        "status": status,
        "step_seconds": Clock.steps,
        "losses": Clock.losses,
        "training_seconds": Clock.trained,
        "seconds": time.perf_counter() - start,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    record = timed(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(record) + "\n", encoding="utf-8")
    sys.exit(record["status"])
