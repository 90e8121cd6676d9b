"""The result files of a run on a GPU are few, readable, and present from the first minute on.

Each part writes a file into a folder of the run. From these, `publish` makes in DIR:

    results.json     all rows, ceilings and notes, as fastbert/bench/results.py describes; report.py reads it
    summary.txt      the short tables, what failed, what was not reached
    tests.log        what pytest printed, where tests were run
    tuned/NAME.json  the table of block sizes, where one was made

`resume` gives a later run into the same DIR the results of the earlier runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_tests
import probe
import probe_pieces
from report import combined

from fastbert.bench.report import render_terminal
from fastbert.bench.results import Results

RESULTS, SUMMARY, LOG, TUNED = "results.json", "summary.txt", "tests.log", "tuned"
ENDINGS = {
    0: "done",
    1: "done, but something failed or was wrong",
    124: "cut short: over its time",
    125: "not reached: the time was up",
}


def publish(work: Path, out: Path, ended: Mapping[str, int]) -> None:
    """Makes the files of DIR again from those of the parts. ended: the exit code of each part that ended, in order."""
    parts = {path.stem: Results.load(path) for path in sorted(work.glob("*.json"))}
    lines = []
    if parts:
        results = combined(parts, str(work))
        results.save(out / RESULTS)
        lines = _summary(results)
    lines += [f"{part}: {ending(code)}" for part, code in ended.items() if code != 0]
    (out / SUMMARY).write_text("\n".join(lines) + "\n")
    if (work / LOG).exists():
        shutil.copyfile(work / LOG, out / LOG)
    if (work / TUNED).is_dir():
        shutil.copytree(work / TUNED, out / TUNED, dirs_exist_ok=True)


def resume(out: Path, work: Path, plan: Sequence[str], commit: str | None) -> None:
    """Writes the content of results.json for this commit into `work`, with one file for each part that is not in the
    plan.
    """
    if not (out / RESULTS).exists():
        return
    before = Results.load(out / RESULTS)
    if before.environment.get("commit") != commit:
        return
    for part, results in separated(before).items():
        if part not in plan:
            results.save(work / f"{part}.json")
    if "tests" not in plan and (out / LOG).exists():
        shutil.copyfile(out / LOG, work / LOG)


def separated(results: Results) -> dict[str, Results]:
    """Splits results that `combined` joined, and returns those of each part."""
    notes: dict[str, dict[str, Any]] = {}
    for name, value in results.notes.items():
        part, _, key = name.partition(": ")
        notes.setdefault(part, {})[key] = value
    rows = {row.suite: [other for other in results.rows if other.suite == row.suite] for row in results.rows}
    results_of_part = {
        part: Results(dict(results.environment), rows.get(part, []), notes=notes.get(part, {}))
        for part in {**notes, **rows}
    }
    if results.ceilings:
        results_of_part["ceilings"] = Results(dict(results.environment), ceilings=dict(results.ceilings))
    return results_of_part


def ending(code: int) -> str:
    return ENDINGS.get(code, f"failed with exit code {code}")


def _summary(results: Results) -> list[str]:
    probed = [row for row in results.rows if row.suite == probe_pieces.SUITE]
    contests = Results(
        results.environment,
        [row for row in results.rows if row.suite != probe_pieces.SUITE],
        results.ceilings,
        results.notes,
    )
    lines = [render_terminal(contests, width=140, summary_only=True)]
    lines += probe.lines(probed)
    return lines + [_note(name, value) for name, value in results.notes.items() if value]


def _note(name: str, value: Any) -> str:
    if name == "tests: tests" and isinstance(value, dict):
        verdicts = {group: gpu_tests.Verdict(**fields) for group, fields in value.items()}
        return "\n".join(f"tests of {group}: {gpu_tests.summary(verdict)}" for group, verdict in verdicts.items())
    if name.endswith(": bars"):
        return "\n".join(f"{name.partition(':')[0]}, {line}" for line in value)
    if isinstance(value, list):
        return f"{name}: {len(value)}, the first {value[0]}"
    return f"{name}: {value}"
