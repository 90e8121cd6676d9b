"""The suite host measures what it says it does, on a machine without a GPU, and a failure becomes a row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastbert.bench.results import FAILED, OK, Results
from fastbert.bench.tables import contest_table, contests
from process_cases import run_beside_tests

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import suite_host  # noqa: E402

CHILD = """
import stub_driver, host_child

sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256}
host_child.SIZES = {"small": sizes}
host_child.FAMILIES = {"ModernBERT": {**sizes, "model_type": "modernbert", "vocab_size": 100, "pad_token_id": 0}}
host_child.LENGTHS = {"1x128": [128], "32x128": [20, 30]}
host_child.SAMPLES = 3
host_child.main(0.2)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_beside_tests(CHILD, cache=tmp_path_factory.mktemp("cache"))


def test_every_row_is_measured(measured: list[dict[str, Any]]) -> None:
    """Catches a replay that is none, a launch path with other launches than a layer has, or a time of nothing."""
    rows = list(suite_host.rows(measured))
    by_setting: dict[str, Any] = {}
    for row in rows:
        by_setting.setdefault(row.extra["setting"], []).append(row)
        assert row.status == OK and 0 < row.seconds < 1
    assert set(suite_host.BARS) <= set(by_setting)
    layer, of_family = by_setting["layer, plain path"]
    assert layer.extra["launches"] == 2 * 4  # the other three of a layer are cuBLAS's
    assert of_family.extra["launches"] == 2 * 5  # beside four of cuBLAS's
    forwards = by_setting["forward, plain path"]
    assert all(row.extra["launches"] == 2 * 4 + 2 for row in forwards)  # the embeddings, and a look at the weights
    before, whole = (by_setting[f"replay, {part}"] for part in ("before the launch", "in all"))
    for first, all_of_it in zip(before, whole, strict=True):
        assert first.workload == all_of_it.workload and first.seconds < all_of_it.seconds
    for name in ("operation", "kernel alone"):
        assert len(by_setting[name]) == 3 and all(row.extra["launches"] == 1 for row in by_setting[name])
    assert all(row.extra["bar_seconds"] == suite_host.BARS["layer, plain path"] for row in (layer, of_family))


def test_rows_of_a_layer_and_the_page(tmp_path: Path) -> None:
    """Catches the time of a whole encoder under the name of a layer, and bars or calls that the page leaves out."""
    each = {"workload": "1x128", "model": "m", "setting": "layer, plain path", "samples": [12e-4, 12e-4], "n": 12}
    (row,) = suite_host.rows([{**each, "calls": 1200, "launches": 48}])
    assert row.seconds == pytest.approx(1e-4) and row.extra["python_calls"] == 100
    path = tmp_path / "host.json"
    Results({"device": "d", "date": "x"}, [row]).save(path)
    (contest,) = contests(Results.load(path).rows)
    table = contest_table(contest)
    cells = dict(zip(table.header[1:], table.lines[0].cells, strict=True))
    assert cells["Python calls"] == "100" and cells["bar of the time"] == "≤ 90.0 µs"


def test_a_process_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that fails or hangs and takes the other suites along."""
    script = tmp_path / "child.py"
    script.write_text("import sys; sys.exit('planted')")
    monkeypatch.setattr(suite_host, "SCRIPT", script)
    (row,) = suite_host.run(0.1)
    assert (row.status, row.detail) == (FAILED, "planted")
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(suite_host, "COMPILING", 0.5)
    (row,) = suite_host.run(0.1)
    assert row.status == FAILED and row.detail.startswith("not done within")
