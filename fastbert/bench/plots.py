"""This module makes the figures of results: ratios to peers, throughput, share of the ceiling, memory, start.

Every figure names the device and the date of its measurement, and the competitors that it omits.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from fastbert.bench.peers import OURS
from fastbert.bench.results import OK, Results, Row
from fastbert.bench.tables import (
    NO_RATIO,
    Contest,
    competitors,
    duration,
    memory,
    number,
    peer_rows,
    percent,
    short_dtype,
    source,
    suites,
    times,
)
from fastbert.pages.figures import BLUE, GREY, ORANGE, Bar, Plot, bars, lines, parts_of

K = TypeVar("K", bound=Hashable)

PANELS_OF_LINES = 3
WHERE_LISTED = 4  # maximum number of listed places at which a competitor has no point


def figures(results: Results) -> list[Plot]:
    """Returns the figures for the rows, suite by suite. Raises ImportError if matplotlib is not installed."""
    import matplotlib.figure  # noqa: F401  raises the error here, before anything is drawn

    plots: list[Plot] = []
    foot = source(results.environment)
    for suite, members in suites(results).items():
        for group in _by(members, lambda contest: (contest.model, contest.setting)).values():
            plots += _ratio(group, foot)
            plots += _throughput(group, foot, "length", "batch") + _throughput(group, foot, "batch", "length")
        plots += _of_rows(members, foot, "ceiling", f"{suite}: share of the measured ceiling", _ceiling)
        plots += _of_rows(members, foot, "memory", f"{suite}: peak memory", _memory)
        plots += _of_rows(members, foot, "cold start", f"{suite}: cold start to first result", _cold_start)
        plots += _once(members, foot, "prepare_seconds", "prepare", f"{suite}: preparation (load, compile, move)")
    return _named_apart(plots)


def _named_apart(plots: Sequence[Plot]) -> list[Plot]:
    """Numbers repeated names, because names become files and ids."""
    counts: dict[str, int] = {}
    apart = []
    for plot in plots:
        counts[plot.name] = counts.get(plot.name, 0) + 1
        name = plot.name if counts[plot.name] == 1 else f"{plot.name}-n{counts[plot.name]}"
        apart.append(dataclasses.replace(plot, name=name))
    return apart


def _ratio(group: Sequence[Contest], foot: str) -> list[Plot]:
    peers = [name for name in competitors(group) if name != OURS]
    shown = [name for name in peers if any(row.speedup is not None for row in peer_rows(group, name))]
    cells: dict[tuple[int, int], Bar | str] = {}
    for i, contest in enumerate(group):
        for row in contest.peers:
            if contest.name_of(row) in shown:
                cells[i, shown.index(contest.name_of(row))] = ratio_bar(row)
    title = f"{_heading(group[0])}: how many times faster fastbert is"
    foot += "\nWhiskers: 95 % interval. Blue: fastbert is faster, orange: slower, grey: the interval holds 1."
    foot += _left_out(group, [name for name in peers if name not in shown])
    name, labels = f"{_heading(group[0])} ratio", _labels(group, model=False)
    return bars(group[0].suite, name, title, labels, shown, cells, "times faster", foot, log=True)


def ratio_bar(row: Row) -> Bar | str:
    """Returns the speed-up over a peer as a bar, or the reason for a missing one.

    The colour shows which one is faster.
    """
    if row.status != OK or row.speedup is None:
        return row.status if row.status != OK else NO_RATIO
    low = row.speedup if row.speedup_low is None else row.speedup_low
    high = row.speedup if row.speedup_high is None else row.speedup_high
    return Bar(row.speedup, times(row.speedup), BLUE if low > 1 else ORANGE if high < 1 else GREY, low, high)


def _ceiling(row: Row) -> tuple[float, str] | None:
    return None if row.ceiling_fraction is None else (row.ceiling_fraction, percent(row.ceiling_fraction))


def _memory(row: Row) -> tuple[float, str] | None:
    return None if row.peak_bytes is None else (row.peak_bytes, memory(row.peak_bytes))


def _cold_start(row: Row) -> tuple[float, str] | None:
    seconds = number(row, "cold_start_seconds")
    return None if seconds is None else (seconds, duration(seconds))


def _of_rows(
    members: Sequence[Contest], foot: str, kind: str, title: str, value: Callable[[Row], tuple[float, str] | None]
) -> list[Plot]:
    """Returns bars of an optional value of rows: a line for each contest, a panel for each competitor."""
    group = [c for c in members if any(value(row) for row in c.rows if row.status == OK)]
    having = {c.name_of(row) for c in group for row in c.rows if row.status == OK and value(row)}
    everyone = competitors(group)
    shown = [name for name in everyone if name in having]
    factor, unit = _unit(kind, [labelled[0] for c in group for row in c.rows if (labelled := value(row))])
    cells: dict[tuple[int, int], Bar | str] = {}
    for i, contest in enumerate(group):
        for row in contest.rows:
            if contest.name_of(row) not in having:
                continue
            labelled = value(row)
            at = i, shown.index(contest.name_of(row))
            if row.status == OK and labelled:
                cells[at] = Bar(labelled[0] / factor, labelled[1], BLUE if row.competitor == OURS else GREY)
            else:
                cells[at] = row.status if row.status != OK else "no number"
    foot += _left_out(group, [name for name in everyone if name not in having])
    return bars(members[0].suite, f"{members[0].suite} {kind}", title, _labels(group), shown, cells, unit, foot)


def _once(members: Sequence[Contest], foot: str, key: str, kind: str, title: str) -> list[Plot]:
    """Returns bars of a time that each competitor needs once for a model: the median over the contests."""
    models = _by(members, lambda contest: contest.model)
    values: dict[str, dict[int, float]] = {}
    for j, group in enumerate(models.values()):
        for name in competitors(group):
            rows = (row for contest in group for row in contest.rows if contest.name_of(row) == name)
            times_of_model = [v for row in rows if row.status == OK and (v := number(row, key)) is not None]
            if times_of_model:
                values.setdefault(name, {})[j] = statistics.median(times_of_model)
    factor, unit = _unit(kind, [v for of_models in values.values() for v in of_models.values()])
    cells: dict[tuple[int, int], Bar | str] = {
        (i, j): Bar(v / factor, duration(v), BLUE if name == OURS else GREY)
        for i, (name, of_models) in enumerate(values.items())
        for j, v in of_models.items()
    }
    return bars(members[0].suite, f"{members[0].suite} {kind}", title, list(values), list(models), cells, unit, foot)


def _throughput(group: Sequence[Contest], foot: str, along: str, panel: str) -> list[Plot]:
    """Returns lines of tokens/s by length with a panel for each batch size, or with both exchanged.

    Each kind of workload has its own figures.
    """
    plots = []
    families = _by(group, lambda c: (c.dtype, re.sub(r"\d+", "#", c.workload)))
    several = len({family for _, family in families}) > 1
    for (dtype, _), members in families.items():
        points, absent = _points(members, along, panel)
        drawn = [at for at in sorted(points) if len({x for line in points[at].values() for x, _, _ in line}) > 1]
        if not drawn:
            continue
        title = " · ".join(filter(None, (_heading(members[0]), short_dtype(dtype)))) + f": throughput by {along}"
        if several:
            title += f", workloads like {members[0].workload}"
        axes = "tokens a sequence" if along == "length" else "sequences a batch", panel, "valid tokens/s"
        for k, part in enumerate(parts_of(drawn, PANELS_OF_LINES)):
            noted = foot + _without_a_point(absent, part, along, panel)
            name = f"{_heading(members[0])} {dtype} by {along}" + (f" {k + 1}" if k else "")
            panels = {at: points[at] for at in part}
            plots.append(lines(members[0].suite, name, title, panels, competitors(members), axes, noted, OURS))
    return plots


_Points = dict[float, dict[str, list[tuple[float, float, float]]]]  # panel, competitor: (x, y, spread of y)
_Absent = dict[str, list[tuple[float, float]]]  # competitor and status: (x, panel)


def _points(members: Sequence[Contest], along: str, panel: str) -> tuple[_Points, _Absent]:
    """Returns the points to draw, and the places at which a competitor has none."""
    points: _Points = {}
    absent: _Absent = {}
    for contest in members:
        for row in contest.rows:
            x, at = number(row, along), number(row, panel)
            if x is None or at is None:
                continue
            name, y = contest.name_of(row), row.tokens_per_second
            spread = 0.0 if row.spread is None or math.isnan(row.spread) else row.spread
            if row.status == OK and y is not None:
                points.setdefault(at, {}).setdefault(name, []).append((x, y, y * spread))
            else:
                reason = row.status if row.status != OK else "without a rate"
                absent.setdefault(f"{name} {reason}", []).append((x, at))
    return points, absent


def _labels(group: Sequence[Contest], *, model: bool = True) -> list[str]:
    """Returns labels that distinguish the contests of a suite; without the model, those of one model and setting."""
    dtypes = len({contest.dtype for contest in group}) > 1
    return [
        " · ".join(
            filter(
                None,
                (
                    c.model if model else "",
                    c.workload,
                    c.setting if model else "",
                    short_dtype(c.dtype) if dtypes else "",
                ),
            )
        )
        for c in group
    ]


def _heading(contest: Contest) -> str:
    return " · ".join(filter(None, (contest.suite, contest.model, contest.setting)))


def _left_out(group: Sequence[Contest], names: Iterable[str]) -> str:
    """Returns a line with the competitors that have no number, and with their statuses."""
    parts = []
    for name in names:
        rows = [row for contest in group for row in contest.rows if contest.name_of(row) == name]
        statuses = dict.fromkeys(row.status if row.status != OK else "no number" for row in rows)
        parts.append(f"{name} ({', '.join(statuses)})")
    return f"\nNot shown: {'; '.join(parts)}" if parts else ""


def _unit(kind: str, values: Sequence[float]) -> tuple[float, str]:
    """Returns the divisor of an axis's values, and the name of the axis."""
    largest = max(values, default=0.0)
    if kind == "ceiling":
        return 0.01, "% of the ceiling"
    if kind == "memory":
        power, unit = next((p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if largest >= 2**p or p == 10)
        return 2**power, unit
    return (1.0, "seconds") if largest >= 1 else (1e-3, "milliseconds")


def _without_a_point(absent: _Absent, panels: Sequence[float], along: str, panel: str) -> str:
    """Returns a line with the competitors that have no point in these panels, and with the places."""
    parts = []
    for name, places in absent.items():
        where = [f"{x:g}×{at:g}" for x, at in places if at in panels]
        more = len(where) - WHERE_LISTED
        if where:
            parts.append(f"{name} at {', '.join(where[:WHERE_LISTED])}" + (f" and {more} more" if more > 0 else ""))
    return f"\nWithout a point ({along}×{panel}): {'; '.join(parts)}" if parts else ""


def _by(members: Iterable[Contest], key: Callable[[Contest], K]) -> dict[K, list[Contest]]:
    groups: dict[K, list[Contest]] = {}
    for contest in members:
        groups.setdefault(key(contest), []).append(contest)
    return groups
