"""A report as data: its verdict, its sections, its method and its environment.

`Page` fixes the order in which a reader meets them. html.py, markdown.py and terminal.py write them down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from fastbert.pages.figures import Bar, Plot, bars

OK = "ok"
NO_VALUE = "–"  # in a cell that has nothing to say
NO_FIGURES = "There are no figures because matplotlib is not installed (pip install matplotlib)."


@dataclass(frozen=True)
class Line:
    """One line of a table: its first cell and the others, or a status and its reason where there are no numbers.

    tone: "ours" for a line that stands out, "bad" for one that reports a fault.
    """

    name: str
    cells: tuple[str, ...] = ()
    status: str = OK
    reason: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Lines under a title and heads of columns. prose: the cells are text, and not numbers."""

    title: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    prose: bool = False


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Tables that a reader opens on demand."""

    title: str
    tables: tuple[Table, ...]


Block = Text | Fold | Table | Plot


@dataclass(frozen=True)
class Picture:
    """The one picture beside a verdict: a bar for each name, and a line at 1 that the bars are read against.

    bars: a text stands where a name has no bar. remarks: a few words for each bar, beside its label. line: the label of
    the line at 1. log: the bars are ratios, which start at that line; otherwise they start at 0. foot: a text that says
    what the bars mean. An HTML page draws the picture without matplotlib.
    """

    name: str
    title: str
    names: tuple[str, ...]
    bars: tuple[Bar | str, ...]
    line: str
    foot: str
    log: bool = False
    remarks: tuple[str, ...] = ()

    def plot(self, unit: str, source: str) -> Plot | None:
        """The same as a figure of matplotlib, None where no name has a bar.

        unit: of the bars. source: where and when they were measured, which every figure says.
        """
        cells = {(i, 0): bar for i, bar in enumerate(self.bars)}
        foot = f"{source}\n{self.foot}"
        names = [": ".join(filter(None, pair)) for pair in zip_longest(self.names, self.remarks)]
        plots = bars("", self.name, self.title, names, [self.line], cells, unit, foot, log=self.log)
        return plots[0] if plots else None


@dataclass(frozen=True)
class Verdict:
    """The verdict is the first thing that a reader learns. sentence: all of it. word: a label before it, if any.

    points: the faults, one by one. notes: what the reader must know beside it.
    """

    sentence: str
    good: bool
    word: str = ""
    points: tuple[str, ...] = ()
    picture: Picture | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report from top to bottom. subject: what was looked at, where and when."""

    title: str
    subject: str
    verdict: Verdict
    sections: tuple[Section, ...]
    method: tuple[str, ...]
    environment: tuple[Table, ...]

    def plots(self) -> Iterator[Plot]:
        """The figures of all sections."""
        for section in self.sections:
            yield from (block for block in section.blocks if isinstance(block, Plot))


def facts(title: str, header: tuple[str, str], pairs: tuple[tuple[str, str], ...]) -> Table:
    """A table of names and what is said of each."""
    return Table(title, header, tuple(Line(name, (value,)) for name, value in pairs), prose=True)
