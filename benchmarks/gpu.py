"""Runs everything on one GPU within a time budget: each part a process of its own, most important first.

    benchmarks/run_gpu.sh --out DIR                          all of it, within 9 minutes
    benchmarks/run_gpu.sh --out DIR --only kernels model     some parts

A part writes its result file as it goes, so that a run that is cut short keeps what it has. What failed its tests is
not timed. Nothing changes the GPU's clocks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PLAN = ("compile", "tests", "ceilings", "kernels", "model", "text", "start")
# Seconds of a run of nine minutes; what a part leaves over goes to those after it.
WEIGHTS = {
    "compile": 35, "tests": 160, "ceilings": 20, "kernels": 90, "model": 110, "text": 50, "start": 60, "tune": 240,
    "sanitizer": 100,
}  # fmt: skip
EMPTY = {"train": "there is no training yet, so nothing to time"}
TIMED = ("kernels", "model", "text")  # these need compiled kernels, and ceilings to be compared with
PARTS = (*PLAN, *EMPTY, "tune", "sanitizer")
TABLE = "table.txt"
RESERVE = 5.0  # seconds kept for the table
GRACE = 10.0  # seconds that a part may take beyond its own before it is ended, and a third of its own besides


@dataclass(frozen=True)
class Options:
    out: Path
    device: str = "cuda"
    minutes: float = 9.0
    model: Path | None = None
    quick: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all parts ran to an end; 1: a part failed, was cut short, or tests failed; 2: could not start."""
    args = parse(arguments)
    options = Options(args.out.resolve(), args.device, args.minutes, args.model and args.model.resolve(), args.quick)
    if args.part is not None:
        import gpu_parts

        return gpu_parts.run(args.part, options, args.seconds)
    plan = planned(args.only, args.sanitizer, options.out)
    for part in plan:
        if part in EMPTY:
            print(f"{part}: {EMPTY[part]}")
    plan = [part for part in plan if part not in EMPTY]
    if not plan:
        return 0
    problem = unable(options.device)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for part in plan:
        for old in (options.out / f"{part}.json", options.out / f"{part}.log"):
            old.unlink(missing_ok=True)
    with caches() as environment, interruptible():
        ended = run_plan(plan, options, environment)
    print((options.out / TABLE).read_text(), end="")
    print(f"results in {options.out}")
    return 0 if all(code == 0 for code in ended.values()) else 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run_gpu.sh",
        description="GPU tests, ceilings, suites and peers on one NVIDIA GPU: JSON in DIR and a short table.",
        epilog="Example: benchmarks/run_gpu.sh --out results --only tests kernels --minutes 5",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where results go; made if missing")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="for all parts together, 9 by default")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint for the text suite, else MiniLM's")
    parser.add_argument("--sanitizer", action="store_true", help="run compute-sanitizer on each kernel as well")
    parser.add_argument("--quick", action="store_true", help="few rounds and small workloads, to try the machinery")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def planned(only: Sequence[str] | None, sanitizer: bool, out: Path) -> list[str]:
    """The parts to run, in order: those asked for and what they need that is not in `out` yet."""
    wanted = set(only or PLAN) | ({"sanitizer"} if sanitizer else set())
    if wanted & set(TIMED):
        wanted |= {"compile"} if (out / "ceilings.json").exists() else {"compile", "ceilings"}
    return [part for part in PARTS if part in wanted]


def unable(device: str) -> str | None:
    """Why nothing can run here, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no PyTorch. Name an interpreter that has: PYTHON=/path/to/python3"
    if device == "cuda" and not torch.cuda.is_available():
        return (
            "no NVIDIA GPU found (torch.cuda.is_available() is False), and there is nothing here for other devices. "
            "On a CPU: make bench"
        )
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return f"the kernels need compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
    return None


def run_plan(
    plan: Sequence[str], options: Options, environment: Mapping[str, str], command: Sequence[str] | None = None
) -> dict[str, int]:
    """Runs the parts one after the other; returns their exit codes, 124 for one cut short, 125 for one not reached.

    command: what starts a part, for tests.
    """
    started = time.monotonic()
    end = started + 60.0 * options.minutes - RESERVE
    ended: dict[str, int] = {}
    for number, part in enumerate(plan):
        left = end - time.monotonic()
        if left < 1.0:
            _say(started, f"{part}: not reached, the time is up")
            ended[part] = 125
            continue
        weights = [WEIGHTS[later] for later in plan[number:]]
        seconds = min(left, left * weights[0] / sum(weights))
        _say(started, f"{part}: up to {seconds:.0f} s")
        line = [*(command or (sys.executable, str(Path(__file__).resolve()))), *part_arguments(part, options, seconds)]
        # A part stops by itself when its seconds are up; the rest is for the work it cannot interrupt.
        ended[part] = run_part(line, environment, min(4 / 3 * seconds + GRACE, end - time.monotonic()))
        _say(started, f"{part}: {_ending(ended[part])}")
        write_table(options.out, ended)
    write_table(options.out, ended)
    return ended


def part_arguments(part: str, options: Options, seconds: float) -> list[str]:
    line = ["--part", part, "--seconds", f"{seconds:.1f}", "--minutes", f"{options.minutes:g}"]
    line += ["--out", str(options.out), "--device", options.device]
    line += ["--model", str(options.model)] if options.model else []
    return line + (["--quick"] if options.quick else [])


def run_part(line: Sequence[str], environment: Mapping[str, str], seconds: float) -> int:
    """The exit code of a process that is ended, with all it started, after `seconds` (then 124)."""
    process = subprocess.Popen(line, env={**os.environ, **environment}, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        # Its own process group: what it started goes with it, also after an interrupt.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_table(out: Path, ended: Mapping[str, int]) -> None:
    """The short table of these parts' result files, and what did not run to its end."""
    from report import combined

    from fastbert.bench.report import render_terminal
    from fastbert.bench.results import Results

    found = {part: Results.load(out / f"{part}.json") for part in ended if (out / f"{part}.json").exists()}
    lines = []
    if found:
        results = combined(found, str(out))
        lines = [render_terminal(results, width=140, summary_only=True)]
        lines += [_note(name, value) for name, value in results.notes.items() if value]
    lines += [f"{part}: {_ending(code)}" for part, code in ended.items() if code != 0]
    (out / TABLE).write_text("\n".join(lines) + "\n")


def _note(name: str, value: object) -> str:
    if name == "tests: tests" and isinstance(value, dict):
        return "\n".join(
            f"tests of {group}: {v['status']}, {v['passed']} passed, {v['failed']} failed, {v['skipped']} skipped"
            + (f": {v['detail']}" if v["detail"] else "")
            for group, v in value.items()
        )
    if isinstance(value, list):
        return f"{name}: {len(value)}, the first {value[0]}"
    return f"{name}: {value}"


def _ending(code: int) -> str:
    known = {
        0: "done",
        1: "done, but something failed or was wrong",
        124: "cut short: over its time",
        125: "not reached: the time was up",
    }
    return known.get(code, f"failed with exit code {code}")


@contextlib.contextmanager
def caches() -> Iterator[dict[str, str]]:
    """Empty caches for compiled kernels, as environment variables, so that cold compilation is cold."""
    folder = tempfile.mkdtemp(prefix="fastbert-bench-")
    try:
        yield {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: the part that runs is ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"got {text}, expected minutes, more than 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
