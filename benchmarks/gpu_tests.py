"""The GPU's tests: one pytest process an operation, so that an error that takes the device with it stays in its own.

What they find decides what may be timed: `refusals` names the operations that failed, and why.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPS = ("attention", "embedding", "gelu", "layer_norm", "linear", "pooling")
# What is tested -> pytest's arguments. The first are the longest, so that they start first.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("tests/test_model.py",),
    "graphs": ("tests/test_graphs.py", "tests/test_graphs_quantized.py"),
    "stalls": ("tests/test_no_stall.py",),
    **{op: (f"tests/test_op_{op}.py",) for op in OPS},
    "linear": ("tests/test_op_linear.py", "tests/test_op_linear_persistent.py"),
    "batch_invariant": ("tests/test_batch_invariant.py",),
    "tune": ("tests/test_tune.py",),
    "quantized": ("tests/test_op_quantized.py", "tests/test_op_quantized_persistent.py", "tests/test_quantized.py"),
    "memory": ("tests/test_memory.py",),
    "text": ("tests/test_sentence.py", "tests/test_sentence_run.py", "-k", "kernels or gpu"),
    "dispatch": ("tests/test_dispatch.py", "tests/test_launch.py", "tests/test_ops_compile.py"),
}
SELECTION = ("-m", "gpu or not slow")
# As the command `pytest` does: `python -m pytest` would put the working folder, with its folder kernels/, on the path.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.console_main())"
GRACE = 10.0  # seconds that pytest has to write its report once it is interrupted

PASSED, FAILED, INCOMPLETE = "passed", "failed", "incomplete"


@dataclass
class Verdict:
    """What the tests of one group said. incomplete: none failed, but the time was up before the last."""

    status: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    detail: str = ""


def run(
    seconds: float,
    folder: Path,
    *,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Verdict], str]:
    """Runs all groups, some at a time, within `seconds`; returns their verdicts, and the output of those that failed.

    folder: for pytest's reports and output.
    """
    deadline = time.monotonic() + seconds
    workers = workers or max(1, min(len(groups), (os.cpu_count() or 2) // 2))

    def one(group: str) -> tuple[str, Verdict]:
        verdict = run_group(group, groups[group], deadline, folder)
        counts = f"{verdict.passed} passed, {verdict.failed} failed, {verdict.skipped} skipped"
        say(f"tests of {group}: {verdict.status}, {counts}, {verdict.seconds:.0f} s")
        return group, verdict

    with ThreadPoolExecutor(workers) as pool:
        verdicts = dict(pool.map(one, groups))
    failed = [group for group, verdict in verdicts.items() if verdict.status == FAILED]
    log = "\n".join(f"==== {group}\n{(folder / f'{group}.log').read_text(errors='replace')}" for group in failed)
    return verdicts, log


def run_group(group: str, arguments: Sequence[str], deadline: float, folder: Path) -> Verdict:
    """One pytest process, interrupted at the deadline (of time.monotonic)."""
    started = time.monotonic()
    if started >= deadline:
        return Verdict(INCOMPLETE, detail="the time was up before they began")
    report = folder / f"{group}.xml"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20", f"--junitxml={report}", *SELECTION]
    command = [sys.executable, "-c", PYTEST, *options, *arguments]
    with open(folder / f"{group}.log", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        interrupted = _wait(process, deadline - started)
    verdict = judge(report, process.returncode, interrupted)
    verdict.seconds = time.monotonic() - started
    return verdict


def judge(report: Path, returncode: int, interrupted: bool) -> Verdict:
    """The verdict that a JUnit report and pytest's exit code amount to."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    first = ""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        if interrupted:
            return Verdict(INCOMPLETE, detail="stopped when the time was up, and left no report")
        return Verdict(FAILED, detail=f"pytest ended with exit code {returncode} and left no report")
    for case in cases:
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        if bad is not None:
            counts["failed"] += 1
            lines = (bad.get("message") or "").strip().splitlines()
            first = first or f"{case.get('name')}: {lines[0] if lines else bad.tag}"[:300]
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    if counts["failed"]:
        return Verdict(FAILED, **counts, detail=first)
    if interrupted:
        counts["passed"] = max(0, counts["passed"] - 1)  # pytest lists the test that was running without a failure
        return Verdict(INCOMPLETE, **counts, detail="stopped when the time was up")
    if returncode != 0:
        return Verdict(FAILED, **counts, detail=f"pytest ended with exit code {returncode}")
    return Verdict(PASSED, **counts)


def refusals(notes: Mapping[str, Any]) -> dict[str, str]:
    """Operation -> why nothing that needs it is timed, from the notes of the tests' result file.

    A model needs every operation and its graphs, and text needs the model.
    """
    verdicts = notes.get("tests", {})
    refused = {
        group: f"the tests of {group} failed: {verdict['detail']}"
        for group, verdict in verdicts.items()
        if verdict["status"] == FAILED
    }
    for whole, parts in (("model", (*OPS, "graphs")), ("text", ("model",))):
        broken = next((part for part in parts if part in refused), None)
        if broken is not None:
            refused.setdefault(whole, refused[broken])
    return refused


def as_notes(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {"tests": {group: asdict(verdict) for group, verdict in verdicts.items()}}


def _wait(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Waits; true if it had to be interrupted. pytest then still writes the report of what it ran."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return True
