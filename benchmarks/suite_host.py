"""The host suite times the host's work for a batch on a GPU, on any machine, with a driver that launches nothing.

host_child.py measures in its own process, since it lets CPU tensors stand for those of a GPU. A row is one operation,
layer or forward pass. `bar_seconds` is the limit that it should stay under.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbert.bench.measure import Timing
from fastbert.bench.peers import OURS
from fastbert.bench.results import FAILED, OK, Row

SUITE = "host"
SCRIPT = Path(__file__).with_name("host_child.py")
ROOT = SCRIPT.parent.parent
COMPILING = 240.0  # seconds that compiling may take beside the timing, on a busy machine
DTYPE = "bfloat16"

# The limits of a launch, a layer of BERT-base and a replay, in seconds.
BARS = {
    "kernel alone": 12e-6, "layer, plain path": 90e-6, "replay, before the launch": 40e-6, "replay, in all": 60e-6,
}  # fmt: skip


def run(seconds: float = 20.0) -> list[Row]:
    """Returns the rows. If the process fails, the row is FAILED, with the reason."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(SCRIPT), "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILING + 3 * seconds)
    except subprocess.TimeoutExpired as error:
        return [Row(SUITE, "all", OURS, DTYPE, FAILED, f"not done within {error.timeout:.0f} s")]
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return [Row(SUITE, "all", OURS, DTYPE, FAILED, (lines[-1] if lines else f"exit code {done.returncode}")[:300])]
    return list(rows(json.loads(done.stdout.splitlines()[-1])))


def rows(measured: list[dict[str, Any]]) -> Iterator[Row]:
    """Returns a row for each measurement of host_child.py. A layer's row is the whole encoder's time over the number of
    layers.
    """
    for each in measured:
        row = Row(SUITE, each["workload"], OURS, DTYPE, OK)
        n = each["n"] or 1
        row.timed(Timing(tuple(sample / n for sample in each["samples"])))
        row.extra = {"model": each["model"], "setting": each["setting"], "launches": each["launches"]}
        if each["calls"] is not None:
            row.extra["python_calls"] = round(each["calls"] / n, 1)
        if each["setting"] in BARS:
            row.extra["bar_seconds"] = BARS[each["setting"]]
        yield row
