"""This file has the options and fixtures of `pytest benchmarks`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from session import Session
from suites import Case, results_folder

from fastbert.ops import dispatch

MINUTES = 9.0
QUICK = Path(__file__).resolve().parent.parent / ".benchmarks" / "quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    minutes = float(os.environ.get("BENCH_MINUTES") or MINUTES)
    group.addoption("--minutes", type=float, default=minutes, help=f"for all cases together ({MINUTES}; BENCH_MINUTES)")
    group.addoption("--quick", action="store_true", help="two rounds of a few peers and cases, kept out of results/")
    group.addoption("--results", type=Path, help="folder of the results (benchmarks/results/<device>-<date>)")
    group.addoption("--bench-device", choices=("cuda", "cpu"), help="by default the GPU if there is one")
    group.addoption("--bench-model", type=Path, help="checkpoint for the text suite (all-MiniLM-L6-v2 if installed)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (case := case_of(item)) is not None and case.late)


def case_of(item: pytest.Item) -> Case | None:
    """Returns the case of a collected test, or None for `test_start`."""
    spec = getattr(item, "callspec", None)
    return None if spec is None else spec.params.get("case")


@pytest.fixture(scope="session")
def bench_device(request: pytest.FixtureRequest) -> torch.device:
    if dispatch.interpreting():
        pytest.exit("TRITON_INTERPRET is set: nothing is measured in Triton's interpreter; unset it", returncode=2)
    wanted = request.config.getoption("--bench-device")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest, bench_device: torch.device) -> Session:
    options = request.config.option
    cases = [case for case in map(case_of, request.session.items) if case is not None]
    # A quick run gives no result.
    folder = options.results or (QUICK if options.quick else results_folder(bench_device))
    return Session(
        bench_device,
        folder,
        60.0 * options.minutes,
        [case for case in cases if case.device_type == bench_device.type],
        quick=options.quick,
        model=options.bench_model,
    )
