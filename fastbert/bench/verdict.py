"""The verdict on results is a sentence, and a picture that compares fastbert with the fastest other competitor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fastbert.bench.measure import geometric_mean
from fastbert.bench.plots import ratio_bar
from fastbert.bench.results import FAILED, MISSING, OK, WRONG, Results, Row
from fastbert.bench.tables import Contest, contests, short_dtype, times
from fastbert.pages.document import Picture, Verdict
from fastbert.pages.figures import BLUE, ORANGE, Bar

MOST_BARS = 24  # maximum in the picture; with more workloads, related ones share a bar
MOST_FAULTS = 5  # maximum number of listed faults
UNIT = "times as fast"

_FAULTS = {WRONG: "gave wrong output", FAILED: "failed", MISSING: "did not run"}


def verdict(results: Results, notes: Sequence[str] = ()) -> Verdict:
    """Returns the verdict on all results. It is good if fastbert ran everywhere and is the fastest on average."""
    members = contests(results.rows)
    faults = [(contest, contest.ours) for contest in members if contest.ours is not None and contest.ours.status != OK]
    ratios = [row.speedup for row in map(_nearest, members) if row is not None and row.speedup is not None]
    return Verdict(
        " ".join([*_faults_sentence(faults, len(members)), *_speed_sentences(members, ratios)]),
        good=any(contest.ours for contest in members) and not faults and (not ratios or geometric_mean(ratios) >= 1),
        points=_faults_listed(faults),
        picture=_picture(members) if ratios or faults else None,
        notes=tuple(notes),
    )


def _nearest(contest: Contest) -> Row | None:
    """Returns the fastest other competitor, or None if fastbert did not finish or no other has a ratio."""
    return contest.fastest_other if contest.ours is not None and contest.ours.status == OK else None


def _faults_sentence(faults: Sequence[tuple[Contest, Row]], n_workloads: int) -> list[str]:
    counts = Counter(row.status for _, row in faults)
    parts = [f"{_FAULTS.get(status, status)} in {count}" for status, count in counts.items()]
    return [f"fastbert {' and '.join(parts)} of {_workloads(n_workloads)}."] if parts else []


def _faults_listed(faults: Sequence[tuple[Contest, Row]]) -> tuple[str, ...]:
    listed = [f"{c.suite} · {c.label}: {row.status}: {row.detail or 'no reason given'}" for c, row in faults]
    more = len(listed) - MOST_FAULTS
    return tuple(listed[:MOST_FAULTS]) + ((f"and {more} more, in the tables",) if more > 0 else ())


def _speed_sentences(members: Sequence[Contest], ratios: Sequence[float]) -> list[str]:
    if not members:
        return ["There are no rows."]
    if all(contest.ours is None for contest in members):
        return ["fastbert did not take part."]
    if not ratios:
        return ["No other competitor was timed beside fastbert, so there is no ratio."]
    colours = [bar.colour for row in map(_nearest, members) if row and isinstance(bar := ratio_bar(row), Bar)]
    faster, slower = colours.count(BLUE), colours.count(ORANGE)
    level = len(colours) - faster - slower
    parts = [f"faster than the fastest other competitor in {faster} of {_workloads(len(ratios))}"]
    parts += [f"level with it in {level}"] * (level > 0) + [f"slower in {slower}"] * (slower > 0)
    mean = f"It is {times(geometric_mean(ratios))[:-1]} times as fast"
    spread = f" (geometric mean; {times(min(ratios))} to {times(max(ratios))})" if len(ratios) > 1 else ""
    return [f"fastbert is {' and '.join(filter(None, (', '.join(parts[:-1]), parts[-1])))}.", f"{mean}{spread}."]


def _workloads(count: int) -> str:
    return f"{count} workload{'s' if count != 1 else ''}"


def _picture(members: Sequence[Contest]) -> Picture:
    """Returns a bar for each workload, or for each group of workloads if there are many."""
    keys: list[Callable[[Contest], str]] = [
        lambda c: f"{c.suite} · {c.label}",
        lambda c: " · ".join(filter(None, (c.suite, c.model, c.setting, short_dtype(c.dtype)))),
        lambda c: c.suite,
    ]
    groups: dict[str, list[Contest]] = {}
    for key in keys:
        groups = {}
        for contest in members:
            groups.setdefault(key(contest), []).append(contest)
        if len(groups) <= MOST_BARS:
            break
    title = "fastbert's speed ÷ that of the fastest other competitor"
    if len(groups) < len(members):
        title += ", geometric means"
    foot = "Whiskers: 95 % interval. Blue: fastbert is faster, orange: slower, grey: the interval holds 1."
    bars = tuple(map(_bar, groups.values()))
    remarks = tuple(map(_remark, groups.values()))
    return Picture("verdict", title, tuple(groups), bars, "1×: equally fast", foot, log=True, remarks=remarks)


def _remark(group: Sequence[Contest]) -> str:
    """Returns the name of the fastest other competitor, or the number of workloads that share a bar."""
    rows = [(contest, row) for contest in group if (row := _nearest(contest)) is not None]
    if len(group) > 1:
        return f"in {_workloads(len(rows))}"
    return rows[0][0].name_of(rows[0][1]) if rows else ""


def _bar(group: Sequence[Contest]) -> Bar | str:
    faults = Counter(contest.ours.status for contest in group if contest.ours is not None and contest.ours.status != OK)
    if faults:
        status, count = faults.most_common(1)[0]
        return f"fastbert {status}" + (f", {count} of {len(group)}" if len(group) > 1 else "")
    rows = [row for contest in group if (row := _nearest(contest)) is not None]
    if not rows:
        return "no other"
    if len(group) == 1:
        return ratio_bar(rows[0])
    mean = geometric_mean([row.speedup for row in rows if row.speedup is not None])
    return Bar(mean, times(mean), BLUE if mean >= 1 else ORANGE)
