"""What `verify` found as a page: HTML with everything in it, figures too, and no reference to anything outside."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastbert._version import __version__
from fastbert.diagnostics.verify.report import Report, StateReport
from fastbert.pages.figures import BLUE, GREY, ORANGE, PALETTE, Plot, frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED = PALETTE[3]
NO_FIGURES = "There are no figures because matplotlib is not installed (pip install matplotlib)."
METHOD = (
    "error: RMS of the difference to the float64 reference over RMS of the reference, over all texts. eager's: that of "
    "plain PyTorch in the same dtype on the same tokens. times: the one over the other.",
    "bound: 1.25 times eager's, of vectors and logits of tokens twice, plus half a unit in the last place; for a "
    "single text 4 times that. Of a few logits a text chance makes what it likes, and there is none.",
    "alone: of what a part makes of the input that it had, against what the reference makes of the same input; at most "
    "1.5 times eager's in 16 bits, else 2 times; 3 times where a text has one row, more where that is a few logits.",
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --back: #ffffff; --rule: #d1d9e0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --back: #14171a; --rule: #3a4148; --bad: #ff8a80; } }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 1120px; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child { text-align: left; } tbody th { font-weight: 400; }
.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
"""


def page(report: Report, title: str = "fastbert verify") -> str:
    """The report as HTML. Figures need matplotlib; without it the page says so."""
    parts = [f"<h1>{html.escape(title)}</h1>", _text(f"{report.heading()}; fastbert {__version__}.")]
    parts.append(f'<p class="{"good" if report.ok else "bad"}">{html.escape(report.verdict())}</p>')
    if report.problems:
        parts.append(_items(report.problems))
    if report.states:
        parts += [_table(report.table()), *_drawn(report)]
    if report.vectors is not None:
        v = report.vectors
        heading = f"Vectors of {v.n_texts} texts, {v.what}", "the model", "eager"
        parts.append(_table([heading, *v.lines()]))
    if report.quantized is not None:
        parts.append(_text(str(report.quantized)))
    parts += [_items([*METHOD, *report.notes])]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _items(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _table(table: Sequence[Sequence[str]]) -> str:
    head, *lines = ([html.escape(cell) for cell in line] for line in table)
    rows = []
    for name, *cells in lines:
        bad = ' class="bad"' if cells[-1] == "FAILED" else ""
        rows.append(f'<tr{bad}><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return f'<div class="scroll"><table><thead><tr>{heading}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _drawn(report: Report) -> list[str]:
    try:
        return [f"<figure>{plot.svg()}</figure>" for plot in figures(report)]
    except ImportError:
        return [_text(NO_FIGURES)]


def figures(report: Report) -> list[Plot]:
    """Errors along the model, each part alone, and cosines."""
    states, foot = report.states, f"{report.heading()}. {report.verdict()}"
    found = [
        _plot("error", "Error of what leads to each output", foot, states, ("fastbert", "eager", "bound"), "error"),
        _plot("cosine", "1 - cosine to the reference", foot, states, ("worst token", "worst text", "median text"), ""),
    ]
    if any(state.alone is not None for state in states):
        title = "Error of each part alone, given the input it had"
        found.insert(1, _plot("alone", title, foot, states, ("fastbert", "eager", "bound"), "error"))
    return found


def _plot(kind: str, title: str, foot: str, states: Sequence[StateReport], names: Sequence[str], unit: str) -> Plot:
    lines = [_values(kind, state) for state in states]
    bad = _bad_alone if kind == "alone" else _bad
    alt = (
        f"Line chart on a logarithmic scale. {title}: {', '.join(names)}, along the model. The table holds the numbers."
    )
    return Plot("verify", f"verify-{kind}", title, alt, partial(_draw, title, foot, states, names, lines, unit, bad))


def _bad(state: StateReport) -> bool:
    return not state.ok


def _bad_alone(state: StateReport) -> bool:
    return state.alone is not None and state.alone.problem is not None


def _values(kind: str, state: StateReport) -> tuple[float, float, float]:
    if kind == "cosine":
        cosines = state.worst_token_cosine, state.worst_sentence_cosine, state.sentence_cosine_p50
        return tuple(1 - cosine for cosine in cosines)  # type: ignore[return-value]
    errors = state if kind == "error" else state.alone
    nothing = (math.nan,) * 3
    return nothing if errors is None else (errors.error, errors.eager_error, errors.bound)


def _draw(
    title: str, foot: str, states: Sequence[StateReport], names: Sequence[str], lines: Sequence[Sequence[float]],
    unit: str, bad: Callable[[StateReport], bool],
) -> Figure:  # fmt: skip
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure()
    frame(figure, title, foot, max(6.4, 1.5 + 0.35 * len(states)), 3.2)
    axes = figure.subplots()
    for k, (name, colour) in enumerate(zip(names, (BLUE, GREY, ORANGE), strict=True)):
        # A logarithm has no zero, and rounding may leave a cosine above 1.
        ys = [line[k] if math.isfinite(line[k]) and line[k] > 0 else math.nan for line in lines]
        dashed = "--" if name == "bound" else "-"
        axes.plot(range(len(states)), ys, dashed, color=colour, label=name, marker="" if name == "bound" else "o")
        if k == 0:
            failed = [i for i, state in enumerate(states) if bad(state) and math.isfinite(ys[i])]
            if failed:
                axes.plot(failed, [ys[i] for i in failed], "X", color=RED, markersize=10, label="failed")
    if any(math.isfinite(value) and value > 0 for line in lines for value in line):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    short = [re.sub(r"^.*?(layer\.\d+|\w+)$", r"\1", state.name) for state in states]
    axes.set_xticks(range(len(states)), short, rotation=60)
    axes.set_ylabel(unit)
    axes.grid(True, axis="y")
    axes.legend(frameon=False, fontsize=8)
    return figure
