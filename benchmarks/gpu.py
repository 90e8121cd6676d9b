"""Runs tests, measurements and suites on one GPU within a time budget. Each part is a process; the most important is
first.

    benchmarks/run_gpu.sh --out DIR                          the parts of PLAN, within 7.5 minutes
    benchmarks/run_gpu.sh --out DIR --only kernels text      some parts

DIR always holds the measurements so far, in few files (gpu_results.py), so that an interrupted run keeps its results.
Nothing changes the GPU's clocks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gpu_options import MINUTES, Options

PLAN = ("compile", "tests", "probe", "model")
# Seconds of a run of seven and a half minutes. If a part needs less, the rest goes to the parts after it.
WEIGHTS = {
    "compile": 35, "tests": 130, "ceilings": 20, "probe": 170, "kernels": 90, "model": 115, "text": 50, "start": 60,
    "train": 180, "tune": 240, "sanitizer": 100,
}  # fmt: skip
TIMED = ("kernels", "model", "text", "train")  # these need compiled kernels, and ceilings for comparison
PARTS = ("compile", "tests", "ceilings", "probe", "model", "kernels", "text", "start", "train", "tune", "sanitizer")
RESERVE = 5.0  # seconds kept for the last files
GRACE = 10.0  # seconds beyond its own after which a part is ended, and a third of its own besides
PUBLISH = 10.0  # seconds between two checks of a running part's results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all parts ended; 1: a part failed or was cut short, or tests failed; 2: the run could not start."""
    args = parse(arguments)
    options = Options(args.out.resolve(), args.device, args.minutes, args.model and args.model.resolve(), args.quick)
    if args.part is not None:
        import gpu_parts

        return gpu_parts.run(args.part, options, args.seconds)
    plan = planned(args.only, args.sanitizer, options.out)
    obstacle = device_obstacle(options.device)
    if obstacle is not None:
        print(f"error: {obstacle}", file=sys.stderr)
        return 2
    import gpu_results

    from fastbert.bench.results import commit

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder, caches() as environment, interruptible():
        work = Path(folder)
        gpu_results.resume(options.out, work, plan, commit())
        ended = run_plan(
            plan, dataclasses.replace(options, out=work), environment,
            publish=lambda ended: gpu_results.publish(work, options.out, ended),
        )  # fmt: skip
    print((options.out / gpu_results.SUMMARY).read_text(), end="")
    print(f"results in {options.out}")
    return 0 if all(code == 0 for code in ended.values()) else 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run_gpu.sh",
        description="GPU tests, ceilings, suites and peers on one NVIDIA GPU: JSON in DIR and a short table.",
        epilog="Example: benchmarks/run_gpu.sh --out results --only tests kernels --minutes 5",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where results go; made if missing")
    known = f"of {', '.join(PARTS)}; by default {', '.join(PLAN)}"
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=known)
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help=f"for all parts, {MINUTES} by default")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint for the text suite, else MiniLM's")
    parser.add_argument("--sanitizer", action="store_true", help="run compute-sanitizer on each kernel as well")
    parser.add_argument("--quick", action="store_true", help="few rounds and small workloads, to try the machinery")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def planned(only: Sequence[str] | None, sanitizer: bool, out: Path) -> list[str]:
    """Returns the parts to run, in order: the requested parts, and those they need that are not in `out` yet."""
    wanted = set(only or PLAN) | ({"sanitizer"} if sanitizer else set())
    if wanted & set(TIMED):
        # The probe measures the ceilings; an earlier run has also done so.
        wanted |= {"compile"} if "probe" in wanted or (out / "results.json").exists() else {"compile", "ceilings"}
    return [part for part in PARTS if part in wanted]


def device_obstacle(device: str) -> str | None:
    """Returns the reason why nothing can run here, or None."""
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
    plan: Sequence[str],
    options: Options,
    environment: Mapping[str, str],
    command: Sequence[str] | None = None,
    publish: Callable[[Mapping[str, int]], None] = lambda ended: None,
) -> dict[str, int]:
    """Runs the parts one after the other. Returns their exit codes: 124 for one cut short, 125 for one not reached.

    options.out: the folder for the files of the parts. command: the command that starts a part, for tests. publish:
    called at intervals with the exit codes so far.
    """
    from gpu_results import ending

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
        # A part stops by itself when its seconds are over. The rest is for work that it cannot interrupt.
        limit = min(4 / 3 * seconds + GRACE, end - time.monotonic())
        ended[part] = run_part(line, environment, limit, lambda: publish(ended))
        _say(started, f"{part}: {ending(ended[part])}")
        publish(ended)
    publish(ended)
    return ended


def part_arguments(part: str, options: Options, seconds: float) -> list[str]:
    line = ["--part", part, "--seconds", f"{seconds:.1f}", "--minutes", f"{options.minutes:g}"]
    line += ["--out", str(options.out), "--device", options.device]
    line += ["--model", str(options.model)] if options.model else []
    return line + (["--quick"] if options.quick else [])


def run_part(
    line: Sequence[str], environment: Mapping[str, str], seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> int:
    """Returns the exit code of a process. It is ended with all its children after `seconds` (then 124).

    meanwhile: called at intervals while it runs.
    """
    process = subprocess.Popen(line, env={**os.environ, **environment}, start_new_session=True)
    end = time.monotonic() + seconds
    try:
        while True:
            left = end - time.monotonic()
            try:
                return process.wait(max(0.0, min(PUBLISH, left)))
            except subprocess.TimeoutExpired:
                if left <= PUBLISH:
                    return 124
            meanwhile()
    finally:
        # The process has its own process group, so its children end with it, also after an interrupt.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def caches() -> Iterator[dict[str, str]]:
    """Returns empty caches for compiled kernels, as environment variables, so that cold compilation is cold."""
    folder = tempfile.mkdtemp(prefix="fastbert-bench-")
    try:
        yield {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM end the run as Ctrl-C does: the running part is ended too."""
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
