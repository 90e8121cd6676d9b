"""A training step has two laps, forward and backward. Each lap has its own row beside the row of the whole step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastbert.bench.measure import Timing, speedup
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.results import OK, Row
from fastbert.bench.tables import digits

STEP, FORWARD, BACKWARD = "step", "forward", "backward"  # settings of rows
LAPS = (FORWARD, BACKWARD)
OF_A_STEP = (
    "prepare_seconds",
    "bars",
    "max_error",
    "saved_bytes",
    "saved_h",
    "loop_tokens_per_second",
    "waiting",
    "note",
)  # left out of laps' rows
TOKENS, RATE = "tokens/s", "TFLOP/s"


class Lapped(Peer):
    """A Lapped is a peer whose run marks its start, the ends of its laps, and its own end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[list[Any]] = []  # for each run

    def start(self) -> None:
        """Begins a run."""
        self._marks.append([])
        self.mark()

    def mark(self) -> None:
        """Ends a lap. A GPU notes the time when it reaches this point."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks[-1].append(event)
        else:
            self._marks[-1].append(time.perf_counter())

    def laps(self, rounds: int) -> dict[str, Timing]:
        """Returns the times of the laps and of the whole in the last runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        runs = self._marks[-rounds:]
        samples = {name: [_seconds(run[i], run[i + 1]) for run in runs] for i, name in enumerate(LAPS)}
        samples[STEP] = [_seconds(run[0], run[-1]) for run in runs]
        return {name: Timing(tuple(values)) for name, values in samples.items()}


def _seconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin


@dataclasses.dataclass(frozen=True)
class Bar:
    """A Bar is the goal of a competitor for a whole step.

    of: TOKENS or RATE, or the name of another competitor, whose speed it should exceed by this factor.
    """

    competitor: str
    least: float
    of: str

    @property
    def name(self) -> str:
        return self.of if self.of in (TOKENS, RATE) else f"over {self.of}"


def timed_laps(peers: Sequence[Peer], rows: Sequence[Row]) -> dict[str, dict[str, Timing]]:
    """Returns the times of each timed competitor, by name and lap."""
    rows_by_name = {row.competitor: row for row in rows if row.status == OK and row.rounds}
    lapped = [peer for peer in peers if isinstance(peer, Lapped) and peer.name in rows_by_name]
    return {peer.name: peer.laps(rows_by_name[peer.name].rounds) for peer in lapped}


def lap_rows(rows: Sequence[Row], laps: Mapping[str, Mapping[str, Timing]], names: Iterable[str]) -> Iterator[Row]:
    """Yields for each lap of these names the rows of its own contest, fastbert's first."""
    for lap in names if laps else ():
        ours = laps[OURS][lap] if OURS in laps else None
        for row in rows:
            extra = {key: value for key, value in row.extra.items() if key not in OF_A_STEP}
            lap_row = Row(
                row.suite, row.workload, row.competitor, row.dtype, row.status, row.detail,
                error=row.error, bound=row.bound, extra=extra | {"setting": lap},
            )  # fmt: skip
            if row.competitor in laps:
                timing = laps[row.competitor][lap]
                lap_row.timed(timing, row.tokens, row.items)
                if ours is not None and row.competitor != OURS:
                    lap_row.compared(speedup(ours, timing))
            yield lap_row


def note_bars(bars: Sequence[Bar], rows: Sequence[Row], laps: Mapping[str, Mapping[str, Timing]]) -> None:
    """Writes the reached and the required values into the rows of whole steps: {name: [reached, least]}."""
    for row in rows:
        reached = {bar.name: [value, bar.least] for bar in bars if (value := _reached(bar, row, laps)) is not None}
        if reached:
            row.extra["bars"] = reached


def _reached(bar: Bar, row: Row, laps: Mapping[str, Mapping[str, Timing]]) -> float | None:
    if row.competitor != bar.competitor or row.competitor not in laps:
        return None
    if bar.of in (TOKENS, RATE):
        return row.tokens_per_second if bar.of == TOKENS else row.rate
    return speedup(laps[row.competitor][STEP], laps[bar.of][STEP]).value if bar.of in laps else None


def bar_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yields a line for each bar, with the reached value."""
    for row in rows:
        for name, (reached, least) in row.extra.get("bars", {}).items():
            verdict = "reached" if reached >= least else "missed"
            what = f"{row.extra.get('model')}, {row.workload}, {row.dtype}: {row.competitor} {name}"
            yield f"{what}: {digits(reached)}, the bar is {digits(least)}: {verdict}"
