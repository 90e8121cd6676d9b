"""Results as tables of text: rows put into contests, numbers given digits and units, one table a contest.

A row may carry more than its fields, in `Row.extra`. These keys are read here and in plots.py, all optional:

    model               str    "BERT-base", "MiniLM": what ran
    setting             str    "throughput" or "latency"
    length, batch       int    tokens of a sequence (the longest, where lengths vary) and sequences at a time
    padding_waste       float  share of a padded batch that is padding, 0 to 1
    flops_per_token     float  gives TFLOP/s where the row has no `rate`
    max_error           float  the largest difference from the reference, over the RMS of the reference
    low_cosine          float  1st percentile of the cosines between a text's vector and the exact one
    prepare_seconds     float  loading, compiling, moving to the device: once, before the first run
    cold_start_seconds  float  from nothing to the first result, in a fresh process with empty caches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.bench.measure import geometric_mean
from fastbert.bench.peers import OURS
from fastbert.bench.results import OK, Results, Row

SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NOT_GIVEN = "–"  # what a competitor that ran does not state; one that did not run shows its status instead
NO_RATIO = "no ratio"
ROUNDS_FOR_PERCENTILES = 20  # of fewer, the 95th percentile is the slowest round


@dataclass(frozen=True)
class Contest:
    """Competitors timed against one another: rows of one suite, workload, model and setting, fastbert's first."""

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
    def dtype(self) -> str:
        """That of fastbert; a peer may have another."""
        return (self.ours or self.rows[0]).dtype

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What identifies the contest from one run to the next."""
        return self.suite, self.model, self.workload, self.setting, self.dtype

    @property
    def label(self) -> str:
        """All of the key but the suite."""
        return " · ".join(filter(None, (self.model, self.workload, self.setting, short_dtype(self.dtype))))

    def name_of(self, row: Row) -> str:
        """The competitor, with its dtype where that is not the contest's."""
        return row.competitor if row.dtype == self.dtype else f"{row.competitor} ({short_dtype(row.dtype)})"


@dataclass(frozen=True)
class Line:
    """The first cell and the others; or, for a competitor that has no numbers, its status and the reason."""

    name: str
    cells: tuple[str, ...] = ()
    status: str = OK
    reason: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def prose(self) -> bool:
        """Names with text beside them, rather than numbers under headings."""
        return not any(self.header)


def contests(rows: Iterable[Row]) -> list[Contest]:
    """Rows in contests, in the order of their first rows.

    Rows of one suite, workload, model and setting belong together until a competitor comes a second time: that is the
    next contest, as when the same peers meet in another dtype.
    """
    groups: dict[tuple[str, str, str, str], list[list[Row]]] = {}
    order: list[tuple[tuple[str, str, str, str], list[Row]]] = []
    for row in rows:
        key = (row.suite, row.workload, str(row.extra.get("model", "")), str(row.extra.get("setting", "")))
        found = groups.setdefault(key, [])
        if not found or row.competitor in (other.competitor for other in found[-1]):
            found.append([])
            order.append((key, found[-1]))
        found[-1].append(row)
    return [Contest(*key, tuple(sorted(group, key=lambda row: row.competitor != OURS))) for key, group in order]


def suites(results: Results) -> dict[str, list[Contest]]:
    """The contests of each suite, in order."""
    found: dict[str, list[Contest]] = {}
    for contest in contests(results.rows):
        found.setdefault(contest.suite, []).append(contest)
    return found


def competitors(found: Iterable[Contest]) -> list[str]:
    """Names in the order in which they come, each once."""
    return list(dict.fromkeys(contest.name_of(row) for contest in found for row in contest.rows))


def contest_table(contest: Contest) -> Table:
    """A line a competitor; columns that no competitor has anything for are left out."""
    ran = [row for row in contest.rows if row.status == OK]
    columns = [column for column in _COLUMNS if any(column[1](row) for row in ran)]
    header = [heading for heading, _ in columns] or ["result"]
    lines = [
        Line(contest.name_of(row), tuple(cell(row) or NOT_GIVEN for _, cell in columns) or (NOT_GIVEN,))
        if row.status == OK
        else Line(contest.name_of(row), status=row.status, reason=row.detail or "no reason given")
        for row in contest.rows
    ]
    notes = []
    if contest.ours is None:
        notes.append("fastbert did not take part, so there are no speed-ups.")
    elif contest.ours.status != OK and contest.peers:
        notes.append(f"fastbert is {contest.ours.status} here, so there are no speed-ups.")
    said = [(contest.name_of(row), row.detail or row.extra.get("note")) for row in ran]
    notes += [f"{name}: {text}" for name, text in said if text]
    title = f"{contest.suite}: {contest.label}"
    return Table(title, ("competitor", *header), tuple(lines), tuple(notes))


def summary_table(suite: str, found: Sequence[Contest]) -> Table:
    """How many times faster fastbert is than each peer: a line a contest, the geometric mean of each setting last."""
    peers = [name for name in competitors(found) if name != OURS]
    lines = []
    for contest in found:
        cells = {contest.name_of(row): ratio_cell(row) for row in contest.peers}
        ours = NOT_GIVEN if contest.ours is None else speed(contest.ours)
        lines.append(Line(contest.label, (ours, *(cells.get(name, NOT_GIVEN) for name in peers))))
    settings = dict.fromkeys(contest.setting for contest in found)
    for setting in settings:
        of_setting = [contest for contest in found if contest.setting == setting]
        if len(of_setting) > 1:
            means = (mean_cell(peer_rows(of_setting, name)) for name in peers)
            name = "geometric mean" + (f", {setting or 'other'}" if len(settings) > 1 else "")
            lines.append(Line(name, (NOT_GIVEN, *means)))
    title = f"{suite}: how many times faster fastbert is"
    return Table(title, ("workload", OURS, *(f"than {name}" for name in peers)), tuple(lines), _reasons(found))


def _reasons(found: Sequence[Contest]) -> tuple[str, ...]:
    """Why competitors did not run: a line for each and its status, with the reason that it gave first."""
    said: dict[tuple[str, str], list[str]] = {}
    for contest in found:
        for row in contest.rows:
            if row.status != OK:
                said.setdefault((contest.name_of(row), row.status), []).append(row.detail or "no reason given")
    return tuple(
        f"{name} {status}, {len(reasons)} of {len(found)}: {reasons[0]}"
        + (" (other reasons elsewhere)" if len(set(reasons)) > 1 else "")
        for (name, status), reasons in said.items()
    )


def peer_rows(found: Iterable[Contest], name: str) -> list[Row]:
    """The rows of one peer, named as `Contest.name_of` names it."""
    return [row for contest in found for row in contest.peers if contest.name_of(row) == name]


def ratio_cell(row: Row) -> str:
    """The speed-up of fastbert over a peer, or why there is none."""
    if row.status != OK:
        return row.status
    return NO_RATIO if row.speedup is None else times(row.speedup)


def mean_cell(rows: Sequence[Row]) -> str:
    """The geometric mean of the speed-ups over one peer, with how many there are if not all."""
    ratios = [row.speedup for row in rows if row.speedup is not None]
    if ratios:
        return times(geometric_mean(ratios)) + (f" ({len(ratios)} of {len(rows)})" if len(ratios) < len(rows) else "")
    said = list(dict.fromkeys(map(ratio_cell, rows)))
    return " / ".join(said) or NOT_GIVEN


def speed(row: Row) -> str:
    """How fast a competitor is, in the first unit it has: tokens/s, texts/s, rate, time. Its status if it did not run.

    A rate comes with its share of the measured ceiling.
    """
    if row.status != OK:
        return row.status
    if row.tokens_per_second is not None:
        return f"{si(row.tokens_per_second)} tokens/s"
    if row.items and row.seconds:
        return f"{si(row.items / row.seconds)} texts/s"
    return " = ".join(filter(None, (_rate(row), _ceiling(row)))) or _time(row) or NOT_GIVEN


def environment_lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine as pairs of text; packages in one line, those not installed named as such."""
    lines = []
    for key, value in environment.items():
        if isinstance(value, dict):
            there = [f"{name} {version}" for name, version in value.items() if version is not None]
            absent = [name for name, version in value.items() if version is None]
            value = ", ".join(there) + (f"; not installed: {', '.join(absent)}" if absent else "")
        elif key.endswith("_bytes") and isinstance(value, (int, float)):
            key, value = key.removesuffix("_bytes"), memory(value)
        lines.append((key.replace("_", " "), "unknown" if value is None else str(value)))
    return lines


def ceiling_lines(ceilings: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Ceilings as pairs of text; their names hold the units."""
    return [(name, "unknown" if value is None else digits(value)) for name, value in ceilings.items()]


def source(environment: dict[str, Any]) -> str:
    """Device, day and commit in one line: what stands under every figure."""
    parts = [str(environment.get("device") or "unknown device"), str(environment.get("date") or "no date")[:10]]
    commit = environment.get("commit")
    return ", ".join(parts + ([f"commit {commit}"] if commit else []))


def short_dtype(dtype: str) -> str:
    return SHORT_DTYPES.get(dtype, dtype)


def number(row: Row, key: str) -> float | None:
    """A finite number of `Row.extra`, None if it is not there or not one."""
    value = row.extra.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def digits(value: float) -> str:
    """Three significant digits, never in exponent form from 0.001 up."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:.{decimals}f}" if 0 < decimals <= 5 else f"{value:.0f}" if decimals <= 0 else f"{value:.3g}"


def si(value: float) -> str:
    """1,234,567 as 1.23 M."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor * 0.9995:
            return digits(value / factor) + prefix
    return digits(value)


def duration(seconds: float) -> str:
    """0.00123 as 1.23 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor * 0.9995:
            return f"{digits(seconds / factor)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def memory(size: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{digits(size / 2**power)} {unit}"
    return f"{digits(size / 2**10)} KiB"


def times(ratio: float) -> str:
    """A ratio, to the hundredth or to three digits."""
    return f"{ratio:.2f}×" if 0.1 <= ratio < 1 else f"{digits(ratio)}×"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def rate_of(row: Row) -> tuple[float, str] | None:
    """The rate and its unit; TFLOP/s from `flops_per_token` where the row has none."""
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
    found = [duration(p) for p in (row.p50, row.p95, row.p99) if p is not None]
    return " / ".join(found) if len(found) == 3 else ""


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
    found = rate_of(row)
    return "" if found is None else f"{digits(found[0])} {found[1]}".strip()


def _ceiling(row: Row) -> str:
    return "" if row.ceiling_fraction is None else f"{percent(row.ceiling_fraction)} of the ceiling"


def _extra(key: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = number(row, key)
        return "" if value is None else form(value)

    return cell


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens/s", _tokens),
    ("texts/s", _texts),
    ("time", _time),
    ("p50 / p95 / p99", _percentiles),
    ("fastbert is faster", _speedup),
    ("rate", _rate),
    ("of the ceiling", lambda row: "" if row.ceiling_fraction is None else percent(row.ceiling_fraction)),
    ("error (bound)", _error),
    ("largest error", _extra("max_error", lambda value: f"{value:.2g}")),
    ("cosine, 1st percentile", _extra("low_cosine", lambda value: f"{value:.4f}")),
    ("peak memory", _memory),
    ("padding", _extra("padding_waste", percent)),
    ("prepare", _extra("prepare_seconds", duration)),
    ("cold start", _extra("cold_start_seconds", duration)),
)
