"""The curve of a run shows the contents of its journal, as a page and as a picture."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.checkpoint.files import replacing, write_text
from fastbert.pages import html
from fastbert.pages.document import NO_FIGURES, NO_VALUE, Fold, Line, Page, Section, Table, Verdict, facts
from fastbert.pages.figures import BLUE, GREY, ORANGE, Plot, frame
from fastbert.training.journal import read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("fastbert")

PAGE, PICTURE = "curve.html", "curve.png"
MOST_POINTS = 1_000  # per line in the figure
SMOOTHING = 50  # a smoothed point is the mean over 1 / SMOOTHING of the lines in the journal
FEW = 12  # evaluations: a longer table is folded

METHOD = (
    "A loss is the mean cross entropy in nats: over the masked tokens, or over the pairs, of a step or of the held-out "
    "documents. Accuracy is the share of them that is predicted right.",
    "Training is measured with dropout and new masks in each step. An evaluation has no dropout and always the same "
    "masks.",
    "A smoothed line is the mean over a 50th of the lines of training.jsonl, half before and half after a point.",
    "The unigram numbers are those of a model that knows how frequent each token is and nothing of its neighbours.",
)


@dataclass(frozen=True)
class History:
    """A `History` holds the lines of a journal, by kind. start and end are empty if they are missing."""

    start: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    end: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> History:
        """Reads the journal in a folder. Raises FileNotFoundError and ValueError as `read_journal` does."""
        lines = read_journal(folder)
        by_kind = {
            kind: [line for line in lines if line["kind"] == kind] for kind in ("start", "train", "evaluation", "end")
        }
        start, end = by_kind["start"], by_kind["end"]
        return cls(start[-1] if start else {}, by_kind["train"], by_kind["evaluation"], end[-1] if end else {})

    def series(self, name: str, *, evaluation: bool = False) -> np.ndarray:
        """Returns the steps and the values of a number, (2, n) float64, from the lines that have it."""
        lines = self.evaluations if evaluation else self.train
        pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2).T

    @property
    def last_scores(self) -> Mapping[str, Any]:
        """Returns the last evaluation, or the last training line if there is no evaluation."""
        return (self.evaluations or self.train or [{}])[-1]


def write_curve(folder: str | os.PathLike[str]) -> list[Path]:
    """Writes curve.html and, with matplotlib, curve.png into the journal's folder; returns the written paths.

    Raises FileNotFoundError if there is no journal, and ValueError if it cannot be read.
    """
    folder = Path(folder)
    history = History.read(folder)
    plots: tuple[Plot, ...] = ()
    written: list[Path] = []
    notes: tuple[str, ...] = ()
    if history.train or history.evaluations:
        plot = curve(history)
        try:
            content = plot.png()
        except ImportError:
            notes = (NO_FIGURES,)
            logger.warning("%s is not drawn because matplotlib is not installed", folder / PICTURE)
        else:
            with replacing(folder / PICTURE) as temporary:
                temporary.write_bytes(content)
            plots, written = (plot,), [folder / PICTURE]
    write_text(folder / PAGE, html.render(_page(history, plots, notes)))
    return [*written, folder / PAGE]


def curve(history: History) -> Plot:
    """Returns the figure of losses, accuracies and the learning rate over steps. The tokens are above each panel."""
    last = history.last_scores
    numbers = ", ".join(f"{name} {last[key]:.3f}" for key, name, _ in COLUMNS if last.get(key) is not None)
    alt = f"Line chart. Losses, accuracies and learning rate over the steps of the run. At the end: {numbers}."
    return Plot("training", "curve", "Pre-training", alt, partial(_draw, history))


# Key in the journal, name, and format of a value.
COLUMNS = (
    ("mlm_loss", "loss of masked tokens", "{:.4f}"),
    ("mlm_accuracy", "masked tokens right", "{:.2%}"),
    ("nsp_loss", "loss of pairs", "{:.4f}"),
    ("nsp_accuracy", "pairs right", "{:.2%}"),
)


def verdict_of(history: History) -> Verdict:
    """Compares the scores on masked tokens with the unigram baseline."""
    last, start = history.last_scores, history.start
    loss, accuracy, base = last.get("mlm_loss"), last.get("mlm_accuracy"), start.get("unigram_loss")
    if loss is None:
        return Verdict("There is no loss of masked tokens in the journal.", good=False)
    place = "on held-out documents" if history.evaluations else "in training"
    sentence = f"After step {last['step']:,}, masked tokens have a loss of {loss:.3f} {place}"
    sentence += "" if base is None else f", and {base:.3f} by frequency alone"
    if accuracy is not None:
        by_frequency = start.get("unigram_accuracy")
        sentence += f"; {accuracy:.1%} are right"
        sentence += "" if by_frequency is None else f", and {by_frequency:.1%} by frequency alone"
    if (pairs := last.get("nsp_accuracy")) is not None:
        sentence += f". {pairs:.1%} of pairs are right, where guessing gives half"
    return Verdict(sentence + ".", good=base is None or loss < base)


def _page(history: History, plots: tuple[Plot, ...], notes: tuple[str, ...]) -> Page:
    verdict = verdict_of(history)
    verdict = Verdict(verdict.sentence, verdict.good, notes=notes)
    tables = tuple(
        facts(title, ("item", "value"), pairs)
        for title, line in (("The run", history.start), ("Its end", history.end))
        if (pairs := tuple((key.replace("_", " "), _fact(value)) for key, value in line.items() if key != "kind"))
    )
    subject = ", ".join(str(history.start[key]) for key in ("device", "precision") if key in history.start)
    sections = [Section("Curve", plots)] if plots else []
    if history.evaluations:
        table = _evaluations(history)
        block = (
            table if len(history.evaluations) <= FEW else Fold(f"All {len(history.evaluations)} evaluations", (table,))
        )
        sections.append(Section("Evaluations", (block,)))
    return Page("Pre-training", f"{subject}." if subject else "", verdict, tuple(sections), METHOD, tables)


def _evaluations(history: History) -> Table:
    columns = [column for column in COLUMNS if any(line.get(column[0]) is not None for line in history.evaluations)]
    lines = []
    for line in history.evaluations:
        values = [(line.get(key), form) for key, _, form in (("tokens", "", "{:,}"), *columns)]
        cells = tuple(NO_VALUE if value is None else form.format(value) for value, form in values)
        lines.append(Line(f"{line['step']:,}", cells))
    return Table("Held-out documents", ("step", "tokens", *(name for _, name, _ in columns)), tuple(lines))


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NO_VALUE}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


# The figure


def _draw(history: History) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    start = history.start
    panels: list[tuple[str, str, float | None, str]] = [
        ("mlm_loss", "Masked tokens: loss (nats)", start.get("unigram_loss"), "by frequency alone"),
        ("mlm_accuracy", "Masked tokens: right", start.get("unigram_accuracy"), "by frequency alone"),
        ("nsp_accuracy", "Next sentences: right", 0.5, "guessing"),
        ("learning_rate", "Learning rate", None, ""),
    ]
    panels = [each for each in panels if any(history.series(each[0], evaluation=e).size for e in (False, True))]
    rows = max(1, (len(panels) + 1) // 2)
    figure = Figure()
    foot = ", ".join(str(start[key]) for key in ("device", "precision") if key in start)
    frame(figure, "Pre-training", f"Tokens stand above each panel. {foot}".strip(), 8.4, 2.6 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (name, title, level, label) in zip(grid, panels, strict=False):
        _draw_panel(axes, history, name, level, label)
        axes.set_title(title, fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name.endswith("accuracy"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _mark_tokens(axes, history)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def _draw_panel(axes: Axes, history: History, name: str, level: float | None, label: str) -> None:
    steps, values = history.series(name)
    if name == "learning_rate":
        axes.plot(*_thinned(steps, values), color=BLUE, linewidth=1.4)
    elif steps.size:
        axes.plot(*_thinned(steps, values), color=BLUE, linewidth=0.6, alpha=0.3)
        axes.plot(*_thinned(steps, smoothed(values)), color=BLUE, linewidth=1.6, label="training, smoothed")
    evaluated = history.series(name, evaluation=True)
    if evaluated.size:
        axes.plot(*evaluated, color=ORANGE, linewidth=1.4, marker="o", markersize=3.5, label="held-out documents")
    if level is not None:
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--", label=label)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.grid(True)
    if name != "learning_rate":
        axes.legend(frameon=False, fontsize=7)


def _mark_tokens(axes: Axes, history: History) -> None:
    """Writes above a panel the number of tokens read up to each step."""
    steps, tokens = history.series("tokens") if history.train else history.series("tokens", evaluation=True)
    if not steps.size:
        return
    low, high = axes.get_xlim()
    ticks = [step for step in axes.get_xticks() if low <= step <= high]
    labels = [
        _short(float(np.interp(step, [0.0, *steps], [0.0, *tokens]))) if step <= steps[-1] else "" for step in ticks
    ]
    above = axes.secondary_xaxis("top")
    above.set_xticks(ticks, labels, fontsize=7)
    above.tick_params(length=0, pad=1)


def _short(count: float) -> str:
    """Formats a count: 1,500,000 as 1.5 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a moving average, (n,) -> (n,), over about n / SMOOTHING values; fewer at both ends."""
    half = len(values) // SMOOTHING // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most about MOST_POINTS of the points, always with the last one."""
    stride = -(-len(steps) // MOST_POINTS) or 1
    return steps[::-1][::stride][::-1], values[::-1][::stride][::-1]
