"""benchmarks/probe.py runs in small, and survives errors and a lost CUDA context."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import source_env

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import probe  # noqa: E402
import probe_models  # noqa: E402
import probe_pieces  # noqa: E402
from suites import Deadline, Recorder, Work  # noqa: E402

from fastbert.bench.results import FAILED, OK, Results  # noqa: E402

CPU = torch.device("cpu")
# What a row without an error is: a ceiling, a library beside ours, a share of a profile, a copy.
UNCHECKED = ("ceilings: ", "profile: ", "copies: ")


def probe_on(tmp_path, seconds=100.0):
    said = []
    return probe_pieces.Probe(
        CPU, Recorder(tmp_path / probe.FILE, CPU), Deadline(seconds), tiny=True, say=said.append
    ), said


@pytest.mark.slow
def test_every_piece_in_small(tmp_path):
    """Catches a piece that raises, a kernel that is wrong, or one that is measured and not compared with float64."""
    environment = {**os.environ, "PYTHONPATH": source_env()["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "benchmarks" / "probe.py"), "--out", str(tmp_path), "--dry", "--seconds", "3000"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = Results.load(tmp_path / probe.FILE)
    assert list(results.notes["sections"]) == list(probe.SECTIONS)
    assert {row.workload.split(": ")[0] for row in results.rows} == set(probe.SECTIONS)
    for row in results.rows:
        assert row.status == OK, row
        assert row.seconds is not None or row.rate is not None, row
        if not row.workload.startswith(UNCHECKED) and row.competitor != "SDPA":
            limit = 0.05 if "8 bits" in row.workload or row.dtype in ("fp8", "int8") else 0.01
            assert row.error is not None and row.error < limit, row
    models = [row for row in results.rows if row.workload.startswith("models: ")]
    assert [(row.dtype, row.competitor) for row in models] == [
        (dtype, label) for dtype in ("bfloat16", "fp8", "int8") for label in ("graphs", probe_models.DEPENDENT, "plain")
    ]
    assert all(row.extra["latency_us"] > 0 < row.extra["host_us"] and row.tokens_per_second > 0 for row in models)
    assert {"copy GB/s", "matmul bfloat16 TFLOP/s", "matmul fp8 TFLOP/s"} <= set(results.ceilings)
    text = "\n".join(probe.lines(results.rows))
    assert all(f"probe, {section}" in text for section in probe.SECTIONS)


def test_an_error_is_a_row(tmp_path):
    """Catches an error that ends the probe, a piece begun after its time, or a row without what was counted."""
    outcome, said = probe_on(tmp_path)
    outcome.section = "s"

    def fail(i):
        raise ValueError("the source of a kernel\nand what is wrong")

    outcome.measure("w", "bad", fail)
    exact = torch.ones(3, dtype=torch.float64)
    outcome.recorder.results.ceilings["copy GB/s"] = 1.0
    outcome.measure("w", "good", lambda i: torch.full((3,), 1.5), exact=exact, work=Work(n_bytes=1e6), tiles=7)
    outcome.deadline = Deadline(-1.0)
    outcome.measure("w", "late", fail)
    bad, good = Results.load(tmp_path / probe.FILE).rows
    assert (bad.status, bad.detail) == (FAILED, "ValueError: the source of a kernel and what is wrong")
    assert good.error == 0.5 and good.rate > 0 and good.extra == {"tiles": 7} and good.workload == "s: w"
    assert said[0].endswith("FAILED: " + bad.detail) and "error 5.00e-01 tiles 7" in said[1]


def test_sections_share_the_time(tmp_path, monkeypatch):
    """Catches a section that takes the time of the others, or one that raises and ends the probe."""
    outcome, _ = probe_on(tmp_path, seconds=90.0)
    shares = []
    sections = {
        "a": probe.Section(lambda probe: shares.append(probe.deadline.left), 1.0),
        "b": probe.Section(lambda probe: 1 / 0, 1.0),
        "c": probe.Section(lambda probe: shares.append(probe.deadline.left), 1.0),
    }
    monkeypatch.setattr(probe, "SECTIONS", sections)
    assert probe.probe_all(outcome, list(sections)) == 1
    assert shares[0] == pytest.approx(30.0, abs=3.0) and shares[1] == pytest.approx(90.0, abs=5.0)
    results = Results.load(tmp_path / probe.FILE)
    assert list(results.notes["sections"]) == ["a", "b", "c"] and "ZeroDivisionError" in results.rows[0].detail


PLANTED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels", {root!r} + "/benchmarks"]
import probe

def lose(found):
    found.add("w", "before it")
    def wait():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    found.wait = wait
    raise RuntimeError("planted")

names = list(probe.SECTIONS)
for name in names:
    probe.SECTIONS[name] = probe.Section(lambda found: found.add("w", "row"), 1.0)
probe.SECTIONS[names[1]] = probe.Section(lose, 1.0)
sys.exit(probe.main(sys.argv[1:]))
"""


def test_a_lost_context_costs_one_section(tmp_path):
    """Catches a kernel that reads where it may not and takes all later measurements with it."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(root=str(ROOT)))
    said = []
    command = [sys.executable, str(script)]
    assert probe.run(tmp_path, CPU, 300.0, tiny=True, say=said.append, command=command) == 1
    results = Results.load(tmp_path / probe.FILE)
    names = list(probe.SECTIONS)
    assert list(results.notes["sections"]) == names
    rows = [(row.workload.split(": ")[0], row.status) for row in results.rows]
    assert rows == [(names[0], OK), (names[1], OK), (names[1], FAILED), *((name, OK) for name in names[2:])]
    assert said == [f"the CUDA context was lost; going on with {', '.join(names[2:])}"]


def test_unknown_section(tmp_path, capsys):
    """Catches a misspelt section that is taken for all of them, or for none."""
    with pytest.raises(SystemExit):
        probe.main(["--out", str(tmp_path), "--dry", "--only", "gems"])
    assert "--only: got gems, expected some of ceilings, models, gemm" in capsys.readouterr().err


def test_cases_of_models():
    """Catches a model or a precision that no GPU run measures, or two cases with one name."""
    cases = probe_models.model_cases(tiny=False)
    assert {name for name, _, _ in cases} == {"BERT-base", "BERT-large", "MiniLM"}
    assert {precision for _, precision, _ in cases} == {None, "fp8", "int8"}
    names = [(probe_models.batch_name(name, lengths), precision) for name, precision, lengths in cases]
    assert len(set(names)) == len(names)
    assert probe_models.first_of([500, 90, 20, 3]) == [500, 90, 20] and probe_models.first_of([9, 4]) == [9, 4]
