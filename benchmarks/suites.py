"""The suites share cases, the way to run one, the least cost of its work, and the place of results."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import workloads
from ceilings import COPY, matmul_key
from laps import Bar, bar_lines, lap_rows, note_bars, timed_laps

from fastbert.bench.peers import OURS, Peer, contest
from fastbert.bench.results import FAILED, OK, Results, Row, device_name, environment
from fastbert.ops import dispatch

LONG_MINUTES = 20.0  # a run of that length has time for torch.compile everywhere, and for all documents
QUICK_PEERS = 3  # fastbert, plain PyTorch and one more
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Work:
    """Work is the least work of a case: floating-point operations, and bytes through memory (each operand once)."""

    flops: float = 0.0
    n_bytes: float = 0.0

    def floor(self, dtype: str, ceilings: Mapping[str, float]) -> float | None:
        """Returns the least seconds that the device needs, or None if a ceiling was not measured.

        max(FLOPs / product rate, bytes / copy bandwidth)
        """
        amounts = (self.flops, matmul_key(dtype), 1e12), (self.n_bytes, COPY, 1e9)
        needed = [(amount / unit, ceilings.get(key)) for amount, key, unit in amounts if amount > 0]
        if not needed or not all(ceiling for _, ceiling in needed):
            return None
        return max(amount / ceiling for amount, ceiling in needed if ceiling)

    def fill(self, row: Row, ceilings: Mapping[str, float]) -> None:
        """Writes the rate of a row, TFLOP/s if there are operations and else GB/s, and its share of the floor."""
        if row.status != OK or not row.seconds:
            return
        row.rate, row.rate_unit = self.n_bytes / row.seconds / 1e9, "GB/s"
        if self.flops > 0:
            row.rate, row.rate_unit = self.flops / row.seconds / 1e12, "TFLOP/s"
        floor = self.floor(row.dtype, ceilings)
        row.ceiling_fraction = None if floor is None else floor / row.seconds


@dataclass
class Built:
    """A Built is a case that is ready to run: the competitors (fastbert first), their task, and the right result.

    eager: the name of plain PyTorch, whose error bounds that of fastbert. extra: goes into every row. timing: further
    arguments of `contest`. laps: the laps of a training step that get their own rows, and their work. bars: the goals
    of the whole step.
    """

    peers: Sequence[Peer]
    eager: str
    reference: torch.Tensor
    tokens: int | None = None
    items: int | None = None
    work: Work | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    laps: Mapping[str, Work] = field(default_factory=dict)
    bars: Sequence[Bar] = ()


@dataclass(frozen=True)
class Case:
    """A Case is one workload of one suite. It is built only when it runs.

    needs: the operations whose tests must have passed. weight: its share of the time, relative to the other cases'.
    keep: whether the next case uses what this one loaded and compiled. scale: its time relative to the longest case of
    its suite with another model, by experience; None if it is unknown. late: runs after the cases of all suites.
    """

    suite: str
    workload: str
    model: str
    dtype: str
    device_type: str
    needs: tuple[str, ...]
    build: Callable[[torch.device], Built] = field(compare=False)
    setting: str = ""
    weight: float = 1.0
    keep: bool = False
    scale: float | None = None
    late: bool = False

    @property
    def name(self) -> str:
        parts = (self.suite, self.model, self.workload, self.setting, self.dtype)
        return " ".join(part for part in parts if part)


class LeftOut(Peer):
    """A LeftOut is a competitor outside of a contest, with a reason."""

    def __init__(self, name: str, reason: str, dtype: str | None = None) -> None:
        self.name, self.reason, self.dtype = name, reason, dtype

    def obstacle(self) -> str | None:
        return self.reason


@dataclass
class Outcome:
    """An Outcome has the rows of a case, fastbert's first, and fastbert's prepared peer if it may be timed again."""

    rows: list[Row]
    ours: Peer | None = None


def run_case(
    case: Case,
    device: torch.device,
    *,
    ceilings: Mapping[str, float] | None = None,
    refused: Mapping[str, str] | None = None,
    max_seconds: float = 10.0,
    quick: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Outcome:
    """Builds a case, holds its contest and adds rates. An error becomes a row, not an exception.

    refused: operations whose tests failed, with the reason. No case is timed that needs one of them. max_seconds: after
    that no new round of timing begins. quick: two rounds of the first few competitors.
    """
    for op in case.needs:
        if refused and op in refused:
            return Outcome([_row(case, OURS, status=FAILED, detail=f"not timed: {refused[op]}")])
    if dispatch.interpreting():
        reason = "not timed: TRITON_INTERPRET is set, and the interpreter's speed says nothing"
        return Outcome([_row(case, OURS, status=FAILED, detail=reason)])
    try:
        built = case.build(device)
    except Exception as error:  # too little memory, a missing package: the case's result
        return Outcome([_row(case, OURS, status=FAILED, detail=f"{type(error).__name__}: {error}"[:300])])
    timing = {"rounds": 30 if device.type == "cuda" else 7, "min_rounds": 3, "max_seconds": max_seconds}
    timing |= built.timing | ({"rounds": 2, "min_rounds": 2} if quick else {})
    peers = [_if_tested(peer, refused or {}) for peer in built.peers]
    peers = peers[:QUICK_PEERS] if quick else peers
    rows = contest(
        peers,
        lambda peer: _row(case, peer.name, peer.dtype, extra=dict(built.extra)),
        built.reference,
        device=device,
        eager=built.eager,
        tokens=built.tokens,
        items=built.items,
        on_step=on_step,
        **timing,
    )
    if built.work is not None:
        for row in rows:
            built.work.fill(row, ceilings or {})
    if built.laps:
        rows += _laps_of(built, peers, rows, ceilings or {})
    return Outcome(rows, peers[0] if rows[0].status == OK else None)


def _laps_of(built: Built, peers: Sequence[Peer], rows: Sequence[Row], ceilings: Mapping[str, float]) -> list[Row]:
    """Returns the rows of the laps of a training step. The rows of the whole step get the values of the bars."""
    laps = timed_laps(peers, rows)
    note_bars(built.bars, rows, laps)
    more_rows = list(lap_rows(rows, laps, built.laps))
    for row in more_rows:
        built.laps[row.extra["setting"]].fill(row, ceilings)
    return more_rows


def _if_tested(peer: Peer, refused: Mapping[str, str]) -> Peer:
    reason = next((refused[name] for name in peer.needs if name in refused), None)
    return peer if reason is None else LeftOut(peer.name, f"not timed: {reason}")


def tidy(device: torch.device) -> None:
    """Frees a case's resources: memory, captured graphs, and compiled code, of which PyTorch keeps eight versions."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(case: Case, competitor: str, dtype: str | None = None, **fields: Any) -> Row:
    row = Row(case.suite, case.workload, competitor, dtype or case.dtype, **fields)
    row.extra |= {"model": case.model} | ({"setting": case.setting} if case.setting else {})
    return row


class Recorder:
    """A Recorder is a result file that is written after every case, so that a killed run keeps its results."""

    def __init__(self, path: Path, device: torch.device, ceilings: Mapping[str, float] | None = None) -> None:
        self.path = path
        self.results = Results(environment(device), ceilings=dict(ceilings or {}))

    def add(self, rows: Sequence[Row]) -> None:
        self.results.rows.extend(rows)
        relate(self.results.rows)
        if bars := list(bar_lines(self.results.rows)):
            self.results.notes["bars"] = bars
        self.results.save(self.path)

    def note(self, **notes: Any) -> None:
        self.results.notes |= notes
        self.results.save(self.path)


def relate(rows: Sequence[Row]) -> None:
    """Notes in the rows of workload (d), variable lengths, their tokens a second over those with the fixed length."""
    fixed = {
        (row.suite, row.extra.get("model"), row.competitor, row.dtype): row.tokens_per_second
        for row in rows
        if row.workload == workloads.documents(False, 1).name
    }
    for row in rows:
        other = fixed.get((row.suite, row.extra.get("model"), row.competitor, row.dtype))
        if row.workload == workloads.documents(True, 1).name and other and row.tokens_per_second:
            row.extra["variable_over_fixed"] = row.tokens_per_second / other


class Deadline:
    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self.clock()


class Schedule:
    """A Schedule shares the remaining time among the remaining cases, by weight."""

    def __init__(self, cases: Sequence[Case], deadline: Deadline) -> None:
        self.deadline = deadline
        self._waiting = list(cases)
        self._longest: dict[tuple[str, str], float] = {}  # seconds that a case of a suite and model took

    @contextmanager
    def turn(self, case: Case) -> Iterator[float | None]:
        """Returns the seconds that a case, one of `cases`, has for its rounds of timing, or None if it should not
        begin.

        It gets a third of its share. The rest is for loading, compiling and checking, which no limit stops. A case
        should not begin if the time is over, if a similar case took twice as long as the remaining time, or if its
        scale predicts more time than remains.
        """
        share = max(0.0, self.deadline.left) * case.weight / sum(waiting.weight for waiting in self._waiting)
        self._waiting.remove(case)
        kind = case.suite, case.model
        others = [seconds for (suite, model), seconds in self._longest.items() if suite == kind[0] and model != kind[1]]
        needed = max(self._longest.get(kind, 0.0) / 2, (case.scale or 0.0) * max(others, default=0.0))
        if self.deadline.left <= needed:
            yield None
            return
        started = self.deadline.clock()
        yield share / 3
        self._longest[kind] = max(self._longest.get(kind, 0.0), self.deadline.clock() - started)


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    recorder: Recorder,
    *,
    deadline: Deadline,
    refused: Mapping[str, str] | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs cases in order, the most important first, while there is time. Cases that are not reached are noted."""
    schedule = Schedule(cases, deadline)
    missed: list[str] = []
    for case in cases:
        with schedule.turn(case) as seconds:
            if seconds is None:
                missed.append(case.name)
                continue
            say(f"{case.name} ({deadline.left:.0f} s left)")
            outcome = run_case(
                case, device, ceilings=recorder.results.ceilings, refused=refused, max_seconds=seconds, quick=quick
            )
            recorder.add(outcome.rows)
            del outcome
            if not case.keep:
                tidy(device)
    recorder.note(not_reached=missed)
    if missed:
        say(f"time is up: {len(missed)} of {len(cases)} cases not reached")


def results_folder(device: torch.device) -> Path:
    """Returns benchmarks/results/<device>-<date>."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}"


def read_notes(path: Path) -> dict[str, Any]:
    """Returns the notes of a result file, or empty notes if there is no such file."""
    return Results.load(path).notes if path.exists() else {}
