"""The report of a fine-tuned model has metrics as JSON, and a page that shows right and wrong predictions."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.files import write_text
from fastbert.pages import html
from fastbert.pages.document import NO_FIGURES, NO_VALUE, Block, Line, Page, Section, Table, Verdict, facts
from fastbert.pages.figures import Plot
from fastbert.training.finetuning.metrics import calibration, confusion_matrix
from fastbert.training.finetuning.report_figures import curves, heat_map, reliability

logger = logging.getLogger("fastbert")

METRICS, PAGE = "metrics.json", "report.html"
MOST_CLASSES = 30  # a larger confusion matrix is not drawn; the most confused pairs are always listed
MOST_CONFUSED = 20
MOST_WRONG, LONGEST = 20, 240  # number of shown examples, and characters of each
SUM_OF_SHARES = 1e-3

METHOD = (
    "All numbers are of records that were not trained on, and of the best model where the run kept several.",
    "An interval holds 95 % of the values that the metric takes on samples of the same size, drawn from these records "
    "with replacement. It does not say how the metric would change with another seed of training.",
    "F1 is the harmonic mean of precision and recall; macro_f1 is the mean over classes, each counted the same.",
    "In the calibration plot, examples are grouped by the probability of the class that was predicted. The expected "
    "calibration error is the mean distance between that probability and the share that is right.",
    "The examples that are most wrong are those whose true class has the lowest probability, or whose number is the "
    "furthest away.",
)


def write_report(
    folder: str | os.PathLike[str],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    headline: str | None = None,
    intervals: Mapping[str, Sequence[float]] | None = None,
    tables: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
    places: Sequence[str] = (),
    history: Sequence[Mapping[str, Any]] | None = None,
    truncated: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes metrics.json and report.html into a folder; returns the written paths.

    facts: the facts about the run, by name. metrics: from `metrics`. headline: the name of the metric that selects the
    best model. intervals: (low, high) by metric. tables: for a classifier labels (N,), probabilities (N, C) and names
    (C,); for a regression labels (N,) and values (N,); for any other task scores (N,), which are 1 for right and lower
    for wrong predictions, with true (N,) and predicted (N,) texts. texts, places: of the N examples. history:
    log_history of the Trainer; by default that of trainer_state.json in the folder. truncated: counts of truncated
    texts, by name.

    metrics.json holds the facts, "metrics" and "intervals"; a number that is not finite is null.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {**facts, "headline": headline, "metrics": metrics, "intervals": intervals or {}}
    if truncated:
        content["truncated"] = truncated
    write_text(folder / METRICS, json.dumps(as_json(content), indent=1, ensure_ascii=False) + "\n")
    history = _history(folder) if history is None else history
    page = _page(facts, metrics, headline, intervals or {}, tables or {}, texts, places, history, truncated or {})
    write_text(folder / PAGE, html.render(page))
    return [folder / METRICS, folder / PAGE]


def as_json(value: Any) -> Any:
    """Returns the value as JSON: arrays as lists, keys as strings, a number that is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def most_wrong(tables: Mapping[str, Any], most: int = MOST_WRONG) -> list[int]:
    """Returns the indices of the most wrong examples, the worst first. It does not include right ones."""
    labels = np.asarray(tables.get("labels", ()))
    if "scores" in tables:
        score = np.asarray(tables["scores"], np.float64)
        wrong = score < 1
    elif "probabilities" in tables:
        p = np.asarray(tables["probabilities"], np.float64)
        if labels.ndim == 2:
            score = np.where(labels > 0, p, 1 - p).min(1)
            wrong = ((p >= tables.get("threshold", 0.5)) != (labels > 0)).any(1)
        else:
            score, wrong = p[np.arange(len(p)), labels], p.argmax(1) != labels
    else:
        score = -np.abs(np.asarray(tables["values"], np.float64) - labels)
        wrong = score < 0
    order = np.argsort(score, kind="stable")
    return [int(i) for i in order if wrong[i]][:most]


def _history(folder: Path) -> Sequence[Mapping[str, Any]]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return history if isinstance(history, list) else []


def _page(
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    headline: str | None,
    intervals: Mapping[str, Sequence[float]],
    tables: Mapping[str, Any],
    texts: Sequence[str],
    places: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    truncated: Mapping[str, Any],
) -> Page:
    sections = [Section("Metrics", (_numbers(metrics, intervals),))]
    is_classes = "probabilities" in tables and np.asarray(tables["labels"]).ndim == 1
    n_names = np.shape(tables["probabilities"])[1] if "probabilities" in tables else 0
    names = [str(name) for name in tables.get("names", range(n_names))]
    if per_class := metrics.get("per_class"):
        sections.append(Section("Classes", (_per_class(per_class, names),)))
    elif per_type := metrics.get("per_type"):
        sections.append(Section("Types", (_per_class(list(per_type.values()), list(per_type)),)))
    plots: list[Plot] = []
    if is_classes:
        labels, p = np.asarray(tables["labels"]), np.asarray(tables["probabilities"], np.float64)
        confusion = confusion_matrix(labels, p.argmax(1), p.shape[1])
        blocks: list[Block] = [_confusion(confusion, names)]
        if len(names) <= MOST_CLASSES:
            plots.append(heat_map(confusion, names))
            blocks.insert(0, plots[-1])
        sections.append(Section("Confusion", tuple(blocks)))
        if bool(np.allclose(p.sum(1), 1, atol=SUM_OF_SHARES)):
            plots.append(reliability(calibration(p.max(1), p.argmax(1) == labels)))
            sections.append(Section("Calibration", (plots[-1],)))
    if (plot := curves(history, headline)) is not None:
        plots.append(plot)
        sections.append(Section("Learning curve", (plot,)))
    if {"labels", "scores"} & set(tables) and len(texts):
        sections.append(Section("Examples that are most wrong", (_wrong(tables, names, texts, places),)))
    if truncated:
        pairs = tuple((name.replace("_", " "), _fact(value)) for name, value in truncated.items())
        sections.append(Section("What was cut", (facts("Texts that were too long", ("item", "value"), pairs),)))
    notes: tuple[str, ...] = ()
    if plots and not _can_draw():
        sections = [Section(s.title, tuple(b for b in s.blocks if not isinstance(b, Plot))) for s in sections]
        sections, notes = [section for section in sections if section.blocks], (NO_FIGURES,)
        logger.warning("%s has no figures because matplotlib is not installed", PAGE)
    pairs = tuple((name.replace("_", " "), _fact(value)) for name, value in about.items())
    title = f"Fine-tuning: {about['task']}" if "task" in about else "Fine-tuning"
    subject = ", ".join(str(about[key]) for key in ("model", "device") if about.get(key))
    verdict = _verdict(metrics, headline, intervals, notes)
    return Page(title, subject, verdict, tuple(sections), METHOD, (facts("The run", ("item", "value"), pairs),))


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _verdict(
    metrics: Mapping[str, Any], headline: str | None, intervals: Mapping[str, Sequence[float]], notes: tuple[str, ...]
) -> Verdict:
    value = metrics.get(headline or "")
    if not isinstance(value, (int, float)):
        return Verdict("There was no evaluation.", good=False, notes=notes)
    sentence = f"{str(headline).replace('_', ' ')} is {value:.4f}"
    if bounds := intervals.get(str(headline)):
        sentence += f" (95 % interval: {bounds[0]:.4f} to {bounds[1]:.4f})"
    examples = next((metrics[key] for key in ("examples", "sentences", "queries") if key in metrics), None)
    sentence += "" if examples is None else f" on {examples:,} examples that were not trained on"
    return Verdict(sentence[0].upper() + sentence[1:] + ".", good=math.isfinite(value), notes=notes)


def _numbers(metrics: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> Table:
    lines = []
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        bounds = intervals.get(name)
        shown = NO_VALUE if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
        written = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        lines.append(Line(name.replace("_", " "), (written, shown)))
    return Table("On records that were not trained on", ("metric", "value", "95 % interval"), tuple(lines))


def _per_class(per_class: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    names = names or [str(i) for i in range(len(per_class))]
    lines = tuple(
        Line(_cut(name, 60), (*(f"{each[key]:.4f}" for key in ("precision", "recall", "f1")), f"{each['support']:,}"))
        for name, each in zip(names, per_class, strict=True)
    )
    return Table("Each class", ("class", "precision", "recall", "F1", "examples"), lines)


def _confusion(confusion: np.ndarray, names: Sequence[str]) -> Table:
    """Returns a table of the pairs of classes that are most often confused."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [(int(i) // len(names), int(i) % len(names)) for i in order if off.flat[i]]
    lines = tuple(
        Line(_cut(names[true], 60), (_cut(names[got], 60), f"{off[true, got]:,}", f"{off[true, got] / n:.1%}"))
        for true, got in pairs
        if (n := confusion[true].sum())
    )
    notes = () if lines else ("No example was taken for another class.",)
    header = ("true class", "predicted", "examples", "share of the true class")
    return Table("Classes that are confused most", header, lines, notes)


def _wrong(tables: Mapping[str, Any], names: Sequence[str], texts: Sequence[str], places: Sequence[str]) -> Table:
    labels, lines = np.asarray(tables.get("labels", ())), []
    for i in most_wrong(tables):
        place = places[i] if len(places) else f"example {i + 1}"
        if "scores" in tables:
            true, got = (_cut(str(tables[key][i]), LONGEST) or NO_VALUE for key in ("true", "predicted"))
        elif "probabilities" not in tables:
            true, got = f"{labels[i]:.4g}", f"{np.asarray(tables['values'])[i]:.4g}"
        else:
            p = np.asarray(tables["probabilities"])[i]
            if labels.ndim == 2:
                predicted = p >= tables.get("threshold", 0.5)
                true, got = (", ".join(n for n, is_ in zip(names, row, strict=True) if is_) or NO_VALUE
                             for row in (labels[i] > 0, predicted))  # fmt: skip
            else:
                true = f"{names[labels[i]]} ({p[labels[i]]:.1%})"
                got = f"{names[p.argmax()]} ({p.max():.1%})"
        lines.append(Line(place, (true, got, _cut(" ".join(str(texts[i]).split()), LONGEST))))
    notes = () if lines else ("All are right.",)
    return Table("The worst first", ("place", "true", "predicted", "text"), tuple(lines), notes, prose=True)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return _cut(", ".join(f"{key} {_fact(each)}" for key, each in value.items()), 2000) or NO_VALUE
    if isinstance(value, (list, tuple)):
        return _cut(", ".join(map(_fact, value)), 2000) or NO_VALUE
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NO_VALUE}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
