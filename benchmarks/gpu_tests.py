"""The tests on a GPU run in one pytest of many processes. They compile in parallel, and one lost CUDA context ends only
one.

The plugin gpu_pytest.py chooses the tests, orders them and keeps a record.

The results of the tests decide which operations may be timed: `refusals` names the failed ones, with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPS = ("attention", "embedding", "gelu", "layer_norm", "linear", "pooling")


def _files(*names: str) -> tuple[str, ...]:
    """Returns paths of test files: "ops/op_gelu" is tests/ops/test_op_gelu.py."""
    return tuple(f"tests/{folder}/test_{name}.py" for folder, _, name in (each.partition("/") for each in names))


# Group of tests -> its test files, in order of importance for an interrupted run. Half of all kernels are in 8 bits.
GROUPS: dict[str, tuple[str, ...]] = {
    **{op: _files(f"ops/op_{op}") for op in OPS},
    "attention": _files("ops/op_attention", "on_kernels/attention_short", "on_kernels/attention_tiles"),
    "disentangled": _files(
        "ops/disentangled", "ops/disentangled_gradients", "ops/disentangled_compile", "models/deberta_gradients"
    ),
    "attention_backward": _files("ops/attention_backward", "ops/position_bias", "ops/window_backward"),
    "dropout": _files("ops/dropout_kernels"),
    "training_rows": _files(
        "ops/residual_norm_kernels", "ops/activation_backward", "ops/embedding_kernels", "ops/pooling_backward"
    ),
    "training_layer": _files(
        "ops/training_triton", "ops/training_forms", "ops/strided_gradients", "engine/training_families"
    ),
    "linear": _files("ops/op_linear", "ops/op_linear_persistent", "ops/op_linear_variants", "ops/gated_linear"),
    "cross_entropy": _files("ops/op_cross_entropy"),
    "rotary": _files("ops/rotary_kernels", "on_kernels/rotary_models"),
    "graphs": _files(
        "engine/graphs",
        "engine/graph_buckets",
        "engine/graph_validity",
        "engine/graph_capture",
        "engine/graphs_gpu",
        "ops/unpack_kernel",
        "engine/masks_on_device",
        "engine/graphs_deberta",
    ),
    "model": _files(
        "models/model",
        "models/model_training",
        "models/model_packed",
        "models/model_compile",
        "models/heads",
        "models/losses",
        "engine/launched",
        "engine/launched_families",
    ),
    "batch_invariant": _files("engine/batch_invariant"),
    "text": _files("pipelines/sentence", "pipelines/sentence_run"),
    "dispatch": _files("ops/dispatch", "on_kernels/launch", "ops/ops_compile"),
    "bad_input": _files("models/bad_input", "models/empty_input"),
    "families": _files(
        "models/families",
        "models/mpnet",
        "models/deberta",
        "models/jina_bert_code",
        "models/jina_bert_v2",
        "models/pretrained",
        "pipelines/cross_encoder",
        "adapters/accelerate_wrapped",
    ),
    "verify": _files(
        "diagnostics/verify",
        "diagnostics/verify_faults",
        "diagnostics/verify_ends",
        "diagnostics/verify_gradients",
        "diagnostics/explain",
        "diagnostics/explain_recording",
    ),
    "stalls": _files("diagnostics/no_stall"),
    "host": _files(
        "ops/contexts",
        "ops/copies",
        "ops/silent_writes",
        "on_kernels/jit",
        "engine/graph_streams",
        "engine/late_checks",
        "pipelines/sentence_inputs",
    ),
    "peers": _files("bench/bench_peers"),
    "memory": _files("engine/memory"),
    "tune": _files("tune/tune", "tune/tune_gated"),
    "quantized": _files(
        "ops/op_quantized",
        "ops/op_quantized_parts",
        "ops/op_quantized_persistent",
        "engine/quantized",
        "engine/quantized_families",
        "engine/graphs_quantized",
    ),
    # This is last because a wrong kernel with specialised warps may not end.
    "specialized": _files("ops/specialized_on_a_gpu"),
}
REFUSED = (*OPS, "quantized")  # the groups that are an operation of the kernel suite
SELECTION = ("-m", "gpu or not slow")
# This is how the command `pytest` runs: `python -m pytest` would put the working folder, with its folder kernels/, on
# the path.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.console_main())"
GRACE = 5.0  # seconds that pytest has to print its failures after an interrupt
WORKERS = 14
LOG = 1_000_000  # characters of pytest's output that are kept, the last ones

PASSED, FAILED, INCOMPLETE = "passed", "failed", "incomplete"


@dataclass
class Verdict:
    """A Verdict is the outcome of the tests of one group. incomplete: none failed, but the time ended before the last
    test.
    """

    status: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    missed: int = 0
    detail: str = ""


def place(test: str, groups: Mapping[str, Sequence[str]] = GROUPS) -> int:
    """Returns the place of a test's group in the order. Raises ValueError for a test without a group."""
    return list(groups).index(group_of(test, groups))


def group_of(test: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Returns the group of a test, which pytest calls "tests/test_x.py::test_y[z]"."""
    name = Path(test.partition("::")[0]).name
    for group, files in groups.items():
        if name in (Path(file).name for file in files):
            return group
    raise ValueError(f"{test}: in no group of tests; add its file to gpu_tests.GROUPS")


def run(
    seconds: float,
    folder: Path,
    *,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Verdict], str]:
    """Runs all groups within `seconds`, with some more for the end of pytest. Returns their verdicts and pytest's
    output.

    folder: for that output and the record of the tests. workers: the number of processes; 1 is pytest's own process
    alone, also if pytest-xdist is not installed.
    """
    record, log = folder / "record.jsonl", folder / "pytest.log"
    if workers is None:
        workers = max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
    spread = []
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        # A worker gets at most two tests ahead, so that they run in about the order of the groups.
        spread = ["-n", str(workers), "--maxschedchunk", "2", "--max-worker-restart", str(4 * workers)]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short", "-p", "gpu_pytest"]
    files = [file for files in groups.values() for file in files]
    options += [f"--record={record}", f"--groups={json.dumps(groups)}"]
    command = [sys.executable, "-c", PYTEST, *options, *spread, *SELECTION, *files]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        interrupted = _wait(process, seconds)
    verdicts = judge(_lines(record), groups, process.returncode, interrupted)
    for group, verdict in verdicts.items():
        say(f"tests of {group}: {summary(verdict)}")
    return verdicts, log.read_text(errors="replace")[-LOG:]


def judge(
    record: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]], returncode: int, interrupted: bool
) -> dict[str, Verdict]:
    """Returns the verdicts from a record and pytest's exit code. A test with two lines counts as its worse one."""
    expected: dict[str, set[str]] = {group: set() for group in groups}
    outcomes: dict[str, dict[str, str]] = {group: {} for group in groups}
    details: dict[str, str] = {}
    collected = False
    for line in record:
        for test in line.get("collected", ()):
            collected = True
            expected[group_of(test, groups)].add(test)
        if "test" in line:
            group, test, outcome = group_of(line["test"], groups), line["test"], line["outcome"]
            if outcomes[group].get(test) != "failed":
                outcomes[group][test] = outcome
            if outcome == "failed":
                details.setdefault(group, f"{test.rpartition('/')[2]}: {line['detail']}"[:300])
    return {
        group: _verdict(expected[group], outcomes[group], details.get(group, ""), collected, returncode, interrupted)
        for group in groups
    }


def _verdict(
    expected: set[str], outcomes: Mapping[str, str], detail: str, collected: bool, returncode: int, interrupted: bool
) -> Verdict:
    counts = {name: sum(outcome == name for outcome in outcomes.values()) for name in ("passed", "failed", "skipped")}
    missed = len(expected - outcomes.keys())
    if counts["failed"]:
        return Verdict(FAILED, **counts, missed=missed, detail=detail)
    if missed or not collected:
        why = "the time was up" if interrupted else f"pytest ended with exit code {returncode}"
        return Verdict(
            INCOMPLETE, **counts, missed=missed, detail=f"{why} before {'the last' if collected else 'any'} test"
        )
    return Verdict(PASSED, **counts)


def summary(verdict: Verdict) -> str:
    """Returns a verdict in a line."""
    counts = f"{verdict.passed} passed, {verdict.failed} failed, {verdict.skipped} skipped"
    counts += f", {verdict.missed} not reached" if verdict.missed else ""
    return f"{verdict.status}, {counts}" + (f": {verdict.detail}" if verdict.detail else "")


def failures(notes: Mapping[str, Any]) -> dict[str, str]:
    """Returns group -> its first failure, for groups with a failed test, from the notes of the tests' results."""
    return {
        group: f"the tests of {group} failed: {verdict['detail']}"
        for group, verdict in notes.get("tests", {}).items()
        if verdict["status"] == FAILED
    }


def refusals(notes: Mapping[str, Any]) -> dict[str, str]:
    """Returns operation -> the reason why it is not timed alone, from the notes of the tests' result file.

    A model and a text's vector are not refused: their own output is compared with float64 before they are timed.
    `failures` are shown beside them.
    """
    return {group: reason for group, reason in failures(notes).items() if group in REFUSED}


def as_notes(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {"tests": {group: asdict(verdict) for group, verdict in verdicts.items()}}


def _lines(record: Path) -> list[dict[str, Any]]:
    """Returns the lines of the record, without a last line that was cut short."""
    records = []
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _wait(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Waits. Returns True if the process had to be interrupted; pytest then still prints its failures so far."""
    interrupted = False
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        interrupted = True
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    # The process has its own process group, so workers that hang in the driver end with it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return interrupted
