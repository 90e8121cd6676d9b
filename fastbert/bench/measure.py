"""`interleave` times all competitors in turns, round after round, in one process; `speedup` compares two of them.

The speed of a machine drifts (clocks, temperature, other users), so timing one program after another is not a fair
comparison. Here each round times every competitor once, in a rotating order. Ratios are computed within a round, and
the result is their median over rounds. GPUs are timed with events on the device, CPUs with the monotonic clock. GPU
clocks are not changed.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

HEAD_START = 1_000_000  # GPU cycles: about half a millisecond
Run = Callable[[int], Any]  # does the work once, on input number i: inputs rotate, so that caches see several inputs


@dataclass(frozen=True)
class Timing:
    """A Timing holds the seconds per run of one competitor, with one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Returns half the interquartile range over the median: at 0.05, half of the rounds are within about 5 %."""
        if len(self.samples) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def percentile(self, percent: float) -> float:
        """Returns the seconds below which `percent` of the rounds are."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass(frozen=True)
class Ratio:
    """A Ratio is how many times faster one competitor is than another, with a 95 % confidence interval."""

    value: float
    low: float
    high: float


def interleave(
    runs: Mapping[str, Run],
    *,
    device: torch.device,
    rounds: int = 10,
    warmup: int = 2,
    max_seconds: float = math.inf,
    min_rounds: int = 3,
    min_sample_seconds: float = 0.0,
    flush_l2: bool = False,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times every run in each of `rounds` rounds.

    warmup: the number of untimed runs of each at the start. After max_seconds no new round begins, but at least
    min_rounds are run. min_sample_seconds: short runs are repeated until a sample lasts that long, and the sample is
    their mean. flush_l2: overwrite the GPU's L2 cache before each sample; the sample is then a single run without the
    host's launch overhead, for kernels. on_round: called after each round.
    """
    clock = _cuda_clock if device.type == "cuda" else _host_clock
    flush = _l2_flusher(device) if flush_l2 and device.type == "cuda" else None
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        for i in range(warmup):
            run(i)
        repeats[name] = 1
        if min_sample_seconds > 0 and flush is None:
            once = max(clock(run, warmup, 1, device, None), 1e-9)
            repeats[name] = max(1, math.ceil(min_sample_seconds / once))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    started = time.monotonic()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= min_rounds and time.monotonic() - started > max_seconds:
                break
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(clock(runs[name], number * repeats[name], repeats[name], device, flush))
            gc.collect()
            if on_round is not None:
                on_round()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def speedup(ours: Timing, theirs: Timing, *, seed: int = 0, resamples: int = 2000) -> Ratio:
    """Returns theirs over ours, paired within rounds: above 1, ours is faster.

    A bootstrap of the median gives the interval.
    """
    ratios = [b / a for a, b in zip(ours.samples, theirs.samples, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Ratio(statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


def rms_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the RMS of (ours - reference) over the RMS of the reference, in float64; NaN if ours is not finite."""
    if ours.shape != reference.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(reference.shape)}")
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return ((ours - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()).item()


def max_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the largest |ours - reference| over the RMS of the reference, in float64; NaN if ours is not finite."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return ((ours - reference).abs().max() / reference.pow(2).mean().sqrt()).item()


def low_cosine(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the 1st percentile of the cosines between rows of ours and the reference, (n, dim) both, in float64."""
    cosines = torch.nn.functional.cosine_similarity(ours.detach().double().cpu(), reference.detach().double().cpu())
    return cosines.quantile(0.01).item()


def geometric_mean(values: Sequence[float]) -> float:
    """Returns the geometric mean of positive values; NaN for no values."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


Before = Callable[[], Any] | None  # called just before the clock starts


def _host_clock(run: Run, first: int, repeats: int, device: torch.device, before: Before) -> float:
    if before is not None:
        before()
    started = time.perf_counter()
    for i in range(first, first + repeats):
        run(i)
    return (time.perf_counter() - started) / repeats


def _cuda_clock(run: Run, first: int, repeats: int, device: torch.device, before: Before) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if before is not None:
        before()
    begin.record(torch.cuda.current_stream(device))
    for i in range(first, first + repeats):
        run(i)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _l2_flusher(device: torch.device) -> Callable[[], Any]:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(size, 64 * 2**20), dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()
        # The device waits, so that the host enqueues the whole run before it starts. The time then covers the device's
        # work, and not the host's launches, which may take longer than a short kernel.
        torch.cuda._sleep(HEAD_START)

    return flush
