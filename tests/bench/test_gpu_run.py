"""benchmarks/run_gpu.sh runs the tests on a GPU, keeps its time and leaves few files."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from helpers import source_env

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_options  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_pytest  # noqa: E402
import gpu_results  # noqa: E402
import gpu_tests  # noqa: E402
import kernel_ops  # noqa: E402
import report  # noqa: E402
import suite_kernels  # noqa: E402
import suites  # noqa: E402
from suites import Recorder  # noqa: E402

from fastbert.bench.peers import OURS  # noqa: E402
from fastbert.bench.results import FAILED, Results, Row  # noqa: E402

CPU = torch.device("cpu")
FILES = {"good": ("a/test_good.py",), "bad": ("a/test_bad.py", "a/test_other.py")}
COLLECTED = ["a/test_good.py::test_a", "a/test_bad.py::test_b[x]", "a/test_other.py::test_c"]
NOTHING = "incomplete, 0 passed, 0 failed, 0 skipped: pytest ended with exit code 4 before any test"
RAN = {
    "good": {"test": COLLECTED[0], "outcome": "passed", "detail": ""},
    "failed": {"test": COLLECTED[1], "outcome": "failed", "detail": "assert 1 == 2"},
    "passed": {"test": COLLECTED[1], "outcome": "passed", "detail": ""},
    "skipped": {"test": COLLECTED[2], "outcome": "skipped", "detail": ""},
}


@pytest.mark.parametrize(
    ("ran", "interrupted", "good", "bad"),
    [
        (("good", "passed", "skipped"), False, "passed, 1 passed, 0 failed, 0 skipped",
         "passed, 1 passed, 0 failed, 1 skipped"),
        (("passed", "failed"), True,
         "incomplete, 0 passed, 0 failed, 0 skipped, 1 not reached: the time was up before the last test",
         "failed, 0 passed, 1 failed, 0 skipped, 1 not reached: test_bad.py::test_b[x]: assert 1 == 2"),
        (("good", "failed", "passed", "skipped"), False, "passed, 1 passed, 0 failed, 0 skipped",
         "failed, 0 passed, 1 failed, 1 skipped: test_bad.py::test_b[x]: assert 1 == 2"),
        (None, False, NOTHING, NOTHING),
    ],
)  # fmt: skip
def test_verdicts(ran, interrupted, good, bad):
    """Catches a failure or an unreached test that passes, or one group's failure blamed on another."""
    record = [] if ran is None else [{"collected": COLLECTED}, *(RAN[name] for name in ran)]
    verdicts = gpu_tests.judge(record, FILES, 4, interrupted)
    assert {group: gpu_tests.summary(verdict) for group, verdict in verdicts.items()} == {"good": good, "bad": bad}


def test_a_failed_operation_is_refused_alone(tmp_path, monkeypatch):
    """Catches a model left untimed for any failed test, or an operation timed though its own tests failed."""
    verdicts = {
        "pooling": gpu_tests.Verdict(gpu_tests.PASSED),
        "linear": gpu_tests.Verdict(gpu_tests.FAILED, failed=1, detail="d"),
        "stalls": gpu_tests.Verdict(gpu_tests.FAILED, failed=1, detail="e"),
        "model": gpu_tests.Verdict(gpu_tests.INCOMPLETE),
    }
    Recorder(tmp_path / "tests.json", CPU).note(**gpu_tests.as_notes(verdicts))
    notes = suites.read_notes(tmp_path / "tests.json")
    assert gpu_tests.refusals(notes) == {"linear": "the tests of linear failed: d"}
    assert list(gpu_tests.failures(notes)) == ["linear", "stalls"]
    seen = {}
    monkeypatch.setattr(gpu_parts.ceilings, "cached", lambda *args, **kwargs: {})
    monkeypatch.setattr(gpu_parts, "run_cases", lambda cases, device, recorder, **options: seen.update(options))
    for part, refused in (("kernels", gpu_tests.refusals(notes)), ("model", {}), ("text", {})):
        assert gpu_parts.run(part, gpu_options.Options(tmp_path, "cpu"), 1.0) == 0
        assert seen["refused"] == refused
        assert Results.load(tmp_path / f"{part}.json").notes["failed_tests"] == [
            "the tests of linear failed: d", "the tests of stalls failed: e",
        ]  # fmt: skip
    assert gpu_tests.refusals(suites.read_notes(tmp_path / "absent.json")) == {}
    (tmp_path / "tests.json").write_text("{")
    with pytest.raises(ValueError, match="tests.json"):
        suites.read_notes(tmp_path / "tests.json")


def test_operations_of_the_suite_are_groups():
    """Catches an operation that is timed whatever its tests say, because no group has its name."""
    needs = {need for case in suite_kernels.cases("cuda") for need in case.needs}
    assert needs | {need for op in kernel_ops.OPS.values() for need in op.needs} <= set(gpu_tests.REFUSED)
    assert set(gpu_tests.REFUSED) <= set(gpu_tests.GROUPS)


@pytest.mark.slow
def test_every_test_of_the_device_is_in_a_group(request):
    """Catches a file of kernel tests that no group names and no run on a GPU has, or a group's file that is gone."""
    assert all((ROOT / name).exists() for files in gpu_tests.GROUPS.values() for name in files)
    tests = collected(request.session)
    groups = [gpu_tests.group_of(test, gpu_tests.GROUPS) for test in tests]
    assert len(tests) > 800 and list(dict.fromkeys(groups)) == list(gpu_tests.GROUPS)
    assert not any("test_wrong_shapes" in test for test in tests), "one that never touches the device"


WHOLE_FILE = re.compile(r"^(\w+ = )?pytest\.(importorskip|skip)\(|allow_module_level", re.MULTILINE)  # skips itself


def collected(session):
    """What the plugin chooses of all tests. They are collected anew only where this session has not collected them."""
    chosen_by_name = session.config.getoption("keyword") or session.config.getoption("markexpr")
    absent = set(ROOT.glob("tests/*/test_*.py")) - {item.path for item in session.items}
    if chosen_by_name or not all(WHOLE_FILE.search(path.read_text()) for path in absent):
        done = pytest_process("-p", "gpu_pytest", "--collect-only", "-q", "tests")
        assert done.returncode == 0, done.stdout[-3000:]
        return [line for line in done.stdout.splitlines() if "::" in line]
    hook = types.SimpleNamespace(pytest_deselected=lambda items: None)
    config = types.SimpleNamespace(getoption=lambda name: gpu_tests.GROUPS, hook=hook)
    items = list(session.items)
    gpu_pytest.pytest_collection_modifyitems(config, items)  # gpu_tests.place raises for a test of no group
    return [item.nodeid for item in items]


def pytest_process(*arguments, **changes):
    paths = os.pathsep.join([source_env()["PYTHONPATH"], str(ROOT / "benchmarks")])
    line = [sys.executable, "-c", gpu_tests.PYTEST, "-p", "no:cacheprovider", *arguments]
    env = source_env(**{"PYTHONPATH": paths, **changes})
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


TESTS = """
import os, time, pytest, torch

@pytest.fixture
def device():
    return torch.device("cpu")

@pytest.fixture
def broken():
    yield
    raise ValueError("planted in the teardown")

def test_{name}_first(device): pass
def test_{name}_without_a_device(): assert False
def test_{name}_teardown(device, broken): pass
@pytest.mark.skip(reason="no")
def test_{name}_skipped(device): pass
{more}
"""
SLOW = "def test_slow_one(device): time.sleep(100)"
CRASH = "def test_crash(device): os._exit(9)\ndef test_crash_after(device): pass"


def run_tests(tmp_path, seconds=100.0, workers=1, **bodies):
    for name, more in bodies.items():
        (tmp_path / f"test_{name}.py").write_text(TESTS.format(name=name, more=more))
    groups = {name: (str(tmp_path / f"test_{name}.py"),) for name in bodies}
    return gpu_tests.run(seconds, tmp_path, groups=groups, workers=workers)


def test_tests_run_and_leave_a_record(tmp_path):
    """Catches failures not seen or blamed on another group, tests without a device that are run, or a lost output."""
    verdicts, log = run_tests(tmp_path, good="", bad="def test_bad(device): assert 1 == 2, 'planted'")
    assert (verdicts["bad"].passed, verdicts["bad"].failed, verdicts["bad"].skipped) == (1, 2, 1), log
    assert (verdicts["good"].passed, verdicts["good"].failed, verdicts["good"].missed) == (1, 1, 0)
    assert "planted in the teardown" in verdicts["good"].detail
    assert "AssertionError: planted" in log and "without_a_device" not in log


@pytest.mark.slow
def test_tests_that_hang_are_stopped(tmp_path):
    """Catches a test that hangs and eats the whole run, or that loses what the tests before it found."""
    started = time.monotonic()
    verdicts, _ = run_tests(tmp_path, seconds=15.0, good="", slow=SLOW)
    assert time.monotonic() - started < 15.0 + gpu_tests.GRACE + 5.0
    assert verdicts["good"].passed == 1 and verdicts["slow"].missed == 1, verdicts


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="the package pytest-xdist is not installed")
def test_tests_in_many_processes(tmp_path):
    """Catches a process that a test ended and that is not replaced, or a record that each process writes."""
    verdicts, log = run_tests(tmp_path, workers=2, crash=CRASH, good="")
    assert verdicts["crash"].failed == 2 and verdicts["crash"].passed == 2 and verdicts["crash"].missed == 0, log
    assert "crashed" in str([line for line in gpu_tests._lines(tmp_path / "record.jsonl") if "test_crash" in str(line)])
    assert verdicts["good"].passed == 1 and verdicts["good"].failed == 1


def test_a_lost_context_ends_the_worker(monkeypatch):
    """Catches a worker that goes on without CUDA, so that all its later tests fail."""
    assert not gpu_pytest.lost()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    left = []
    monkeypatch.setattr(gpu_pytest.os, "_exit", left.append)
    gpu_pytest.Worker().pytest_runtest_teardown(None)

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    gpu_pytest.Worker().pytest_runtest_teardown(None)
    assert left == [gpu_pytest.LOST]


def test_kernels_are_compiled_ahead(tmp_path, monkeypatch):
    """Catches a compilation that fills no cache, takes the run's time without end, or whose findings are not seen."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("PYTHONPATH", source_env()["PYTHONPATH"])
    only = ("--kernel", "gelu", "--model", "minilm", "--dtype", "bf16")
    note = gpu_parts.compile_ahead(90, 300.0, only)
    assert note.startswith("ok: 0 of 4 kernels with findings") and "exit code 0" in note
    assert list((tmp_path / "triton").rglob("*.cubin"))
    assert gpu_parts.compile_ahead(90, 0.0, only) == "not all: stopped after 0 s"
    assert gpu_parts.compile_ahead(75, 300.0).startswith("nothing: ")
    monkeypatch.setattr(gpu_parts, "compile_ahead", lambda arch, seconds: f"sm_{arch}")
    monkeypatch.setattr(gpu_parts, "COMPILED", gpu_parts.COMPILED[:1])
    monkeypatch.setattr(gpu_parts.suite_kernels, "warm", lambda *what: None)
    assert gpu_parts.run("compile", gpu_options.Options(tmp_path, "cpu"), 60.0) == 0
    notes = Results.load(tmp_path / "compile.json").notes
    assert notes["compiled_ahead"].startswith("sm_") and notes["left"] == notes["kernels_found_compiled"] == 0
    assert list(notes["seconds_of_each_model"]) == ["BERT-base bfloat16"]


def results(part, *rows, ceilings=None, **notes):
    environment = {"device": "Test GPU", "commit": "c", "date": "2026-01-02 03:04 UTC"}
    return part, Results(environment, [Row(part, *row) for row in rows], ceilings or {}, notes)


def test_few_files_hold_all_of_it(tmp_path):
    """Catches rows, notes or ceilings lost on the way into the one result file, or more files than eight."""
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "tuned").mkdir(parents=True)
    (work / "tuned" / "test-gpu.json").write_text("{}")
    (work / "tests.log").write_text("planted\n")
    out.mkdir()
    verdicts = {"linear": gpu_tests.Verdict(gpu_tests.FAILED, failed=1, detail="d")}
    parts = dict([
        results("compile", compiled_ahead="ok"),
        results("tests", **gpu_tests.as_notes(verdicts)),
        results("ceilings", ceilings={"copy GB/s": 2.0}),
        results("probe", ("gemm: 1 x 2 x 3", "a tile", "bfloat16")),
        results("model", ("w", OURS, "bfloat16"), ("w", "eager", "bfloat16"), not_reached=["x", "y"]),
    ])  # fmt: skip
    for part, result in parts.items():
        result.save(work / f"{part}.json")
    gpu_results.publish(work, out, {"compile": 0, "tests": 1, "model": 124})
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "results.json", "summary.txt", "tests.log", "tuned/test-gpu.json",
    ]  # fmt: skip
    summary = (out / "summary.txt").read_text()
    for text in ("tests of linear: failed, 0 passed, 1 failed", "model: not_reached: 2, the first x", "probe, gemm",
                 "  1 x 2 x 3: a tile", "model: cut short: over its time", "tests: done, but something"):  # fmt: skip
        assert text in summary, summary
    whole = report.load(out)
    assert len(whole.rows) == 3 and whole.ceilings == {"copy GB/s": 2.0}
    again = gpu_results.separated(Results.load(out / "results.json"))
    assert {part: (result.rows, result.ceilings, result.notes) for part, result in again.items()} == {
        part: (result.rows, result.ceilings, result.notes) for part, result in parts.items()
    }


def test_a_later_run_goes_on_from_the_files(tmp_path):
    """Catches results that a later run into the same folder loses, or that it takes over from other sources."""
    out = tmp_path / "out"
    results("model", ("w", OURS, "bfloat16"), ceilings={"copy GB/s": 2.0})[1].save(out / "results.json")
    (out / "tests.log").write_text("planted\n")
    for commit, plan, files in (
        ("c", ["text"], ["ceilings.json", "model.json", "tests.log"]),
        ("c", ["model", "tests"], ["ceilings.json"]),
        ("d", ["text"], []),
    ):
        work = tmp_path / f"work-{commit}-{plan[0]}"
        work.mkdir()
        gpu_results.resume(out, work, plan, commit)
        assert sorted(path.name for path in work.iterdir()) == files
    gpu_results.resume(tmp_path / "nowhere", work, ["text"], "c")


PART = """
import subprocess, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
part, seconds, out = args["--part"], float(args["--seconds"]), args["--out"]
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
open(out + "/" + part + ".started", "w").write(str(seconds))
if part == "tests":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(out + "/child", "w").write(str(child.pid))
    time.sleep(60)
if part == "kernels":
    import torch
    from fastbert.bench.results import Results, Row, environment
    row = Row("kernels", "w", "fastbert", "float32", status="failed", detail="the tests of x failed")
    Results(environment(torch.device("cpu")), [row]).save(out + "/kernels.json")
    sys.exit(1)
"""


def test_run_keeps_its_time_and_what_it_has(tmp_path, monkeypatch):
    """Catches a part that hangs and takes the run with it, leaves processes behind, or costs the others their turn."""
    script = tmp_path / "part.py"
    script.write_text(PART.format(root=str(ROOT)))
    monkeypatch.setattr(gpu, "WEIGHTS", {"tests": 1, "ceilings": 1, "kernels": 40, "model": 1})
    monkeypatch.setattr(gpu, "GRACE", 3.0)
    options = gpu_options.Options(tmp_path, "cpu", minutes=(30.0 + gpu.RESERVE) / 60)
    started = time.monotonic()
    plan = ["tests", "ceilings", "kernels", "model"]
    monkeypatch.setattr(gpu, "PUBLISH", 2.0)
    out, published = tmp_path / "out", []
    out.mkdir()

    def publish(ended):
        published.append(dict(ended))
        gpu_results.publish(tmp_path, out, ended)

    ended = gpu.run_plan(plan, options, {}, [sys.executable, str(script)], publish)
    assert time.monotonic() - started < 40.0
    assert ended == {"tests": 124, "ceilings": 0, "kernels": 1, "model": 0}
    seconds = {part: float((tmp_path / f"{part}.started").read_text()) for part in plan}
    assert seconds["tests"] < 1.0 < seconds["kernels"] and sum(seconds[p] for p in plan[:3]) < 31.0
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    assert published[0] == {} and published[-1] == ended, "nothing is published while a part runs"
    summary = (out / gpu_results.SUMMARY).read_text()
    assert "the tests of x failed" in summary and "tests: cut short: over its time" in summary
    assert Results.load(out / gpu_results.RESULTS).rows[0].status == FAILED
    assert gpu.run_plan(["model"], gpu_options.Options(tmp_path, "cpu", minutes=0.01), {}) == {"model": 125}


def test_plan():
    """Catches parts that run unasked, in the wrong order, or without the ceilings they are compared with."""
    nowhere = Path("/nonexistent")
    assert gpu.planned(None, False, nowhere) == ["compile", "tests", "probe", "model"] == list(gpu.PLAN)
    assert gpu.planned(["tests"], False, nowhere) == ["tests"]
    assert gpu.planned(["model", "kernels"], False, nowhere) == ["compile", "ceilings", "model", "kernels"]
    assert gpu.planned(["tune"], True, nowhere) == ["tune", "sanitizer"]
    assert gpu.planned(["train"], False, nowhere) == ["compile", "ceilings", "train"]
    assert set(gpu.WEIGHTS) == set(gpu.PARTS) == set(gpu_parts.RUN)
    # One run leaves time for a second within a quarter of an hour, of which a machine's start takes minutes.
    assert sum(gpu.WEIGHTS[part] for part in gpu.PLAN) == 60 * gpu.MINUTES == 450
    assert 110 <= gpu.WEIGHTS["tests"] - gpu_tests.GRACE <= 125 and gpu.WEIGHTS["probe"] == 170


def shell(*arguments, **environment):
    script = ROOT / "benchmarks" / "run_gpu.sh"
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", str(script), *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_run_gpu_script(tmp_path):
    """Catches a script that does not parse, whose help needs a GPU, or that ends in a traceback without one."""
    script = ROOT / "benchmarks" / "run_gpu.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = shell("--help")
    assert done.returncode == 0 and "--minutes" in done.stdout and "sanitizer" in done.stdout
    done = shell("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("error: no NVIDIA GPU found")
    assert not (tmp_path / "out").exists()
    done = shell("--out", str(tmp_path / "out"), "--only", "tune")
    assert done.returncode == 2 and done.stderr.startswith("error: no NVIDIA GPU found")
    done = shell("--help", PYTHON="/nonexistent/python")
    assert done.returncode == 2 and "not found" in done.stderr
