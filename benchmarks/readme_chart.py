"""This module makes the chart of the README: how many tokens a second each library turns from text into vectors.

    python benchmarks/report.py --readme

draws it as docs/speed.svg, from the newest results that have a contest of throughput in the text suite. It also writes
the caption between the two markers of README.md. The file also has the numbers as text (<desc>), one line a bar. So a
test can compare them with the committed results without matplotlib.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastbert.bench.peers import OURS
from fastbert.bench.results import OK, Results, Row
from fastbert.bench.tables import Contest, contests, short_dtype, si, source, times
from fastbert.pages.figures import BLUE, GREY, Bar, bars

CHART = Path("docs") / "speed.svg"
INK = "#24292f"
XMLNS = 'xmlns="http://www.w3.org/2000/svg"'


@dataclass(frozen=True)
class Headline:
    """A Headline is the contest of the chart, and the machine on which it was measured."""

    contest: Contest
    environment: Mapping[str, object]

    @property
    def rows(self) -> list[Row]:
        """Returns the competitors that ran, the fastest first."""
        ran = [row for row in self.contest.rows if row.status == OK and row.tokens_per_second is not None]
        return sorted(ran, key=lambda row: -_speed(row))

    @property
    def title(self) -> str:
        return f"From text to vectors with {self.contest.model or 'one model'}, tokens a second: higher is better"

    @property
    def workload(self) -> str:
        """Returns the head of the chart's one panel: the workload of all competitors."""
        ours = self.contest.ours
        counts = "" if ours is None else f", {ours.items} texts with {ours.tokens:,} tokens in all"
        return f"{self.contest.workload}{counts}, {short_dtype(self.contest.dtype)}"

    def lines(self) -> list[str]:
        """Returns one line for each bar: the competitor and its speed."""
        return [f"{self.contest.name_of(row)}: {si(_speed(row))} tokens/s" for row in self.rows]

    def svg(self) -> str:
        """Returns the chart as a complete file: dark on white, in a light and in a dark page."""
        names = [self.contest.name_of(row) for row in self.rows]
        cells: dict[tuple[int, int], Bar | str] = {
            (i, 0): Bar(_speed(row) / 1000, si(_speed(row)), BLUE if row.competitor == OURS else GREY)
            for i, row in enumerate(self.rows)
        }
        foot = source(dict(self.environment))
        (plot,) = bars("text", "speed", self.title, names, [self.workload], cells, "thousand valid tokens/s", foot)
        drawn = plot.svg().replace("<svg ", f"<svg {XMLNS} ", 1).replace('style="', f'style="color: {INK}; ', 1)
        head, _, rest = drawn.partition("</title>")
        data = html.escape("\n".join(self.lines()), quote=False)
        return f'{head}</title><desc>{data}</desc><rect width="100%" height="100%" fill="white"/>{rest.rstrip()}\n'

    def caption(self) -> str:
        """Returns the caption under the chart."""
        ours = self.contest.ours
        first = f"![{self.title}. {'; '.join(self.lines())}.]({CHART.as_posix()})"
        if ours is None or ours.tokens_per_second is None:
            return first
        nearest = self.contest.fastest_other
        if nearest is None:
            return first
        return (
            f"{first}\n\n{self.contest.model}, {self.workload}, tokenization included: "
            f"{si(_speed(ours))} tokens a second, {times(nearest.speedup or 0.0)} as many as the fastest other, "
            f"{self.contest.name_of(nearest)}. {source(dict(self.environment))}."
        )


def _speed(row: Row) -> float:
    return row.tokens_per_second or 0.0


def headline(results_by_folder: Mapping[Path, Results]) -> Headline | None:
    """Returns the first contest of throughput in the text suite of the newest results that have one."""
    for results in sorted(
        results_by_folder.values(), key=lambda results: str(results.environment.get("date")), reverse=True
    ):
        for contest in contests(results.rows):
            if contest.suite == "text" and contest.setting == "throughput" and contest.ours is not None:
                return Headline(contest, results.environment)
    return None
