"""Each function here is one part of a run on a GPU, in its own process (see gpu.py). The device may also be a CPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ceilings
import gpu_tests
import probe
import suite_kernels
import suite_model
import suite_quantized
import suite_start
import suite_text
import suite_train
import torch
from gpu_options import Options
from suites import LONG_MINUTES, Case, Deadline, Recorder, read_notes, run_cases

import models
from fastbert.bench.peers import OURS
from fastbert.bench.results import OK
from fastbert.ops import quantized
from fastbert.tune import search
from fastbert.tune.jobs import TOKENS, default_models, jobs_of

# The models and precisions that are compiled ahead: all that the suites time.
COMPILED = (
    ("BERT-base", "bfloat16"), ("BERT-large", "bfloat16"), ("MiniLM", "bfloat16"),
    ("BERT-base", "float16"), ("BERT-base", "float32"),
)  # fmt: skip


def run(part: str, options: Options, seconds: float) -> int:
    """Runs one part. Returns its exit code."""
    device = torch.device(options.device)
    return RUN[part](options, device, seconds)


def compile_kernels(options: Options, device: torch.device, seconds: float) -> int:
    """Fills the cache of compiled kernels: first all of them ahead of time, then those that the suites time, on the
    device.

    The second step finds them all compiled, unless the two steps use different keys of the cache. Both counts are
    noted.
    """
    from fastbert_kernels import events, launch

    recorder = Recorder(options.out / "compile.json", device)
    deadline = Deadline(seconds)
    arch = launch.arch(device)
    recorder.note(compiled_ahead=compile_ahead(arch, 0.7 * deadline.left))
    before, taken = events.counts(), {}
    for name, warm in _warmups(device):
        if deadline.left <= 0:
            break
        started = time.monotonic()
        warm()
        taken[name] = round(time.monotonic() - started, 2)
    new_events = {what: n - before[what] for what, n in events.counts().items()}
    recorder.note(
        seconds_of_each_model=taken, kernels_found_compiled=new_events["loads"], left=new_events["compilations"]
    )
    _say(f"{new_events['loads']} kernels of the suites were compiled ahead, {new_events['compilations']} were not")
    return 0


def compile_ahead(arch: int, seconds: float, only: Sequence[str] = ()) -> str:
    """Compiles the kernels for one architecture into Triton's cache by many processes. Returns the notes.

    only: more arguments of the offline compile.
    """
    from fastbert_kernels import launch

    if arch not in launch.SHARED_MEMORY:
        return f"nothing: the offline compile does not know sm_{arch}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    jobs = str(max(1, (os.cpu_count() or 2) - 1))
    line = [sys.executable, "-m", "fastbert_kernels.offline", "--arch", str(arch), "--jobs", jobs, *only]
    started = time.monotonic()
    try:
        done = subprocess.run(line, env=environment, timeout=max(1.0, seconds), capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"not all: stopped after {seconds:.0f} s"
    last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
    return f"{last[0]} (exit code {done.returncode}, {jobs} processes, {time.monotonic() - started:.0f} s)"


def _warmups(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Returns the names of the kernels to compile, and calls that compile each one unless it is compiled already."""
    for model, dtype in COMPILED:
        yield f"{model} {dtype}", functools.partial(suite_kernels.warm, device, model, dtype)
    for precision in _precisions(device):
        for model in {model: None for model, _, timed in suite_quantized.CUDA_ROUNDS if timed == precision}:
            yield f"{model} {precision}", functools.partial(suite_quantized.warm, device, model, precision)


def tests(options: Options, device: torch.device, seconds: float) -> int:
    recorder = Recorder(options.out / "tests.json", device)
    with tempfile.TemporaryDirectory() as folder:
        verdicts, log = gpu_tests.run(seconds - gpu_tests.GRACE, Path(folder), say=_say)
    recorder.note(**gpu_tests.as_notes(verdicts))
    (options.out / "tests.log").write_text(log)
    return int(any(verdict.status != gpu_tests.PASSED for verdict in verdicts.values()))


def probed(options: Options, device: torch.device, seconds: float) -> int:
    return probe.run(options.out, device, seconds, tiny=options.quick, model=options.model, say=_say)


def measure_ceilings(options: Options, device: torch.device, seconds: float) -> int:
    for name, value in ceilings.cached(device, options.out, quick=options.quick).items():
        _say(f"{name}: {value:,.4g}")
    return 0


def kernels(options: Options, device: torch.device, seconds: float) -> int:
    cases = suite_kernels.cases(device.type)
    n_first = len(cases) // len(suite_kernels.CUDA_ROUNDS)  # models in 16 bits come before all in 8 bits
    cases = [*cases[:n_first], *suite_quantized.cases(device.type), *cases[n_first:]]
    return _suite("kernels", cases, options, device, seconds)


def model(options: Options, device: torch.device, seconds: float) -> int:
    long = options.minutes >= LONG_MINUTES
    return _suite("model", suite_model.cases(device.type, long=long), options, device, seconds)


def text(options: Options, device: torch.device, seconds: float) -> int:
    weights = models.text_model_name(options.model)
    cases = suite_text.cases(device.type, options.model, long=options.minutes >= LONG_MINUTES)
    return _suite("text", cases, options, device, seconds, weights=weights)


def train(options: Options, device: torch.device, seconds: float) -> int:
    long = options.minutes >= LONG_MINUTES
    return _suite("train", suite_train.cases(device.type, long=long), options, device, seconds)


def start(options: Options, device: torch.device, seconds: float) -> int:
    """Measures cold start, first with empty caches of compiled kernels, then with the caches of that first start."""
    recorder = Recorder(options.out / "start.json", device)
    deadline = Deadline(seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, name = models.text_model(options.model), models.text_model_name(options.model)
        recorder.note(weights=name)
        own = {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        for caches, rounds, share in (("empty", 1, 0.5), ("filled", 3, 1.0)):
            rows = suite_start.run(
                checkpoint,
                device,
                "bfloat16" if device.type == "cuda" else "float32",
                workload=f"import to first vector, {caches} kernel caches",
                model=name,
                rounds=rounds,
                max_seconds=share * deadline.left,
                environment=own,
            )
            recorder.add(rows)
    return 0


def tuned_table(options: Options, device: torch.device, seconds: float) -> int:
    """Makes the table of `fastbert tune` for this GPU, in the folder of the results and not in the cache."""
    recorder = Recorder(options.out / "tune.json", device)
    obstacle = search.device_obstacle(device)
    if obstacle is not None:
        recorder.note(tuned_table=f"not made: {obstacle}")
        return 0
    from fastbert_kernels import launch, tables

    name, arch = torch.cuda.get_device_name(device), launch.arch(device)
    tokens = TOKENS[:1] if options.quick else TOKENS
    jobs = jobs_of(default_models(), [torch.bfloat16], arch, precisions=_precisions(device))
    # The table has a separate folder: it is no result file.
    path, deadline, outcomes = options.out / "tuned" / tables.file_name(name), Deadline(seconds), []
    for job in jobs:
        if deadline.left <= 0:
            break
        outcomes += search.tune([job], device, tokens, say=_say)
        search.write(search.table_of(outcomes, name, arch, tokens), path)
    recorder.note(tuned_table=f"tuned/{path.name}", tuned_shapes=f"{len(outcomes)} of {len(jobs)}")
    return int(len(outcomes) < len(jobs) or any(outcome.best() is None for outcome in outcomes))


def sanitizer(options: Options, device: torch.device, seconds: float) -> int:
    """Runs compute-sanitizer's memcheck on each kernel, on a few tokens of several lengths."""
    recorder = Recorder(options.out / "sanitizer.json", device)
    tool = shutil.which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        recorder.note(sanitizer="not run: compute-sanitizer is not installed, or there is no GPU")
        return 0
    call = "import suite_kernels, torch; suite_kernels.warm(torch.device('cuda'), 'MiniLM', 'float16')"
    line = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*line, sys.executable, "-c", call], cwd=Path(__file__).parent, env=environment, timeout=seconds,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        recorder.note(sanitizer=f"not finished within {seconds:.0f} s")
        return 1
    last = (done.stdout + done.stderr).strip().splitlines()[-20:]
    recorder.note(sanitizer="clean" if done.returncode == 0 else "\n".join(last))
    _say(f"compute-sanitizer: exit code {done.returncode}")
    return int(done.returncode != 0)


def _suite(
    part: str, cases: Sequence[Case], options: Options, device: torch.device, seconds: float, **notes: Any
) -> int:
    """Runs the cases of a suite into its result file. The exit code is 1 if fastbert itself failed or was wrong in a
    case.
    """
    deadline = Deadline(seconds)
    known_ceilings = ceilings.cached(device, options.out, quick=options.quick)
    recorder = Recorder(options.out / f"{part}.json", device, known_ceilings)
    tested = read_notes(options.out / "tests.json")
    recorder.note(**notes, tests="run before" if tested else "not run", **_remarks(tested))
    # For a model and for a text, failed tests are a remark: both are checked against float64 before they are timed.
    refused = gpu_tests.refusals(tested) if part == "kernels" else {}
    run_cases(cases, device, recorder, deadline=deadline, refused=refused, quick=options.quick, say=_say)
    ours = [row for row in recorder.results.rows if row.competitor == OURS]
    return int(any(row.status != OK for row in ours))


def _remarks(tested: Mapping[str, Any]) -> dict[str, Any]:
    failures = gpu_tests.failures(tested)
    return {"failed_tests": list(failures.values())} if failures else {}


def _precisions(device: torch.device) -> list[str]:
    """Returns the 8-bit precisions in which this GPU multiplies; none on a CPU."""
    if device.type != "cuda":
        return []
    return [name for name in quantized.PRECISIONS if quantized.device_obstacle(name, device) is None]


def _say(text: str) -> None:
    print(f"         {text}", flush=True)


RUN: dict[str, Callable[[Any, torch.device, float], int]] = {
    "compile": compile_kernels,
    "tests": tests,
    "probe": probed,
    "ceilings": measure_ceilings,
    "kernels": kernels,
    "model": model,
    "text": text,
    "start": start,
    "train": train,
    "tune": tuned_table,
    "sanitizer": sanitizer,
}
