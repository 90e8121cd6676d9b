"""This pytest plugin runs the tests that use a GPU, the most informative first, and records each result at once.

    pytest -p gpu_pytest --record FILE tests/ops/test_op_linear.py ...

FILE gets one line of JSON for the collected tests, and one for each finished test, so that an interrupted run keeps its
results. Under pytest-xdist a worker that has lost its CUDA context ends, and another takes its place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gpu_tests
import pytest

LOST = 3  # exit code of a worker whose CUDA context is lost
DETAIL = 300  # characters of a failure's reason


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="where each test's outcome goes, a line of JSON each")
    parser.addoption("--groups", type=json.loads, default=gpu_tests.GROUPS, metavar="JSON", help="what goes first")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if config.getoption("--record") is not None and not is_worker:
        config.pluginmanager.register(Record(config.getoption("--record")), "fastbert-record")
    if is_worker:
        config.pluginmanager.register(Worker(), "fastbert-worker")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if touches_the_device(item)]
    groups = config.getoption("--groups")
    kept.sort(key=lambda item: gpu_tests.place(item.nodeid, groups))  # stable: the order within a group does not change
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept


def touches_the_device(item: pytest.Item) -> bool:
    # A parameter with that name is not a fixture.
    fixtures = set(getattr(item, "fixturenames", ())) - set(getattr(getattr(item, "callspec", None), "params", ()))
    return bool({"device", "cuda"} & fixtures) or item.get_closest_marker("gpu") is not None


class Record:
    """A Record writes the file, in the process to which the workers report."""

    def __init__(self, path: Path) -> None:
        self.path, self.collected = path, False

    def write(self, **line: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def collect(self, ids: list[str]) -> None:
        if not self.collected:  # each worker collects the same tests
            self.collected = True
            self.write(collected=ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collect(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.collect([item.nodeid for item in session.items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", detail=f"cannot be collected: {_reason(report)}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has one line for its call or for its failed setup or skip, and one more for a failure after that.
        if report.when == "call" or report.outcome != "passed":
            detail = _reason(report) if report.failed else ""
            self.write(test=report.nodeid, outcome=report.outcome, detail=detail, seconds=round(report.duration, 3))


class Worker:
    """A Worker ends a worker of pytest-xdist that has lost its CUDA context, because all its later tests would fail."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if lost():
            os._exit(LOST)


def lost() -> bool:
    """Returns True if CUDA is in use in this process, and fails."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash is not None else str(report.longrepr or "")).strip()
    return (text.splitlines() or [""])[0][:DETAIL] if crash is not None else " ".join(text.split())[-DETAIL:]
