"""This module writes the results of a run of embeddings or of a cross-encoder, as metrics.json and as a page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.checkpoint.files import write_text
from fastbert.pages import html
from fastbert.pages.document import NO_FIGURES, NO_VALUE, Line, Page, Section, Table, Verdict, facts
from fastbert.pages.figures import BLUE, ORANGE, Plot, frame
from fastbert.training.finetuning.vector_evaluation import Scores
from fastbert.training.finetuning.vector_settings import VectorSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAGE, METRICS = "report.html", "metrics.json"
METHOD = (
    "Before is the model that the run began with, after is the best one by the headline metric.",
    "Retrieval ranks the distinct positives of the held-out records for each anchor, by cosine and exact search. A "
    "right text beyond the first 100 counts as missed.",
    "Brackets hold 95 % intervals of a bootstrap over the anchors, or over the pairs.",
)


@dataclass(frozen=True)
class VectorResult:
    """A `VectorResult` is the result of a run.

    before and after: scores of the evaluation, empty without one; after is from the best model. output: the folder of
    the best model, with `last/`, metrics.json and report.html. losses: (step, loss) as logged. evaluations: (step,
    headline metric). sizes: facts about the data.
    """

    output: Path
    headline: str
    before: Scores
    after: Scores
    best_step: int
    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    sizes: dict[str, Any]
    plan: dict[str, Any] | None = None  # the plan of a dry run, which writes nothing


def write_results(result: VectorResult, settings: VectorSettings) -> None:
    """Writes metrics.json and report.html into the result folder."""
    values = {
        "headline": result.headline,
        "before": result.before,
        "after": result.after,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "evaluations": result.evaluations,
        "losses": result.losses,
        "data": result.sizes,
        "settings": settings.as_dict(),
        "environment": environment(),
    }
    write_text(result.output / METRICS, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_text(result.output / PAGE, html.render(_page(result, settings)))


def environment() -> dict[str, str]:
    """Returns the versions of the packages that a run depends on, and its device."""
    from importlib.metadata import version

    import torch

    import fastbert._version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = "torch", "transformers", "sentence-transformers"
    return {"device": device, "fastbert": fastbert._version.__version__, **{name: version(name) for name in packages}}


def _page(result: VectorResult, settings: VectorSettings) -> Page:
    name = result.headline
    if result.after:
        before, after = result.before[name], result.after[name]
        verdict = Verdict(f"{name} is {after:.4f} after training, and was {before:.4f} before.", after > before)
    else:
        verdict = Verdict("There were no data for an evaluation.", True)
    sections = []
    if result.after:
        names = sorted(key for key, value in _flat(result.after).items() if isinstance(value, float))
        lines = tuple(Line(key, (_cell(result.before, key), _cell(result.after, key))) for key in names)
        sections.append(Section("Scores", (Table("Held-out records", ("score", "before", "after"), lines),)))
    if result.losses:
        plot = Plot("training", "curve", "Training", "Line chart. The loss over the steps.", partial(_draw, result))
        if importlib.util.find_spec("matplotlib") is not None:
            sections.append(Section("Curve", (plot,)))
        else:
            verdict = Verdict(verdict.sentence, verdict.good, notes=(NO_FIGURES,))
    tables = tuple(
        facts(title, ("item", "value"), tuple((key.replace("_", " "), _written(each)) for key, each in of.items()))
        for title, of in (
            ("Data", result.sizes), ("Settings", settings.as_dict()), ("Environment", environment()),
            ("The run", {"steps": result.steps, "best step": result.best_step, "seconds": f"{result.seconds:.1f}"}),
        )
    )  # fmt: skip
    title = {"EmbedSettings": "Sentence embeddings", "RerankSettings": "Cross-encoder"}[type(settings).__name__]
    return Page(title, f"{settings.model}, {environment()['device']}.", verdict, tuple(sections), METHOD, tables)


def _flat(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the scores with the nested scores of each width moved to the top level."""
    flat: dict[str, Any] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key} "))
        else:
            flat[prefix + key] = value
    return flat


def _cell(scores: Mapping[str, Any], key: str) -> str:
    flat = _flat(scores)
    if key not in flat:
        return NO_VALUE
    interval = flat.get(f"{key}_interval")
    return f"{flat[key]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_written(each)}" for key, each in value.items()) or NO_VALUE
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NO_VALUE
    return NO_VALUE if value is None else str(value)


def _draw(result: VectorResult) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure()
    frame(figure, "Training", "", 8.4, 2.8)
    axes = list(figure.subplots(1, 2 if result.evaluations else 1, squeeze=False).flat)
    axes[0].plot(*zip(*result.losses, strict=True), color=BLUE, linewidth=1.2)
    axes[0].set_title("loss", fontsize=8.5)
    if result.evaluations:
        axes[1].plot(*zip(*result.evaluations, strict=True), color=ORANGE, linewidth=1.2, marker="o", markersize=3.5)
        axes[1].set_title(result.headline, fontsize=8.5)
    for each in axes:
        each.set_xlabel("step")
        each.grid(True)
    return figure
