"""A `Probe` measures one piece after another. Each piece is a row, also if it raises, and is written at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from suites import Deadline, Recorder, Work

from fastbert.bench.measure import interleave, rms_error
from fastbert.bench.results import FAILED, Row

SUITE = "probe"
ROUNDS, WARMUP = 12, 2
Run = Callable[[int], Any]


class ContextLost(RuntimeError):
    """The device can run nothing more in this process."""


class Probe:
    """A Probe times and checks pieces. tiny: small sizes and one round each. model: the folder of a MiniLM, or None."""

    def __init__(
        self,
        device: torch.device,
        recorder: Recorder,
        deadline: Deadline,
        *,
        tiny: bool = False,
        model: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.device, self.recorder, self.deadline = device, recorder, deadline
        self.tiny, self.model, self.say = tiny, model, say
        self.section = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_over(self) -> bool:
        return self.deadline.left <= 0

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def add(self, workload: str, name: str, dtype: str = "bfloat16", **fields: Any) -> Row:
        """Adds a row. Values that are not fields of Row go into its `extra`."""
        row = Row(SUITE, f"{self.section}: {workload}", name, dtype)
        for key, value in fields.items():
            if key in Row.__dataclass_fields__:
                setattr(row, key, value)
            else:
                row.extra[key] = value
        self.recorder.add([row])
        self.say(line(row))
        return row

    def measure(
        self,
        workload: str,
        name: str,
        run: Run,
        *,
        work: Work | None = None,
        exact: torch.Tensor | None = None,
        pick: Callable[[Any], torch.Tensor] = lambda out: out,
        dtype: str = "bfloat16",
        **extra: Any,
    ) -> None:
        """Adds one row: the median time on the device of run(i), L2 overwritten before each, and its error.

        exact: the expected pick(run(0)), in float64.
        """

        def piece() -> None:
            error = None if exact is None else rms_error(pick(run(0)), exact)
            rounds = 1 if self.tiny else ROUNDS
            timing = interleave(
                {"it": run}, device=self.device, rounds=rounds, warmup=0 if self.tiny else WARMUP, flush_l2=True
            )["it"]
            row = Row(SUITE, "", "", dtype, error=error).timed(timing)
            if work is not None:
                work.fill(row, self.recorder.results.ceilings)
            measured = {key: getattr(row, key) for key in ("seconds", "spread", "rounds", "error", "rate", "rate_unit")}
            self.add(workload, name, dtype, ceiling_fraction=row.ceiling_fraction, **measured, **extra)

        self.attempt(workload, name, piece, dtype)

    def attempt(self, workload: str, name: str, piece: Callable[[], None], dtype: str = "bfloat16") -> None:
        """Runs a piece unless the time is over; an error becomes a row. Raises ContextLost if the device can run
        nothing more.
        """
        if self.is_over:
            return
        try:
            piece()
            return
        except Exception as error:
            # Triton's messages begin with the kernel's source, and end with the error.
            reason = " ".join(str(error).split())[-200:]
            self.add(workload, name, dtype, status=FAILED, detail=f"{type(error).__name__}: {reason}")
        try:
            self.wait()
        except RuntimeError as error:
            raise ContextLost(str(error)) from error


def line(row: Row) -> str:
    """Formats a row as a line of text."""
    parts = [f"{row.workload}: {row.competitor}", row.dtype]
    if row.status == FAILED:
        return " ".join([*parts, f"FAILED: {row.detail}"])
    parts += [] if row.seconds is None else [f"{1e6 * row.seconds:.1f} us"]
    parts += [] if row.rate is None else [f"{row.rate:.4g} {row.rate_unit}"]
    parts += [] if row.ceiling_fraction is None else [f"({row.ceiling_fraction:.0%} of the ceiling)"]
    parts += [] if row.tokens_per_second is None else [f"{row.tokens_per_second:,.0f} tokens/s"]
    parts += [] if row.error is None else [f"error {row.error:.2e}"]
    parts += [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.extra.items()
    ]
    return " ".join(parts)
