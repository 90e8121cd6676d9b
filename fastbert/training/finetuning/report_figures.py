"""This module draws the figures of a fine-tuning report; matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.pages.figures import BLUE, GREY, ORANGE, Plot, frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG_NAME = 24  # maximum length of a class name in a figure, in characters
MOST_WRITTEN = 15  # maximum number of classes for which each cell shows its number


def heat_map(confusion: np.ndarray, names: Sequence[str]) -> Plot:
    """Returns the confusion matrix, (C, C) counts with a row for each true class, coloured by the share of its row."""
    right = np.trace(confusion) / max(confusion.sum(), 1)
    alt = f"Confusion matrix of {len(names)} classes; {right:.1%} of the examples are on its diagonal."
    return Plot("finetuning", "confusion", "Confusion matrix", alt, partial(_draw_heat_map, confusion, list(names)))


def _draw_heat_map(confusion: np.ndarray, names: list[str]) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n = len(names)
    labels = [name if len(name) <= LONG_NAME else name[: LONG_NAME - 1] + "…" for name in names]
    figure, size = Figure(), max(2.6, 0.34 * n)
    frame(figure, "Confusion matrix", "A row is a true class. Colour: share of the row.", size + 2.8, size + 1.2)
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # From transparent to the colour, so that a light or dark page background shows through.
    colours = LinearSegmentedColormap.from_list("share", [(0.184, 0.49, 0.882, 0.0), (0.184, 0.49, 0.882, 0.85)])
    axes.pcolormesh(np.arange(n + 1) - 0.5, np.arange(n + 1) - 0.5, share, cmap=colours, vmin=0, vmax=1)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xticks(range(n), labels, rotation=90 if n > 4 else 0, fontsize=7.5)
    axes.set_yticks(range(n), labels, fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if n <= MOST_WRITTEN:
        for i, j in np.argwhere(confusion):
            axes.text(j, i, f"{confusion[i, j]:,}", ha="center", va="center", fontsize=7)
    return figure


def reliability(bins: Sequence[Mapping[str, Any]]) -> Plot:
    """Returns a plot of the share of right predictions in each bin of probabilities, from `metrics.calibration`."""
    total = sum(each["count"] for each in bins)
    error = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / max(total, 1)
    alt = f"Calibration plot of {total} examples; the expected calibration error is {error:.4f}."
    return Plot("finetuning", "calibration", "Calibration", alt, partial(_draw_reliability, list(bins), error))


def _draw_reliability(bins: list[Mapping[str, Any]], error: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure()
    frame(figure, "Calibration", f"Expected calibration error: {error:.4f}. Width of a bin: 1/15.", 6.4, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centres = [(each["low"] + each["high"]) / 2 for each in bins]
    widths = [(each["high"] - each["low"]) * 0.9 for each in bins]
    upper.bar(centres, [each["accuracy"] for each in bins], widths, color=BLUE, label="share that is right")
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="as right as sure")
    upper.plot(
        [each["confidence"] for each in bins], [each["accuracy"] for each in bins], color=ORANGE, linestyle="none",
        marker="o", markersize=3.5, label="mean probability in the bin",
    )  # fmt: skip
    upper.set_ylim(0, 1)
    upper.set_ylabel("right")
    upper.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    lower.bar(centres, [each["count"] for each in bins], widths, color=GREY)
    lower.set_ylabel("examples")
    lower.set_xlabel("probability of the predicted class")
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (upper, lower):
        axes.grid(axis="y")
    return figure


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values of a number in a Trainer's log_history, from the lines that have it as a number."""
    pairs = [
        (float(line["step"]), float(line[name]))
        for line in history
        if "step" in line and isinstance(line.get(name), (int, float)) and np.isfinite(line[name])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves(history: Sequence[Mapping[str, Any]], headline: str | None) -> Plot | None:
    """Returns a plot of training and evaluation losses and of the headline metric over steps; None without data."""
    wanted = {"loss": series(history, "loss"), "eval_loss": series(history, "eval_loss")}
    metric = series(history, f"eval_{headline}") if headline else ([], [])
    if not any(steps for steps, _ in (*wanted.values(), metric)):
        return None
    ends = [f"{name.replace('_', ' ')} {values[-1]:.4f}" for name, (_, values) in wanted.items() if values]
    ends += [f"{str(headline).replace('_', ' ')} {metric[1][-1]:.4f}"] if metric[1] else []
    alt = f"Line chart over the steps of the run. At the end: {', '.join(ends)}."
    return Plot("finetuning", "learning", "Learning curve", alt, partial(_draw_curves, wanted, metric, str(headline)))


def _draw_curves(
    losses: Mapping[str, tuple[list[float], list[float]]], metric: tuple[list[float], list[float]], headline: str
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    has_loss, has_metric = any(steps for steps, _ in losses.values()), bool(metric[0])
    panels = has_loss + has_metric
    figure = Figure()
    frame(figure, "Learning curve", "Training: with dropout, the mean since the point before.", 3.6 * max(panels, 1.6),
          2.8)  # fmt: skip
    grid = list(figure.subplots(1, panels, squeeze=False)[0])
    if has_loss:
        axes = grid.pop(0)
        axes.set_title("loss", fontsize=8.5)
        for (steps, values), colour, label in zip(losses.values(), (BLUE, ORANGE), ("training", "evaluation"),
                                                  strict=True):  # fmt: skip
            if steps:
                axes.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=3, label=label)
        axes.legend(frameon=False, fontsize=7)
    if has_metric:
        grid[0].set_title(headline.replace("_", " "), fontsize=8.5)
        grid[0].plot(*metric, color=ORANGE, linewidth=1.4, marker="o", markersize=3)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(True)
    return figure
