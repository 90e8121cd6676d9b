"""`tune` times the kernels and tiles there are on this GPU, and `write` keeps the best in a table for the kernels.

For each GEMM (K, M, epilogue) and each head size of the models, every candidate is first checked against float64, then
timed at a few numbers of tokens. The number of tokens enters no choice: the candidate with the least geometric mean of
times over them is taken. The table goes into the user's cache, where fastbert_kernels.tables looks for it before it
takes the one that ships. Nothing is ever tuned or timed outside of `fastbert tune`.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert._version import __version__
from fastbert.bench import measure
from fastbert.checkpoint.files import write_text
from fastbert.ops import dispatch
from fastbert.tune.candidates import Candidate
from fastbert.tune.jobs import Job
from fastbert.tune.work import Work

logger = logging.getLogger("fastbert")

CHECK_TOKENS = 253  # a number of rows that no tile divides
ROUNDS = 15
OURS = ("linear", "linear_persistent", "linear_specialized")
Timer = Callable[[Mapping[str, Callable[[], Tensor]], torch.device], Mapping[str, float]]


@dataclass
class Outcome:
    """The result of one job.

    seconds: of each candidate, at each number of tokens. rejected: why the others were left out.
    """

    job: Job
    seconds: dict[Candidate, list[float]] = field(default_factory=dict)
    rejected: dict[Candidate, str] = field(default_factory=dict)

    def best(self, *kernels: str) -> Candidate | None:
        """The fastest candidate, of these kernels if any are named: by the geometric mean over numbers of tokens."""
        among = [candidate for candidate in self.seconds if not kernels or candidate.kernel in kernels]
        return min(among, key=lambda candidate: sum(map(math.log, self.seconds[candidate])), default=None)

    def __str__(self) -> str:
        lines = [f"{self.job.title}, {self.job.op} {self.job.key}"]
        best = self.best()
        firsts = (("cublas",), (*OURS, "split_linear", "attention"), ("quantized_linear",),
                  ("quantized_linear_persistent", "quantized_linear_specialized"), ("quantized_gated_linear",),
                  ("quantized_gated_linear_persistent",))  # fmt: skip
        for candidate in filter(None, (self.best(*kernels) for kernels in firsts)):
            times = " ".join(f"{1e6 * seconds:.1f}" for seconds in self.seconds[candidate])
            lines.append(f"  {'*' if candidate == best else ' '} {times} us  {candidate}")
        lines += [f"    left out: {candidate}: {reason}" for candidate, reason in self.rejected.items()]
        return "\n".join(lines)


def device_obstacle(device: torch.device) -> str | None:
    """The reason why there is nothing to tune on this device, or None."""
    if device.type != "cuda":
        return "tables are of NVIDIA GPUs, and there is none here" if device.type == "cpu" else f"got {device}"
    if not torch.cuda.is_available():
        return "tables are of NVIDIA GPUs, and there is none here"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs"
    return dispatch.triton_obstacle(device)


def cuda_timer(runs: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Median seconds of each run by events on the device, all in turn, the L2 cache flushed before each."""
    takers = {name: (lambda i, run=run: run()) for name, run in runs.items()}
    timings = measure.interleave(takers, device=device, rounds=ROUNDS, flush_l2=True)
    return {name: timing.median for name, timing in timings.items()}


@torch.inference_mode()
def tune(
    jobs: Iterable[Job],
    device: torch.device,
    tokens: Sequence[int],
    *,
    timer: Timer = cuda_timer,
    say: Callable[[str], Any] = print,
) -> list[Outcome]:
    """Checks, then times the candidates of each job, at each of these numbers of tokens."""
    outcomes = []
    for job in jobs:
        outcome = Outcome(job)
        right = _check(outcome, device)
        for n_tokens in job.tokens or tokens:
            work = Work(job, n_tokens, device)
            seconds = timer({str(candidate): work.call(candidate) for candidate in right}, device)
            for candidate in right:
                outcome.seconds.setdefault(candidate, []).append(seconds[str(candidate)])
        say(str(outcome))
        outcomes.append(outcome)
    return outcomes


def _check(outcome: Outcome, device: torch.device) -> list[Candidate]:
    """The candidates that run and are as accurate as the policy wants: 1.25 times eager PyTorch and half an ulp."""
    work = Work(outcome.job, CHECK_TOKENS, device)
    exact = work.exact()
    bound = 1.25 * measure.rms_error(work.eager(), exact) + 0.5 * torch.finfo(outcome.job.out_dtype).eps
    right = []
    for candidate in outcome.job.candidates:
        try:
            error = measure.rms_error(work.result(candidate), exact)
        except Exception as problem:  # a compiler or a driver may refuse a tile in many ways; the others go on
            outcome.rejected[candidate] = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[-1]}"
            continue
        if not error <= bound:
            outcome.rejected[candidate] = f"wrong: error {error:.3g}, bound {bound:.3g}"
            continue
        right.append(candidate)
    return right


def table_of(
    outcomes: Iterable[Outcome],
    device_name: str,
    arch: int,
    tokens: Sequence[int],
    *,
    date: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The table of the outcomes, in the format of fastbert_kernels.tables, with what `before` had of other shapes."""
    import triton

    from fastbert_kernels import tables

    made_by = f"fastbert tune {__version__}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    table: dict[str, Any] = {
        "version": tables.TABLE_VERSION,
        "arch": arch,
        "device": device_name,
        "date": date or datetime.date.today().isoformat(),
        "source": f"{made_by}, geometric mean over {', '.join(map(str, tokens))} tokens",
    }
    quantized = {"quantized_gemm": tables.QUANTIZED_GEMMS, "quantized_gated_gemm": tables.QUANTIZED_GATED_GEMMS}
    for op in (*OURS, "gemm", "few_rows", *quantized, *sum(quantized.values(), ()), "attention"):
        table[op] = dict((before or {}).get(op, {}))
    for outcome in outcomes:
        key, best = outcome.job.key, outcome.best()
        if best is None:
            continue
        if outcome.job.op == "attention":
            table["attention"][key] = best.sizes
            continue
        if outcome.job.op == "few_rows":
            # An activation stays with our kernel if it is there for more rows; so it is the best of ours that counts.
            chosen = best if outcome.job.epilogue == "residual" else outcome.best("linear") or best
            table["few_rows"][key] = {"kernel": chosen.kernel, **chosen.sizes}
            continue
        if outcome.job.op in quantized:
            kernels = quantized[outcome.job.op]
            for op in kernels:
                table[op].pop(key, None)
            table[best.kernel][key] = best.sizes
            times = _microseconds(outcome, (outcome.best(kernel) for kernel in kernels))
            table[outcome.job.op][key] = {"kernel": best.kernel, "microseconds": times}
            continue
        ours = outcome.best(*OURS)
        entry: dict[str, Any] = {"kernel": best.kernel}
        for op in OURS:
            table[op].pop(key, None)
        if ours is not None:
            entry["ours"] = ours.kernel
            table[ours.kernel][key] = ours.sizes
        entry["microseconds"] = _microseconds(outcome, (outcome.best("cublas"), ours))
        table["gemm"][key] = entry
    return table


def _microseconds(outcome: Outcome, timed: Iterable[Candidate | None]) -> dict[str, list[float]]:
    return {
        candidate.kernel: [round(1e6 * seconds, 2) for seconds in outcome.seconds[candidate]]
        for candidate in timed
        if candidate is not None
    }


def read_earlier(path: Path, device_name: str, arch: int) -> dict[str, Any] | None:
    """The table that is there already, or None. Shapes of it that are not tuned now are kept.

    A table that cannot be read, or is of another GPU, counts as none, with a warning: it will be replaced.
    """
    from fastbert_kernels import tables

    if not path.exists():
        return None
    tables.read_table.cache_clear()
    try:
        return tables.read_table_for(path, device_name, arch)
    except ValueError as error:
        logger.warning("%s: it will be replaced", error)
        return None


def write(table: Mapping[str, Any], path: Path) -> None:
    """Writes the table whole or not at all. Raises OSError that names the file where that cannot be done."""
    from fastbert_kernels import tables

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(table, indent=1) + "\n")
    except OSError as error:
        message = f"the table cannot be written ({error.strerror or error}), and what was there is unchanged"
        raise OSError(error.errno, message, str(path)) from error
    tables.forget()


def check_writable(path: Path) -> None:
    """Raises the OSError of `write` before anything is measured, if the folder takes no file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(f".{path.name}.{os.getpid()}.trial")
        try:
            trial.write_text(" " * 4096)
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        message = f"the table could not be written ({error.strerror or error}), so nothing was measured"
        raise OSError(error.errno, message, str(path)) from error


def use_table(path: str | os.PathLike[str] | None) -> None:
    """Makes this process go by this table; None goes back to the one in the cache, or the one that ships.

    Raises ValueError, naming the file, if it does not parse, is of another version, or names no GPU of this machine.
    """
    from fastbert_kernels import tables

    tables.use_table(path)
