"""A `Session` is one run of `pytest benchmarks` on one device. It shares time among cases and keeps their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ceilings
import torch
from suites import Case, Deadline, Outcome, Recorder, Schedule, run_case

TIME_UP = "the time was up (--minutes, BENCH_MINUTES)"


class Session:
    """A Session runs cases. cases: those that `run` gets. model: the checkpoint of the text suite, None for the usual
    one.

    Ceilings are measured when the first case runs.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        seconds: float,
        cases: Sequence[Case],
        *,
        quick: bool = False,
        model: Path | None = None,
    ) -> None:
        self.device, self.folder, self.quick, self.model = device, folder, quick, model
        self.schedule = Schedule(cases, Deadline(seconds))
        self._recorders: dict[str, Recorder] = {}

    @property
    def seconds_left(self) -> float:
        return self.schedule.deadline.left

    def recorder(self, suite: str) -> Recorder:
        """Returns the result file of a suite, in the session's folder."""
        if suite not in self._recorders:
            measured_ceilings = ceilings.cached(self.device, self.folder, quick=self.quick)
            self._recorders[suite] = Recorder(self.folder / f"{suite}.json", self.device, measured_ceilings)
        return self._recorders[suite]

    def run(self, case: Case) -> Outcome | None:
        """Holds the contest of a case and saves its rows. Returns None, with a note, if there is no time for it."""
        recorder = self.recorder(case.suite)
        with self.schedule.turn(case) as seconds:
            if seconds is None:
                recorder.note(not_reached=[*recorder.results.notes.get("not_reached", []), case.name])
                return None
            measured_ceilings = recorder.results.ceilings
            outcome = run_case(case, self.device, ceilings=measured_ceilings, max_seconds=seconds, quick=self.quick)
            recorder.add(outcome.rows)
            return outcome
