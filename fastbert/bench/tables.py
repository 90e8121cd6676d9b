"""Results become tables of text: rows form contests, and numbers get digits and units.

A row may have additional values in `Row.extra`. This file and plots.py read these keys, all optional:

    model               str    "BERT-base", "MiniLM": the model that ran
    setting             str    "throughput" or "latency"
    length, batch       int    tokens per sequence (the longest, if lengths vary) and sequences per batch
    padding_waste       float  share of a padded batch that is padding, 0 to 1
    flops_per_token     float  gives TFLOP/s if the row has no `rate`
    max_error           float  the largest difference from the reference, over the RMS of the reference
    saved_bytes         float  bytes that a training step saves for its backward pass, without parameters
    saved_h             float  their growth with the batch: bytes per token and layer, in units of H
    bars                dict   {goal of a training step: [reached, least]}
    python_calls        float  Python function calls of one pass on the host
    bar_seconds         float  upper limit of the time
    low_cosine          float  1st percentile of the cosines between a text's vector and the exact one
    prepare_seconds     float  loading, compiling, moving to the device: once, before the first run
    cold_start_seconds  float  time to the first result, in a fresh process with empty caches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.bench.measure import geometric_mean
from fastbert.bench.peers import OURS
from fastbert.bench.results import OK, Results, Row
from fastbert.pages.document import NO_VALUE, Line, Table

SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NO_RATIO = "no ratio"
ROUNDS_FOR_PERCENTILES = 20  # with fewer rounds, the 95th percentile is the slowest round


@dataclass(frozen=True)
class Contest:
    """A Contest is a group of competitors that are timed together: rows of one suite, workload, model and setting.

    fastbert's row is the first.
    """

    suite: str
    workload: str
    model: str
    setting: str
    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.competitor == OURS), None)

    @property
    def peers(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.competitor != OURS)

    @property
    def others(self) -> tuple[Row, ...]:
        """Returns the peers that are not fastbert in another precision or layout."""
        return tuple(row for row in self.peers if not row.competitor.startswith(f"{OURS} "))

    @property
    def fastest_other(self) -> Row | None:
        """Returns the other competitor with the smallest ratio, or None if no other has a ratio."""
        ratios = {i: row.speedup for i, row in enumerate(self.others) if row.speedup is not None}
        return self.others[min(ratios, key=lambda i: ratios[i])] if ratios else None

    @property
    def dtype(self) -> str:
        """Returns the dtype of fastbert; a peer may have another."""
        return (self.ours or self.rows[0]).dtype

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """Returns the names that identify the contest in different runs."""
        return self.suite, self.model, self.workload, self.setting, self.dtype

    @property
    def label(self) -> str:
        """Returns the key without the suite, as text."""
        return " · ".join(filter(None, (self.model, self.workload, self.setting, short_dtype(self.dtype))))

    def name_of(self, row: Row) -> str:
        """Returns the competitor's name, with its dtype if that is not the contest's."""
        return row.competitor if row.dtype == self.dtype else f"{row.competitor} ({short_dtype(row.dtype)})"


def contests(rows: Iterable[Row]) -> list[Contest]:
    """Groups rows into contests, in the order of their first rows.

    Rows of one suite, workload, model and setting form a contest. When a competitor appears a second time, the next
    contest begins, with the same peers in another dtype.
    """
    groups: dict[tuple[str, str, str, str], list[list[Row]]] = {}
    order: list[tuple[tuple[str, str, str, str], list[Row]]] = []
    for row in rows:
        key = (row.suite, row.workload, str(row.extra.get("model", "")), str(row.extra.get("setting", "")))
        same_key = groups.setdefault(key, [])
        if not same_key or row.competitor in (other.competitor for other in same_key[-1]):
            same_key.append([])
            order.append((key, same_key[-1]))
        same_key[-1].append(row)
    return [Contest(*key, tuple(sorted(group, key=lambda row: row.competitor != OURS))) for key, group in order]


def suites(results: Results) -> dict[str, list[Contest]]:
    """Returns the contests of each suite, in order."""
    by_suite: dict[str, list[Contest]] = {}
    for contest in contests(results.rows):
        by_suite.setdefault(contest.suite, []).append(contest)
    return by_suite


def competitors(members: Iterable[Contest]) -> list[str]:
    """Returns the distinct names of competitors, in order of appearance."""
    return list(dict.fromkeys(contest.name_of(row) for contest in members for row in contest.rows))


def contest_table(contest: Contest) -> Table:
    """Returns a table with a line for each competitor; it omits columns that are empty for all of them."""
    ran = [row for row in contest.rows if row.status == OK]
    columns = [column for column in _COLUMNS if any(column[1](row) for row in ran)]
    header = [heading for heading, _ in columns] or ["result"]
    lines = [
        Line(contest.name_of(row), tuple(cell(row) or NO_VALUE for _, cell in columns) or (NO_VALUE,), tone=_tone(row))
        if row.status == OK
        else Line(contest.name_of(row), (), row.status, row.detail or "no reason given", _tone(row))
        for row in contest.rows
    ]
    notes = []
    if contest.ours is None:
        notes.append("fastbert did not take part, so there are no speed-ups.")
    elif contest.ours.status != OK and contest.peers:
        notes.append(f"fastbert is {contest.ours.status} here, so there are no speed-ups.")
    remarks = [(contest.name_of(row), row.detail or row.extra.get("note")) for row in ran]
    notes += [f"{name}: {text}" for name, text in remarks if text]
    title = f"{contest.suite}: {contest.label}"
    return Table(title, ("competitor", *header), tuple(lines), tuple(notes))


def _tone(row: Row) -> str:
    return "ours" if row.competitor == OURS else ""


def summary_table(suite: str, members: Sequence[Contest]) -> Table:
    """Returns a table of how many times faster fastbert is than each peer.

    It has a line for each contest, and at the end the geometric mean of each setting.
    """
    peers = [name for name in competitors(members) if name != OURS]
    lines = []
    for contest in members:
        cells = {contest.name_of(row): ratio_cell(row) for row in contest.peers}
        ours = NO_VALUE if contest.ours is None else speed(contest.ours)
        lines.append(Line(contest.label, (ours, *(cells.get(name, NO_VALUE) for name in peers))))
    settings = dict.fromkeys(contest.setting for contest in members)
    for setting in settings:
        of_setting = [contest for contest in members if contest.setting == setting]
        if len(of_setting) > 1:
            means = (mean_cell(peer_rows(of_setting, name)) for name in peers)
            name = "geometric mean" + (f", {setting or 'other'}" if len(settings) > 1 else "")
            lines.append(Line(name, (NO_VALUE, *means), tone="ours"))
    title = f"{suite}: how many times faster fastbert is"
    heads = "workload", "fastbert's speed", *(f"faster than {name}" for name in peers)
    return Table(title, heads, tuple(lines), _reasons(members))


def _reasons(members: Sequence[Contest]) -> tuple[str, ...]:
    """Returns the reasons why competitors did not run: one line per competitor and status, with its first reason."""
    details: dict[tuple[str, str], list[str]] = {}
    for contest in members:
        for row in contest.rows:
            if row.status != OK:
                details.setdefault((contest.name_of(row), row.status), []).append(row.detail or "no reason given")
    return tuple(
        f"{name} {status}, {len(reasons)} of {len(members)}: {reasons[0]}"
        + (" (other reasons elsewhere)" if len(set(reasons)) > 1 else "")
        for (name, status), reasons in details.items()
    )


def peer_rows(members: Iterable[Contest], name: str) -> list[Row]:
    """Returns the rows of one peer, named as in `Contest.name_of`."""
    return [row for contest in members for row in contest.peers if contest.name_of(row) == name]


def ratio_cell(row: Row) -> str:
    """Returns the speed-up of fastbert over a peer, or the reason for a missing one."""
    if row.status != OK:
        return row.status
    return NO_RATIO if row.speedup is None else times(row.speedup)


def mean_cell(rows: Sequence[Row]) -> str:
    """Returns the geometric mean of the speed-ups over one peer, with their number if some are missing."""
    ratios = [row.speedup for row in rows if row.speedup is not None]
    if ratios:
        return times(geometric_mean(ratios)) + (f" ({len(ratios)} of {len(rows)})" if len(ratios) < len(rows) else "")
    statuses = list(dict.fromkeys(map(ratio_cell, rows)))
    return " / ".join(statuses) or NO_VALUE


def speed(row: Row) -> str:
    """Returns the speed of a competitor in the first unit that it has: tokens/s, texts/s, rate, time.

    A rate has its share of the measured ceiling. For a competitor that did not run, it returns the status.
    """
    if row.status != OK:
        return row.status
    if row.tokens_per_second is not None:
        return f"{si(row.tokens_per_second)} tokens/s"
    if row.items and row.seconds:
        return f"{si(row.items / row.seconds)} texts/s"
    return " = ".join(filter(None, (_rate(row), _ceiling(row)))) or _time(row) or NO_VALUE


def environment_lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the machine as pairs of text, with the packages in one line, including those that are not installed."""
    lines = []
    for key, value in environment.items():
        if isinstance(value, dict):
            installed = [f"{name} {version}" for name, version in value.items() if version is not None]
            absent = [name for name, version in value.items() if version is None]
            value = ", ".join(installed) + (f"; not installed: {', '.join(absent)}" if absent else "")
        elif key.endswith("_bytes") and isinstance(value, (int, float)):
            key, value = key.removesuffix("_bytes"), memory(value)
        lines.append((key.replace("_", " "), "unknown" if value is None else str(value)))
    return lines


def ceiling_lines(ceilings: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Returns ceilings as pairs of text; their names have the units."""
    return [(name, "unknown" if value is None else digits(value)) for name, value in ceilings.items()]


def source(environment: dict[str, Any]) -> str:
    """Returns device, date and commit in one line, which is below every figure."""
    parts = [str(environment.get("device") or "unknown device"), str(environment.get("date") or "no date")[:10]]
    commit = environment.get("commit")
    return ", ".join(parts + ([f"commit {commit}"] if commit else []))


def short_dtype(dtype: str) -> str:
    return SHORT_DTYPES.get(dtype, dtype)


def number(row: Row, key: str) -> float | None:
    """Returns a number of `Row.extra`, or None if it is absent or not finite."""
    value = row.extra.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def digits(value: float) -> str:
    """Formats three significant digits, never in exponent form from 0.001 up."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:.{decimals}f}" if 0 < decimals <= 5 else f"{value:.0f}" if decimals <= 0 else f"{value:.3g}"


def si(value: float) -> str:
    """Formats 1,234,567 as 1.23 M."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor * 0.9995:
            return digits(value / factor) + prefix
    return digits(value)


def duration(seconds: float) -> str:
    """Formats 0.00123 as 1.23 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor * 0.9995:
            return f"{digits(seconds / factor)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def memory(size: float) -> str:
    """Formats bytes in GiB, MiB or KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{digits(size / 2**power)} {unit}"
    return f"{digits(size / 2**10)} KiB"


def times(ratio: float) -> str:
    """Formats a ratio, to the hundredth or to three digits."""
    return f"{ratio:.2f}×" if 0.1 <= ratio < 1 else f"{digits(ratio)}×"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def rate_of(row: Row) -> tuple[float, str] | None:
    """Returns the rate and its unit; TFLOP/s from `flops_per_token` if the row has no rate."""
    if row.rate is not None:
        return row.rate, row.rate_unit
    flops = number(row, "flops_per_token")
    if flops is None or row.tokens_per_second is None:
        return None
    return flops * row.tokens_per_second / 1e12, "TFLOP/s"


def _tokens(row: Row) -> str:
    return "" if row.tokens_per_second is None else si(row.tokens_per_second)


def _texts(row: Row) -> str:
    return si(row.items / row.seconds) if row.items and row.seconds else ""


def _time(row: Row) -> str:
    if row.seconds is None:
        return ""
    spread = "" if row.spread is None or math.isnan(row.spread) else f" ± {percent(row.spread)}"
    return duration(row.seconds) + spread


def _percentiles(row: Row) -> str:
    if row.extra.get("setting") != "latency" and row.rounds < ROUNDS_FOR_PERCENTILES:
        return ""
    times_of = [duration(p) for p in (row.p50, row.p95, row.p99) if p is not None]
    return " / ".join(times_of) if len(times_of) == 3 else ""


def _speedup(row: Row) -> str:
    if row.competitor == OURS:
        return ""
    if row.speedup is None:
        return NO_RATIO
    if row.speedup_low is None or row.speedup_high is None:
        return times(row.speedup)
    return f"{times(row.speedup)} [{times(row.speedup_low)[:-1]} to {times(row.speedup_high)[:-1]}]"


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    return f"{row.error:.2g}" + ("" if row.bound is None else f" (≤ {row.bound:.2g})")


def _memory(row: Row) -> str:
    return "" if row.peak_bytes is None else memory(row.peak_bytes)


def _rate(row: Row) -> str:
    rate = rate_of(row)
    return "" if rate is None else f"{digits(rate[0])} {rate[1]}".strip()


def _ceiling(row: Row) -> str:
    return "" if row.ceiling_fraction is None else f"{percent(row.ceiling_fraction)} of the ceiling"


def _extra(key: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = number(row, key)
        return "" if value is None else form(value)

    return cell


def _bars(row: Row) -> str:
    bars = row.extra.get("bars") or {}
    return "; ".join(f"{name}: {digits(reached)} (≥ {digits(least)})" for name, (reached, least) in bars.items())


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("valid tokens/s", _tokens),
    ("texts/s", _texts),
    ("time ± spread", _time),
    ("time at p50 / p95 / p99", _percentiles),
    ("time ÷ fastbert's [95 % interval]", _speedup),
    ("rate", _rate),
    ("share of the ceiling", lambda row: "" if row.ceiling_fraction is None else percent(row.ceiling_fraction)),
    ("error (bound)", _error),
    ("largest error", _extra("max_error", lambda value: f"{value:.2g}")),
    ("cosine, 1st percentile", _extra("low_cosine", lambda value: f"{value:.4f}")),
    ("peak memory", _memory),
    ("kept for the backward pass", _extra("saved_bytes", memory)),
    ("H bytes kept a token and layer", _extra("saved_h", digits)),
    ("reached (bar)", _bars),
    ("Python calls", _extra("python_calls", digits)),
    ("bar of the time", _extra("bar_seconds", lambda value: f"≤ {duration(value)}")),
    ("share of padding", _extra("padding_waste", percent)),
    ("time to prepare", _extra("prepare_seconds", duration)),
    ("time of a cold start", _extra("cold_start_seconds", duration)),
)
