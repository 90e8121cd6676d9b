"""One run of `pytest benchmarks`: runs cases on one device, shares the time out among them and keeps their rows."""

from __future__ import annotations

from pathlib import Path

import ceilings
import torch
from suites import Case, Deadline, Outcome, Recorder, run_case

TIME_UP = "the time was up (--minutes, BENCH_MINUTES)"


class Session:
    """n_cases: how many `run` will be asked for. Ceilings are measured when the first case runs."""

    def __init__(
        self, device: torch.device, folder: Path, seconds: float, n_cases: int, *, quick: bool = False
    ) -> None:
        self.device, self.folder, self.quick = device, folder, quick
        self.deadline = Deadline(seconds)
        self._cases_left = n_cases
        self._recorders: dict[str, Recorder] = {}

    def recorder(self, suite: str) -> Recorder:
        """The result file of a suite, in the session's folder."""
        if suite not in self._recorders:
            found = ceilings.cached(self.device, self.folder, quick=self.quick)
            self._recorders[suite] = Recorder(self.folder / f"{suite}.json", self.device, found)
        return self._recorders[suite]

    def run(self, case: Case) -> Outcome | None:
        """Holds the contest of a case and saves its rows; None, with a note, where the time is up."""
        recorder = self.recorder(case.suite)
        share = self.deadline.share(self._cases_left)
        self._cases_left -= 1
        if self.deadline.left <= 0:
            missed = [*recorder.results.notes.get("not_reached", []), case.name]
            recorder.note(not_reached=missed, reason=TIME_UP)
            return None
        # Loading, exporting and compiling take about as long as the timing, and no limit stops them.
        found = recorder.results.ceilings
        outcome = run_case(case, self.device, ceilings=found, max_seconds=share / 2, quick=self.quick)
        recorder.add(outcome.rows)
        return outcome
