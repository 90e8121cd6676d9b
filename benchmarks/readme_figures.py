"""This module makes the numbers of docs/numbers.md: a short table for each device, from its newest committed results.

    python benchmarks/report.py --readme

rewrites the text between the two markers in docs/numbers.md, and the caption of the chart in README.md
(readme_chart.py). Tests compare both with the committed results, so no number gets there by hand.
"""

from __future__ import annotations

import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbert.bench.measure import geometric_mean
from fastbert.bench.results import OK, Results, Row
from fastbert.bench.tables import Contest, contests, short_dtype, si, source, times
from fastbert.checkpoint.files import write_text
from fastbert.pages.document import NO_VALUE, Line, Table
from fastbert.pages.markdown import markdown_table, markdown_text

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
DEVICE_TYPES = {"cuda": "GPU", "cpu": "CPU"}
LEFT_OUT = ("kernel", "start", "host")  # suites whose name begins so: single operations, one-time work, the host
HEADER = ("suite", "fastbert, valid tokens/s", "faster than the fastest peer", "faster than the median peer")


def section(folders: Mapping[Path, Results]) -> str:
    """Returns the text between the markers, from the newest folder for each device, the newest device first."""
    newest: dict[tuple[str, str], tuple[str, Path, Results]] = {}
    for folder, results in sorted(folders.items()):
        kind, device, date = (str(results.environment.get(name)) for name in ("device_type", "device", "date"))
        if (kind, device) not in newest or date >= newest[kind, device][0]:
            newest[kind, device] = date, folder, results
    parts = []
    for kind, title in DEVICE_TYPES.items():
        of_kind = [entry for (of_device, _), entry in newest.items() if of_device == kind]
        if not of_kind:
            parts.append(f"**{title}**: not measured yet.")
        for _, folder, results in sorted(of_kind, key=lambda entry: entry[0], reverse=True):
            parts.append(_device(title, folder, results))
    return "\n\n".join(parts)


def _device(title: str, folder: Path, results: Results) -> str:
    groups: dict[tuple[str, ...], list[Contest]] = {}
    for contest in contests(results.rows):
        if not contest.suite.startswith(LEFT_OUT):
            key = contest.suite, contest.model, contest.setting, short_dtype(contest.dtype)
            groups.setdefault(key, []).append(contest)
    page = f"../benchmarks/results/{folder.name}/" + ("index.md" if (folder / "index.md").exists() else "")
    heading = f"{title}: {source(results.environment)}"
    if not groups:
        return f"**{heading}**: single operations only, [all numbers]({page})."
    lines = tuple(_line(" · ".join(filter(None, key)), group) for key, group in groups.items())
    notes = [
        "Ratios are geometric means over workloads, with the smallest and the largest; below 1× fastbert is slower.",
        _not_everywhere([contest for group in groups.values() for contest in group]),
        f"[All numbers, every peer, and the method]({page}).",
    ]
    return f"{markdown_table(Table(heading, HEADER, lines))}\n\n{' '.join(filter(None, notes))}"


def _not_everywhere(all_contests: Sequence[Contest]) -> str:
    """Returns the peers that were missing, failed or wrong, and in how many of their contests."""
    statuses: dict[str, Counter[str]] = {}
    for contest in all_contests:
        for row in contest.peers:
            statuses.setdefault(row.competitor, Counter())[row.status] += 1
    said = []
    for name, counts in statuses.items():
        listed = ", ".join(f"{n} {status}" for status, n in counts.items() if status != OK)
        if listed:
            said.append(f"{markdown_text(name)} ({listed} of {counts.total()})")
    return f"Did not run everywhere: {', '.join(said)}." if said else ""


def _line(name: str, group: Sequence[Contest]) -> Line:
    """Returns the speeds of fastbert, and its ratios to the fastest and to the median peer of each workload."""
    over_best: list[float] = []
    over_median: list[float] = []
    best: Counter[str] = Counter()
    for contest in group:
        ratios = {contest.name_of(row): row.speedup for row in contest.others if row.speedup is not None}
        if ratios:
            closest = min(ratios, key=lambda peer: ratios[peer])
            best[closest] += 1
            over_best.append(ratios[closest])
            over_median.append(statistics.median(ratios.values()))
    of = "" if len(over_best) == len(group) else f" ({len(over_best)} of {len(group)} workloads)"
    if not over_best:
        return Line(name, (_speeds(group), "no ratio", "no ratio"))
    names = ", ".join(peer for peer, _ in best.most_common(2)) + (", …" if len(best) > 2 else "")
    return Line(name, (_speeds(group), f"{_mean(over_best)}: {names}{of}", _mean(over_median)))


def _mean(ratios: Sequence[float]) -> str:
    """Returns the geometric mean, with the range if there are several values."""
    text = times(geometric_mean(ratios))
    return text if len(ratios) == 1 else f"{text} ({times(min(ratios))} to {times(max(ratios))})"


def _speeds(group: Sequence[Contest]) -> str:
    """Returns valid tokens/s from the slowest workload to the fastest, and the status of workloads without a speed."""
    ours: list[Row] = [contest.ours for contest in group if contest.ours is not None]
    speeds = sorted(row.tokens_per_second for row in ours if row.tokens_per_second is not None and row.status == OK)
    ends = list(dict.fromkeys(si(speed) for speed in (speeds[:1] + speeds[-1:])))
    others = Counter(row.status for row in ours if row.status != OK)
    parts = [" to ".join(ends), *(f"{count} {status}" for status, count in others.items())]
    return "; ".join(filter(None, parts)) or NO_VALUE


def committed(results: Path) -> list[Path]:
    """Returns the folders with committed (or staged) results; outside of a git checkout all of them.

    Folders inside of these hold other results, such as those of fine-tuning, and are left out.
    """
    try:
        args = ["git", "-C", str(results.parent), "ls-files", "-z", "--", results.name]
        listed = subprocess.run(args, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return sorted(results.glob("*/"))
    files = (results.parent / name for name in listed.split("\0") if name.endswith(".json"))
    return sorted({file.parent for file in files if file.exists() and file.parent.parent == results})


def rewrite(page: Path, text: str) -> None:
    """Replaces the text between the markers."""
    before, _, after = _parts(page)
    write_text(page, f"{before}{START}\n{text}\n{END}{after}")


def written(page: Path) -> str:
    """Returns the present text between the markers."""
    return _parts(page)[1].strip("\n")


def _parts(page: Path) -> tuple[str, str, str]:
    """Returns the text before, between and after the markers. Raises ValueError unless each is there once, in order."""
    content = page.read_text(encoding="utf-8")
    before, start, rest = content.partition(START)
    text, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise ValueError(f"{page}: expected {START} and, after it, {END}, once each")
    return before, text, after
