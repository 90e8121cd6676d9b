"""The suites run under pytest-benchmark, one benchmark for each case. If fastbert is wrong or fails in a case, its test
fails.

The comparison with the peers is a contest in interleaved rounds. Its rows go into the result files and into extra_info.
Then pytest-benchmark's own statistics time fastbert alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import suite_host
import suite_kernels
import suite_model
import suite_start
import suite_text
import suite_train
import torch
from session import TIME_UP, Session
from suites import LONG_MINUTES, Case, tidy

import models
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.results import OK, Row

QUICK_CASES = 3
START_SECONDS = 30.0  # for the fresh processes of all competitors
HOST_SECONDS = 20.0  # of timing in the suite host, beside compiling
SUITES: dict[str, Any] = {
    "test_text": suite_text, "test_model": suite_model, "test_kernels": suite_kernels, "test_train": suite_train,
}  # fmt: skip
SECONDS = 1.0  # of pytest-benchmark's own timing of a case, about


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    suite = SUITES[metafunc.function.__name__]
    get = metafunc.config.getoption
    options = {} if suite is suite_kernels else {"long": get("--minutes") >= LONG_MINUTES}
    if suite is suite_text:
        options["model"] = get("--bench-model")
    chosen: list[Case] = []
    for device_type in ("cpu", "cuda"):
        cases = suite.cases(device_type, **options)
        chosen += cases[:QUICK_CASES] if get("--quick") else cases
    metafunc.parametrize("case", chosen, ids=[case.name for case in chosen])


def test_text(case: Case, session: Session, benchmark: Any) -> None:
    """Text in, vectors out, tokenization included."""
    hold(case, session, benchmark)


def test_kernels(case: Case, session: Session, benchmark: Any) -> None:
    """One fused operation."""
    hold(case, session, benchmark)


def test_start(session: Session, benchmark: Any) -> None:
    """A fresh process: from its first import to its first vector."""
    if session.seconds_left <= 0:
        pytest.skip(TIME_UP)
    model = session.model
    dtype = "float32" if session.device.type == "cpu" else "bfloat16"
    arguments = models.text_model(model), session.device, dtype
    rows = suite_start.run(
        *arguments,
        model=models.text_model_name(model),
        rounds=1 if session.quick else 2,
        max_seconds=min(session.seconds_left, START_SECONDS),
    )
    session.recorder(suite_start.SUITE).add(rows)
    benchmark.extra_info["rows"] = [as_json(row) for row in rows]
    assert rows[0].status == OK, rows[0].detail
    benchmark.pedantic(suite_start.once, (OURS, *arguments), rounds=1)


def test_host(session: Session, benchmark: Any) -> None:
    """Measures the host's share of a batch on a GPU, by a driver that launches nothing."""
    if session.seconds_left <= 0:
        pytest.skip(TIME_UP)
    rows = suite_host.run(4.0 if session.quick else min(session.seconds_left, HOST_SECONDS))
    session.recorder(suite_host.SUITE).add(rows)
    benchmark.extra_info["rows"] = [as_json(row) for row in rows]
    assert rows[0].status == OK, rows[0].detail
    benchmark.pedantic(lambda: None, rounds=1)  # the rows have the times; this process has nothing to time


def test_model(case: Case, session: Session, benchmark: Any) -> None:
    """Token ids in, hidden states out."""
    hold(case, session, benchmark)


def test_train(case: Case, session: Session, benchmark: Any) -> None:
    """One optimiser step of a model with a head."""
    hold(case, session, benchmark)


def hold(case: Case, session: Session, benchmark: Any) -> None:
    """Holds the contest of a case. Then, if fastbert's output was right, it times fastbert alone."""
    if case.device_type != session.device.type:
        pytest.skip("needs an NVIDIA GPU" if case.device_type == "cuda" else "is for CPUs, and this run is on a GPU")
    outcome = session.run(case)
    if outcome is None:
        pytest.skip(TIME_UP)
    try:
        benchmark.extra_info["rows"] = [as_json(row) for row in outcome.rows]
        ours = outcome.rows[0]
        assert ours.status == OK and outcome.ours is not None, f"{ours.status}: {ours.detail}"
        again(outcome.ours, outcome.rows, session.device, benchmark)
    finally:
        if not case.keep:
            del outcome
            tidy(session.device)


def again(peer: Peer, rows: Sequence[Row], device: torch.device, benchmark: Any) -> None:
    numbers = itertools.count()

    def run(i: int) -> None:
        peer.run(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = max(3, min(20, int(SECONDS / (rows[0].seconds or SECONDS))))
    benchmark.pedantic(run, setup=lambda: ((next(numbers),), {}), rounds=rounds, warmup_rounds=1)


def as_json(row: Row) -> dict[str, Any]:
    """Returns the fields of a row, with null for numbers that JSON does not have."""
    return json.loads(json.dumps(dataclasses.asdict(row)), parse_constant=lambda name: None)
