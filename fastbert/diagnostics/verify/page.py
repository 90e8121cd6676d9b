"""This module makes a page of `verify`'s findings: verdict, tables, figures, method and environment."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastbert._version import __version__
from fastbert.diagnostics.verify.findings import Findings, StateReport
from fastbert.pages.document import NO_FIGURES, Block, Fold, Page, Picture, Section, Text, Verdict, facts
from fastbert.pages.figures import BLUE, GREY, ORANGE, PALETTE, Bar, Plot, frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED = PALETTE[3]
METHOD = (
    "The model, plain PyTorch in the model's dtype (eager), and a reference in float64 run on the same tokens.",
    "An error is the RMS of the difference to the reference ÷ the RMS of the reference, over all texts.",
    "The bound on the error is 1.25 times eager's error (for vectors and for logits of tokens, twice) plus half a unit "
    "in the last place. A single text may have 4 times that. A few logits a text have no such bound, because chance "
    "rules them.",
    "For a part alone, the reference and eager get the input that the part had. Its error may be 1.5 times eager's in "
    "16 bits, else twice; 3 times where it gives one row for each text, and more where that row is a few logits.",
    "Gradients are those of a fixed scalar: the last hidden states and the pooled output, times random numbers, "
    "summed. The model runs as in training, without dropout; the reference is differentiated in float64. Those of a "
    "part, and of all parameters, may have 1.25 times eager's error plus one unit in the last place in 16 bits, two in "
    "32. One parameter may have twice that in 16 bits, three times in 32.",
    "Neighbours of a text are the other texts, ordered by the cosine of their vectors to its own.",
)


def report_page(findings: Findings, title: str = "fastbert verify") -> Page:
    """Returns the findings as a page. Without matplotlib it has a note in the place of figures."""
    notes = list(findings.notes)
    sections: list[Section] = []
    if findings.states:
        blocks: list[Block] = [findings.table()]
        try:
            blocks += figures(findings)
        except ImportError:
            notes.append(NO_FIGURES)
        sections.append(Section("Every output", tuple(blocks)))
    if findings.vectors is not None:
        sections.append(Section("Vectors and their neighbours", (findings.vectors.table(),)))
    if findings.gradients is not None:
        of_parameters = Fold("Every parameter", (findings.gradients.table_of_parameters(),))
        worst = findings.gradients.worst()
        worst_text = Text(f"{worst[0].upper()}{worst[1:]}.")
        sections.append(Section("Gradients", (findings.gradients.table(), worst_text, of_parameters)))
    if findings.quantized is not None:
        sections.append(Section("The price of 8 bits", (Text(f"{findings.quantized}."),)))
    environment = (
        ("model", findings.model),
        ("device", findings.device),
        ("dtype", findings.dtype),
        ("backend", findings.backend),
        ("texts", str(findings.n_texts)),
        ("tokens", str(findings.n_tokens)),
        ("fastbert", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    )
    facts_table = facts("Model and versions", ("item", "value"), environment)
    return Page(title, f"{findings.heading()}.", _verdict(findings, notes), tuple(sections), METHOD, (facts_table,))


def _verdict(findings: Findings, notes: Sequence[str]) -> Verdict:
    word = "ok" if findings.ok else "FAILED"
    points = tuple(findings.problems)
    picture = _picture(findings) if findings.states else None
    return Verdict(_sentence(findings), findings.ok, word, points, picture, tuple(notes))


def _sentence(findings: Findings) -> str:
    n_outputs, n_wrong = len(findings.outputs), sum(not state.ok for state in findings.outputs)
    if findings.weights:
        count = len(findings.weights)
        subject = "1 parameter of the model is" if count == 1 else f"{count} parameters of the model are"
        return f"{subject} not finite, so nothing was run."
    if n_wrong:
        miss = "misses its bound" if n_wrong == 1 else "miss their bounds"
        return f"The model is wrong: on {findings.counts()}, {n_wrong} of {n_outputs} outputs {miss}."
    if findings.quantized_problems:
        return f"The model loses too much in 8 bits: on {findings.counts()}, its vectors are too far off."
    if findings.gradient_problems:
        return f"The model's gradients are wrong: on {findings.counts()}, they miss their bounds."
    outputs = f"all {n_outputs} outputs keep their bounds" + (", and all gradients" if findings.gradients else "")
    return f"The model is as accurate as plain PyTorch: on {findings.counts()}, {outputs}."


def _picture(findings: Findings) -> Picture:
    shares = {state.name: (state.share_of_bound, state.ok) for state in findings.outputs}
    foot = "A bar that ends before the line is right. Each output counts with its worst: all texts, one text, or alone."
    title = "Error ÷ the bound on it, for every output"
    if findings.gradients is not None:
        foot += " Gradients of a part count with its worst parameter."
        title += " and the gradients of every part"
        for name, share in findings.gradients.shares().items():
            shares[f"gradients of {name}"] = share, share <= 1
    bars = tuple(_share(*each) for each in shares.values())
    return Picture("verdict", title, tuple(shares), bars, "the bound", foot)


def _share(share: float, ok: bool) -> Bar | str:
    if not math.isfinite(share):
        return "not finite"
    return Bar(share, f"{100 * share:.0f} %" if share < 10 else f"{share:.3g} times", BLUE if ok else RED)


def figures(findings: Findings) -> list[Plot]:
    """Returns plots along the model: errors, errors of each part alone, and cosines.

    Raises ImportError if matplotlib is not installed.
    """
    import matplotlib.figure  # noqa: F401  the error is raised here, before anything is drawn

    states, foot = findings.states, f"{findings.heading()}. {findings.verdict()}"
    names = "fastbert", "eager", "bound"
    plots = [_plot("error", "Error of each output, with all that leads to it", foot, states, names, "error")]
    if any(state.alone is not None for state in states):
        plots.append(_plot("alone", "Error of each part alone, on the input that it had", foot, states, names, "error"))
    names = "worst token", "worst text", "median text"
    return [*plots, _plot("cosine", "1 - cosine to the reference", foot, states, names, "1 - cosine")]


def _plot(kind: str, title: str, foot: str, states: Sequence[StateReport], names: Sequence[str], unit: str) -> Plot:
    lines = [_values(kind, state) for state in states]
    failed = _failed_alone if kind == "alone" else _failed
    alt = (
        f"Line chart on a logarithmic scale. {title}: {', '.join(names)}, along the model. The table holds the numbers."
    )
    return Plot("verify", f"verify-{kind}", title, alt, partial(_draw, title, foot, states, names, lines, unit, failed))


def _failed(state: StateReport) -> bool:
    return not state.ok


def _failed_alone(state: StateReport) -> bool:
    return state.alone is not None and state.alone.problem is not None


def _values(kind: str, state: StateReport) -> tuple[float, float, float]:
    if kind == "cosine":
        return 1 - state.worst_token_cosine, 1 - state.worst_sentence_cosine, 1 - state.sentence_cosine_p50
    errors = state if kind == "error" else state.alone
    return (math.nan,) * 3 if errors is None else (errors.error, errors.eager_error, errors.bound)


def _draw(
    title: str, foot: str, states: Sequence[StateReport], names: Sequence[str], lines: Sequence[Sequence[float]],
    unit: str, failed: Callable[[StateReport], bool],
) -> Figure:  # fmt: skip
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure()
    frame(figure, title, foot, max(6.4, 1.5 + 0.35 * len(states)), 3.2)
    axes = figure.subplots()
    for k, (name, colour) in enumerate(zip(names, (BLUE, GREY, ORANGE), strict=True)):
        # The logarithm of zero is undefined, and rounding may make a cosine greater than 1.
        ys = [line[k] if math.isfinite(line[k]) and line[k] > 0 else math.nan for line in lines]
        dashed = "--" if name == "bound" else "-"
        axes.plot(range(len(states)), ys, dashed, color=colour, label=name, marker="" if name == "bound" else "o")
        if k == 0:
            crosses = [i for i, state in enumerate(states) if failed(state) and math.isfinite(ys[i])]
            if crosses:
                axes.plot(crosses, [ys[i] for i in crosses], "X", color=RED, markersize=10, label="failed")
    if any(math.isfinite(value) and value > 0 for line in lines for value in line):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    short = [re.sub(r"^.*?(layer\.\d+|\w+)$", r"\1", state.name) for state in states]
    axes.set_xticks(range(len(states)), short, rotation=60)
    axes.set_ylabel(unit)
    axes.grid(True, axis="y")
    axes.legend(frameon=False, fontsize=8)
    return figure
