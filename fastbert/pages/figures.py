"""Figures of bars and of lines, and their rendering as SVG and as PNG.

matplotlib is imported when a figure is drawn, and its global state does not change. An SVG has no background, and its
text takes the colour of the page, light or dark. A PNG is on white.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

# Each colour has a contrast of at least 3 with white and with #14171a. Markers tell alike colours apart.
BLUE, ORANGE, GREY = "#2f7de1", "#cf6a10", "#7f868d"
PALETTE = (ORANGE, "#15905b", "#a862d3", "#d64550", "#14899c", "#9c7c1a", "#c2559f", GREY, "#6f7fd8", "#5d9127")
MARKERS = "sDv^XPp*hd"
FONT = "DejaVu Sans"  # comes with matplotlib; Verdana has the same widths
INK = "#010101"  # in an SVG it stands for the text colour of the page

MOST_ROWS, MOST_PANELS = 40, 4  # in one figure
PANEL_WIDTH, ROW_HEIGHT = 2.1, 0.26  # inches
LETTER = 0.065  # inches for each letter of a label


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn. name: for a file. alt: what it shows, in words."""

    suite: str
    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]

    def png(self) -> bytes:
        """The figure on white, at 144 dots an inch."""
        return self._render("png", "#24292f", facecolor="white", dpi=144, metadata={"Software": None})

    def svg(self) -> str:
        """An <svg> element to be put into a page, with ids of its own and no reference to anything outside."""
        metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
        text = self._render("svg", INK, transparent=True, metadata=metadata).decode()
        text = text[text.index("<svg") :]
        text = re.sub(
            r'<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>| xmlns(:\w+)?="[^"]*"', "", text, flags=re.S
        )
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text.replace("xlink:href", "href"))
        text = text.replace(INK, "currentColor").replace(f"'{FONT}'", f"'{FONT}', Verdana, sans-serif")
        opening = (
            f'<svg role="img" aria-labelledby="{self.name}-alt" style="stroke-linejoin: round; stroke-linecap: butt" '
        )
        text = opening + text.removeprefix("<svg ")
        end = text.index(">") + 1
        return text[:end] + f'<title id="{self.name}-alt">{html.escape(self.alt)}</title>' + text[end:]

    def _render(self, kind: str, ink: str, **options: Any) -> bytes:
        import matplotlib

        style: dict[str, Any] = {
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            "grid.color": ink,
            "grid.alpha": 0.18,
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "font.family": [FONT],
            "font.size": 8.5,
            "text.parse_math": False,
            "svg.fonttype": "none",
            "svg.hashsalt": self.name,
        }
        settings: Any = {**matplotlib.rcParamsDefault, **style}
        with matplotlib.rc_context(settings):
            buffer = io.BytesIO()
            self.draw().savefig(buffer, format=kind, **options)
        return buffer.getvalue()


@dataclass(frozen=True)
class Bar:
    """A bar with its label. low and high: the ends of its whiskers."""

    value: float
    label: str
    colour: str
    low: float | None = None
    high: float | None = None


Cells = Mapping[tuple[int, int], "Bar | str"]  # by row and panel; a str is the status of what has no bar
Lines = Mapping[float, Mapping[str, Sequence[tuple[float, float, float]]]]  # panel, competitor: (x, y, spread of y)


def bars(
    suite: str,
    name: str,
    title: str,
    rows: Sequence[str],
    panels: Sequence[str],
    cells: Cells,
    axis: str,
    foot: str,
    *,
    log: bool = False,
) -> list[Plot]:
    """Figures of horizontal bars, in panels side by side on one scale; no figure where there is no bar.

    Many bars are spread over several figures, so that each stays readable. Rows and panels change places where there
    are more panels than rows. log: the bars are ratios and start at 1.
    """
    if not any(isinstance(cell, Bar) for cell in cells.values()):
        return []
    if len(panels) > len(rows):
        rows, panels = panels, rows
        cells = {(j, i): cell for (i, j), cell in cells.items()}
    scale = _Scale.of([cell for cell in cells.values() if isinstance(cell, Bar)], log)
    pages = [
        (down, across)
        for down in parts_of(range(len(rows)), MOST_ROWS)
        for across in parts_of(range(len(panels)), MOST_PANELS)
    ]
    plots = []
    for page, (down, across) in enumerate(pages):
        heading = title + (f" ({page + 1} of {len(pages)})" if len(pages) > 1 else "")
        shown = {(i, j): cells.get((y, x), "–") for i, y in enumerate(down) for j, x in enumerate(across)}
        down_names, across_names = [rows[i] for i in down], [panels[j] for j in across]
        draw = partial(_draw_bars, heading, down_names, across_names, shown, scale, axis, foot)
        alt = f"Bar chart. {heading}: {', '.join(across_names)}, in {axis}. {foot}. The tables hold the numbers."
        file_name = _file_name(name + (f" {page + 1}" if page else ""))
        plots.append(Plot(suite, file_name, heading, alt, draw))
    return plots


@dataclass(frozen=True)
class _Scale:
    """The horizontal axis that all panels share, with room for the labels beside the bars."""

    log: bool
    low: float
    high: float

    @classmethod
    def of(cls, drawn: Sequence[Bar], log: bool) -> _Scale:
        letters = max(len(bar.label) for bar in drawn)
        room = min(0.6, (letters * LETTER + 0.12) / PANEL_WIDTH)  # share of a panel's width
        high = max(bar.value if bar.high is None else bar.high for bar in drawn)
        if not log:
            return cls(False, 0.0, (high or 1.0) / (1 - room))
        low = min(bar.value if bar.low is None else bar.low for bar in drawn)
        low, high = math.log(min(low, 1.0)), math.log(max(high, 1.0))
        left = room if any(bar.value < 1 for bar in drawn) else 0.06
        span = max(high - low, 0.3) / max(1 - room - left, 0.2)
        return cls(True, math.exp(low - left * span), math.exp(low + (1 - left) * span))

    def ticks(self) -> list[float]:
        """Round ratios of a log scale, few enough that their labels stay apart."""
        span = math.log2(self.high / self.low)
        if span < 1.6:
            steps: Sequence[float] = (0.5, 0.6, 0.8, 1, 1.2, 1.5, 2)
        elif span < 4:
            steps = (0.25, 0.5, 1, 2, 4, 8)
        else:
            wide = math.ceil(span / 4)
            steps = [2.0 ** (wide * k) for k in range(-20, 21)]
        return [step for step in steps if self.low <= step <= self.high]


def _draw_bars(
    title: str, rows: Sequence[str], panels: Sequence[str], cells: Cells, scale: _Scale, axis: str, foot: str
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    # Dots that join parts stay at the end of a line: textwrap does not break at a non-breaking space.
    labels = [textwrap.fill(row.replace(" ·", "\u00a0·"), 52, break_on_hyphens=False) for row in rows]
    heads = [textwrap.fill(panel, 28, break_on_hyphens=False) for panel in panels]
    height = 0.75 + ROW_HEIGHT * len(rows) * (1 + 0.5 * max(label.count("\n") for label in labels))
    height += 0.15 * max(head.count("\n") for head in heads)
    longest = max(len(line) for label in labels for line in label.splitlines() or [""])
    figure = Figure()
    frame(figure, title, foot, max(6.4, 0.4 + LETTER * longest + PANEL_WIDTH * len(panels)), height)
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    start = 1.0 if scale.log else 0.0
    for j, (axis_of_panel, head) in enumerate(zip(axes, heads, strict=True)):
        axis_of_panel.set_title(head, fontsize=8.5)
        axis_of_panel.set_xlabel(axis)
        if scale.log:
            axis_of_panel.set_xscale("log")
            axis_of_panel.xaxis.set_major_locator(FixedLocator(scale.ticks()))
            axis_of_panel.xaxis.set_minor_locator(NullLocator())
        else:
            axis_of_panel.xaxis.set_major_locator(MaxNLocator(4))
        axis_of_panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" + ("×" if scale.log else "")))
        axis_of_panel.set_xlim(scale.low, scale.high)
        axis_of_panel.set_ylim(len(rows) - 0.4, -0.6)
        axis_of_panel.grid(axis="x")
        axis_of_panel.tick_params(axis="y", length=0)
        axis_of_panel.axvline(start, color=_ink(), linewidth=1.0)
        for i in range(len(rows)):
            _draw_bar(axis_of_panel, i, cells[i, j], start)
    axes[0].set_yticks(range(len(rows)), labels)
    return figure


def _draw_bar(axes: Axes, y: int, cell: Bar | str, start: float) -> None:
    if isinstance(cell, str):
        _write(axes, cell, start, y, style="italic")
        return
    axes.barh(y, cell.value - start, left=start, height=0.66, color=cell.colour)
    low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
    if high > low:
        axes.plot([low, high], [y, y], color=_ink(), linewidth=1.1, marker="|", markersize=5)
    if cell.value >= start:
        _write(axes, cell.label, max(high, start), y)
    else:
        _write(axes, cell.label, min(low, start), y, ha="right")


def _write(axes: Axes, text: str, x: float, y: float, **style: Any) -> None:
    """Writes text beside a point. The scale has room for it, so the layout need not measure it, which is slow."""
    gap = -4 if style.get("ha") == "right" else 4
    axes.annotate(
        text, (x, y), (gap, 0), textcoords="offset points", va="center", fontsize=7.5, in_layout=False, **style
    )


def _ink() -> str:
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def lines(
    suite: str,
    name: str,
    title: str,
    panels: Lines,
    names: Sequence[str],
    axes: tuple[str, str, str],
    foot: str,
    ours: str,
) -> Plot:
    """A figure with a panel for each key and a line for each competitor; y starts at zero, and `ours` stands out.

    axes: the name of x, the name of what the panels differ in, the unit of y.
    """
    _, panel, unit = axes
    heading = f"{title} ({panel} {', '.join(f'{at:g}' for at in panels)})"
    drawn = [name for name in names if any(name in panel_lines for panel_lines in panels.values())]
    alt = f"Line chart. {heading}: {unit} of {', '.join(drawn)}. {foot}. The tables hold the numbers."
    return Plot(suite, _file_name(name), heading, alt, partial(_draw_lines, title, panels, drawn, axes, foot, ours))


def _draw_lines(
    title: str, panels: Lines, names: Sequence[str], axes: tuple[str, str, str], foot: str, our_name: str
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    along, panel, unit = axes
    highest = max(y for panel_lines in panels.values() for line in panel_lines.values() for _, y, _ in line)
    factor, prefix = next(
        (f, p) for f, p in ((1e6, "million "), (1e3, "thousand "), (1.0, "")) if highest >= f or f == 1
    )
    width = max(6.4, 3.1 * len(panels))
    columns = max(1, min(len(names), int(width / (0.6 + LETTER * max(map(len, names))))))
    figure = Figure()
    legend_height = 0.1 + 0.19 * math.ceil(len(names) / columns)
    top = frame(figure, title, foot, width, 3.4, legend_height)
    grid: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    handles: dict[str, Any] = {}
    for axis, (at, panel_lines) in zip(grid, panels.items(), strict=True):
        xs = sorted({x for line in panel_lines.values() for x, _, _ in line})
        for k, name in enumerate(names):
            if name not in panel_lines:
                continue
            ours = name == our_name
            points = {x: (y / factor, spread / factor) for x, y, spread in panel_lines[name]}
            # NaN stands where there is no point, so that no line is drawn across it.
            ys, spreads = zip(*(points.get(x, (math.nan, math.nan)) for x in xs), strict=True)
            handles[name] = axis.errorbar(
                xs,
                ys,
                spreads,
                color=BLUE if ours else PALETTE[(k - 1) % len(PALETTE)],
                marker="o" if ours else MARKERS[(k - 1) % len(MARKERS)],
                linewidth=2.4 if ours else 1.3,
                markersize=6 if ours else 5,
                capsize=2,
                zorder=3 if ours else 2,
            )
        axis.set_title(f"{panel} {at:g}", fontsize=8.5)
        if xs[-1] >= 8 * xs[0] > 0:
            axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(xs))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.tick_params(axis="x", rotation=45 if len(xs) > 4 else 0)
        axis.set_ylim(0, highest / factor * 1.08)
        axis.set_xlabel(along)
        axis.grid(True)
    grid[0].set_ylabel(prefix + unit)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="upper left",
        bbox_to_anchor=(0.0, top + legend_height / figure.get_figheight()),
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    return figure


def frame(figure: Figure, title: str, foot: str, width: float, height: float, legend_height: float = 0.0) -> float:
    """Sizes the figure, and writes the title above its axes and the foot below them. The axes are `height` inches high.

    A legend has room between the title and the axes. The result is the upper end of the axes, as a share of the height
    of the figure.
    """
    title, foot = _wrapped(title, width / 0.088), _wrapped(foot, width / 0.06)
    above = 0.12 + 0.19 * (1 + title.count("\n")) + legend_height
    below = 0.1 + 0.14 * (1 + foot.count("\n"))
    total = above + height + below
    figure.set_size_inches(width, total)
    figure.set_layout_engine("constrained", rect=(0, below / total, 1, height / total))
    figure.text(0.08 / width, 1 - 0.08 / total, title, va="top", fontsize=10.5, fontweight="bold")
    figure.text(0.08 / width, 0.06 / total, foot, va="bottom", fontsize=7.5)
    return (below + height) / total


def _wrapped(text: str, letters: float) -> str:
    return "\n".join(textwrap.fill(line, max(20, int(letters))) for line in text.splitlines())


def parts_of(values: Sequence[T], most: int) -> list[Sequence[T]]:
    """Cuts the values into runs of nearly equal size, none longer than `most`."""
    count = math.ceil(len(values) / most)
    return [values[k * len(values) // count : (k + 1) * len(values) // count] for k in range(count)]


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
