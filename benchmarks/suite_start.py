"""The start suite times from the start of a process to the first vector, each competitor in processes, in turn."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cold_start import COMPETITORS

from fastbert.bench.measure import Timing, speedup
from fastbert.bench.peers import OURS
from fastbert.bench.results import FAILED, MISSING, OK, Row

SUITE = "start"
SCRIPT = Path(__file__).with_name("cold_start.py")
ROOT = SCRIPT.parent.parent
LEAST = 5.0  # seconds that every process gets


def run(
    folder: Path,
    device: torch.device,
    dtype: str,
    *,
    workload: str = "import to first vector",
    model: str = "",
    rounds: int = 3,
    max_seconds: float = 60.0,
    competitors: Sequence[str] = COMPETITORS,
    environment: Mapping[str, str] | None = None,
) -> list[Row]:
    """Returns a row for each competitor, fastbert's first. max_seconds: for all of it; rounds that do not fit are left
    out.
    """
    rows = {name: Row(SUITE, workload, name, dtype, extra={"model": model}) for name in competitors}
    runs_of: dict[str, list[dict[str, float]]] = {name: [] for name in competitors}
    for name, row in rows.items():
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            row.status, row.detail = MISSING, f"the package {name} is not installed"
    started = time.monotonic()
    longest = 0.0
    for number in range(rounds):
        if number and time.monotonic() - started + longest > max_seconds:
            break
        before = time.monotonic()
        for name, row in rows.items():
            if row.status != OK:
                continue
            left = max(LEAST, max_seconds - (time.monotonic() - started))
            try:
                runs_of[name].append(once(name, folder, device, dtype, environment, timeout=left))
            except subprocess.TimeoutExpired:
                row.status, row.detail = FAILED, f"not done within {left:.0f} s"
            except RuntimeError as error:
                row.status, row.detail = FAILED, str(error)[:300]
        longest = max(longest, time.monotonic() - before)
    timings = {name: Timing(tuple(run["total"] for run in runs)) for name, runs in runs_of.items() if runs}
    for name, timing in timings.items():
        row = rows[name]
        if row.status != OK:
            continue
        row.timed(timing)
        row.extra["cold_start_seconds"] = timing.median
        row.extra["cold_start_parts"] = runs_of[name][-1]
        if name != OURS and rows[OURS].status == OK:
            row.compared(speedup(timings[OURS], timing))
    return list(rows.values())


def once(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: str,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Returns the seconds that cold_start.py prints. Raises RuntimeError, with its last line, if it fails."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    set_apart = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **(environment or {})}
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(folder), device.type, dtype],
        env={**inherited, **set_apart},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
