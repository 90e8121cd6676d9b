"""The tests of reports and comparisons share made-up results of benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

from fastbert.bench.measure import Ratio, Timing
from fastbert.bench.results import FAILED, MISSING, WRONG, Results, Row

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from


BROKEN = {
    "compiled": (FAILED, "RuntimeError: <planted> & | failure"),
    "cuDNN": (WRONG, "error 0.2 above the bound 0.1"),
    "OpenVINO": (MISSING, "the package openvino is not installed"),
}


def environment(kind="cuda", device="Planted H100", date="2026-02-01 12:30 UTC", **changes):
    packages = {"torch": "2.11.0", "triton": "3.6.0", "openvino": None}
    return {"device": device, "device_type": kind, "date": date, "commit": "0123456789", "packages": packages} | changes


def contest(suite="model", workload="S128 b8", ratios=None, *, dtype="bfloat16", ours=0.001, broken=(), **extra):
    """The row of fastbert, one row a peer with the ratio that it should show, and rows of those that did not run."""
    rows = [Row(suite, workload, "fastbert", dtype, error=3e-3, bound=4e-3, extra=dict(extra))]
    for name, ratio in (ratios or {"eager": 2.0}).items():
        rows.append(Row(suite, workload, name, dtype, error=4e-3, bound=0.1, extra=dict(extra)))
        rows[-1].compared(Ratio(ratio, 0.95 * ratio, 1.05 * ratio))
    for row in rows:
        seconds = ours * (row.speedup or 1.0)
        row.timed(Timing((0.99 * seconds, seconds, 1.01 * seconds)), tokens=1024, items=8)
    for name in broken:
        status, detail = BROKEN[name]
        rows.append(Row(suite, workload, name, dtype, status, detail, extra=dict(extra)))
    return rows


def results(*contests, **changes):
    return Results(environment(**changes), [row for rows in contests for row in rows], {"copy GB/s": 3012.3})


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))
