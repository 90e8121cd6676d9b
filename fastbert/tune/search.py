"""`tune` times the available kernels and tiles on this GPU, and `write` stores the best in a table for the kernels.

For each GEMM (K, M, epilogue) and each head size of the models, every candidate is first compared with float64, then
timed at a few numbers of tokens. The choice does not depend on the number of tokens: the candidate with the lowest
geometric mean of the times is selected. The table is stored in the user's cache. fastbert_kernels.tables prefers it to
the shipped table. Only `fastbert tune` tunes or times kernels.
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

CHECK_TOKENS = 253  # a number of rows that is no multiple of any tile's
ROUNDS = 15
OURS = ("linear", "linear_persistent", "linear_specialized")
Timer = Callable[[Mapping[str, Callable[[], Tensor]], torch.device], Mapping[str, float]]


@dataclass
class Outcome:
    """An Outcome is the result of one job.

    seconds: those of each candidate, at each number of tokens. rejected: the reasons why other candidates were omitted.
    """

    job: Job
    seconds: dict[Candidate, list[float]] = field(default_factory=dict)
    rejected: dict[Candidate, str] = field(default_factory=dict)

    def best(self, *kernels: str) -> Candidate | None:
        """Returns the fastest candidate, by the geometric mean over numbers of tokens.

        kernels: consider only these, if given.
        """
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
    """Returns the reason why nothing can be tuned on this device, or None."""
    if device.type != "cuda":
        return "tables are of NVIDIA GPUs, and there is none here" if device.type == "cpu" else f"got {device}"
    if not torch.cuda.is_available():
        return "tables are of NVIDIA GPUs, and there is none here"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs"
    return dispatch.triton_obstacle(device)


def cuda_timer(runs: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Returns the median seconds of each run, by device events, in turns, with the L2 cache flushed before each."""
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
    """Returns the candidates that run with an error within the policy: 1.25 times eager PyTorch's, plus half an ulp."""
    work = Work(outcome.job, CHECK_TOKENS, device)
    exact = work.exact()
    bound = 1.25 * measure.rms_error(work.eager(), exact) + 0.5 * torch.finfo(outcome.job.out_dtype).eps
    right = []
    for candidate in outcome.job.candidates:
        try:
            error = measure.rms_error(work.result(candidate), exact)
        except Exception as problem:  # a compiler or a driver may reject a tile in many ways; the loop continues
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
    """Returns the table of the outcomes, in the format of fastbert_kernels.tables.

    Other shapes are kept from `before`.
    """
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
            # An activation uses fastbert's kernel if that is used for more rows. So only fastbert's best candidate
            # counts.
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
    """Returns the existing table, or None. Its shapes that are not tuned now are kept.

    A table that cannot be read, or that is for another GPU, is ignored with a warning, because it will be replaced.
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
    """Writes the table completely or not at all. Raises OSError, with the file name, if that fails."""
    from fastbert_kernels import tables

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(table, indent=1) + "\n")
    except OSError as error:
        message = f"the table cannot be written ({error.strerror or error}), and what was there is unchanged"
        raise OSError(error.errno, message, str(path)) from error
    tables.forget()


def check_writable(path: Path) -> None:
    """Raises the OSError of `write` before any measurement, if the folder is not writable."""
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
    """Makes this process use this table; None returns to the one in the cache, or the shipped one.

    Raises ValueError, with the file name, for a table that does not parse, has another version, or names no GPU of this
    machine.
    """
    from fastbert_kernels import tables

    tables.use_table(path)
