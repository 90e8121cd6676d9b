"""This script tells whether fastbert got slower since a baseline. It compares ratios to peers, never seconds.

    python benchmarks/compare.py BASELINE NEW          each a result file or a folder of them
    python benchmarks/compare.py NEW                   with the newest committed results of the same device

There are three kinds of regressions. A speed-up over a peer fell by more than the threshold, with intervals that do not
overlap. A competitor that ran before fails now or is wrong. Or fastbert itself is missing. Exit codes: 0 none, 1
regressions, 2 no comparison (unreadable, different types of device, nothing in common).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from baseline import committed

from fastbert.bench.measure import geometric_mean
from fastbert.bench.peers import OURS
from fastbert.bench.results import MISSING, OK, Results, Row
from fastbert.bench.tables import contests, source, times
from fastbert.pages.document import Line, Table
from fastbert.pages.terminal import plain_table

THRESHOLD = 0.1
SLOWER, FASTER, SAME = "slower", "faster", "same"
BROKEN, REPAIRED, ABSENT, NO_RATIO = "broken", "repaired", "not compared", "no ratio"
REGRESSIONS = (SLOWER, BROKEN)
_VERDICT = max(map(len, (SLOWER, FASTER, SAME, BROKEN, REPAIRED, ABSENT, NO_RATIO)))

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A Change is one competitor of one contest, before and now."""

    key: Key
    label: str
    competitor: str
    before: Row
    after: Row | None
    verdict: str
    detail: str = ""


def keyed(results: Results) -> dict[Key, tuple[str, str, Row]]:
    """Returns the rows by the fields that identify them in each run, with the contest's label and the competitor's
    name.
    """
    rows_by_key: dict[Key, tuple[str, str, Row]] = {}
    for contest in contests(results.rows):
        for row in contest.rows:
            name = contest.name_of(row)
            key: Key = (*contest.key, name)
            again = 2
            while key in rows_by_key:
                key = (*contest.key, name, str(again))
                again += 1
            rows_by_key[key] = f"{contest.suite}: {contest.label}", name, row
    return rows_by_key


def compare(baseline: Results, new: Results, threshold: float = THRESHOLD) -> list[Change]:
    """Returns every row of the baseline with its new state."""
    now = keyed(new)
    changes = []
    for key, (label, name, before) in keyed(baseline).items():
        after = now[key][2] if key in now else None
        verdict, detail = _verdict(before, after, threshold)
        changes.append(Change(key, label, name, before, after, verdict, detail))
    return changes


def _verdict(before: Row, after: Row | None, threshold: float) -> tuple[str, str]:
    if after is None:
        return ABSENT, "not among the new results"
    if before.status != OK:
        return (REPAIRED, f"was {before.status}") if after.status == OK else (SAME, "")
    if after.status == MISSING and after.competitor != OURS:
        return ABSENT, f"missing: {after.detail}"
    if after.status != OK:
        return BROKEN, f"{after.status}: {after.detail}"
    if before.speedup is None:
        return SAME, ""
    if after.speedup is None:
        return NO_RATIO, "no ratio now: see fastbert's own row"
    low, high = _interval(before)
    new_low, new_high = _interval(after)
    if after.speedup < before.speedup * (1 - threshold) and new_high < low:
        return SLOWER, ""
    if after.speedup > before.speedup / (1 - threshold) and new_low > high:
        return FASTER, ""
    return SAME, ""


def _interval(row: Row) -> tuple[float, float]:
    ratio = row.speedup or 0.0
    low = ratio if row.speedup_low is None else row.speedup_low
    return low, ratio if row.speedup_high is None else row.speedup_high


def changes_table(changes: Sequence[Change]) -> Table:
    lines = tuple(
        Line(
            f"{change.verdict:<{_VERDICT}}  {change.label}: {change.competitor}",
            tuple(map(_said, (change.before, change.after))),
        )
        for change in changes
    )
    notes = tuple(f"{c.verdict:<{_VERDICT}}  {c.label}: {c.competitor}: {c.detail}" for c in changes if c.detail)
    return Table("changes", ("change", "speed-up before", "speed-up now"), lines, notes)


def means_table(changes: Sequence[Change]) -> Table:
    """Returns geometric means of the speed-ups that both runs have, with a line for each suite and setting."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for change in changes:
        if change.before.speedup is not None and change.after is not None and change.after.speedup is not None:
            suite, _, _, setting, *_ = change.key
            groups.setdefault(f"{suite} {setting}".strip(), []).append((change.before.speedup, change.after.speedup))
    lines = []
    for name, pairs in groups.items():
        before, after = (geometric_mean([pair[k] for pair in pairs]) for k in (0, 1))
        moved = f"{100 * (after / before - 1):+.1f} %"
        lines.append(Line(name, (str(len(pairs)), times(before), times(after), moved)))
    heads = "suite", "number of ratios", "mean before", "mean now", "change of the mean"
    return Table("geometric means of the ratios", heads, tuple(lines))


def _said(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.status != OK:
        return row.status
    if row.speedup is None:
        return "ran"
    low, high = _interval(row)
    return f"{times(row.speedup)} [{times(low)[:-1]} to {times(high)[:-1]}]"


def differences(baseline: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Returns the other differences that may have changed ratios: another device, driver or version of a package."""
    for key in ("device", "driver", "cuda", "threads", "python"):
        if baseline.get(key) != new.get(key):
            yield f"{key}: {baseline.get(key)}, now {new.get(key)}"
    then, now = baseline.get("packages") or {}, new.get("packages") or {}
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{name}: {then.get(name)}, now {now.get(name)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "baseline", type=Path, nargs="?", metavar="BASELINE", help="default: the newest committed ones of the device"
    )
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--threshold", type=_share, default=THRESHOLD, metavar="SHARE", help="a fall that counts (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="compare results of different types of device")
    parser.add_argument("--all", action="store_true", help="show what stayed the same too")
    args = parser.parse_args(argv)
    try:
        new = report.load(args.new)
        if args.baseline is None:
            name, baseline = committed(args.new)
        else:
            name, baseline = str(args.baseline), report.load(args.baseline)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kinds = [results.environment.get("device_type") for results in (baseline, new)]
    if kinds[0] != kinds[1] and not args.force:
        print(
            f"error: the baseline is of device type {kinds[0]} and the new results of {kinds[1]}: their ratios say "
            "nothing about each other (--force compares all the same)",
            file=sys.stderr,
        )
        return 2
    print(f"baseline  {source(baseline.environment)}: {name}\nnew       {source(new.environment)}: {args.new}")
    for line in differences(baseline.environment, new.environment):
        print(f"differs   {line}")
    changes = compare(baseline, new, args.threshold)
    if all(change.after is None for change in changes):
        print("error: the two have no contest in common", file=sys.stderr)
        return 2
    shown = [change for change in changes if args.all or change.verdict != SAME]
    shown.sort(key=lambda change: change.verdict not in REGRESSIONS)
    width = 200
    if shown:
        print("\n" + plain_table(changes_table(shown), width))
    print("\n" + plain_table(means_table(changes), width))
    regressions = sum(change.verdict in REGRESSIONS for change in changes)
    counts = ", ".join(f"{sum(c.verdict == v for c in changes)} {v}" for v in dict.fromkeys(c.verdict for c in changes))
    print(f"\n{counts} (a fall or rise counts from {100 * args.threshold:g} % and with intervals apart)")
    print(f"{regressions} regressions" if regressions != 1 else "1 regression")
    return 1 if regressions else 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
