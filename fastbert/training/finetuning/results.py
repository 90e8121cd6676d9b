"""This module writes the result files of a run: metrics.json, the report, and a model card of facts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import write_text
from fastbert.training.finetuning.prepared import Prepared
from fastbert.training.finetuning.report import write_report
from fastbert.training.model_card import CARD

PIPELINES = {
    "classify": "text-classification", "multilabel": "text-classification", "regress": "text-classification",
    "choice": "multiple-choice", "tokens": "token-classification", "qa": "question-answering",
}  # fmt: skip


def write_results(
    prepared: Prepared,
    output: Path,
    *,
    metrics: Mapping[str, Any],
    predictions: Any,
    history: Sequence[Mapping[str, Any]],
    steps: int,
    best_step: int | None,
    seconds: float,
    calls: Mapping[str, int],
    clock: Mapping[str, Any],
    truncated: Mapping[str, Any],
) -> None:
    """Writes metrics.json, report.html and README.md into the result folder.

    metrics, predictions: those of the best model on the evaluation records. history: the Trainer's log. calls: the
    number of encoder calls, by fastbert, or by the model's own code with the reason. seconds: of the whole run. clock:
    times of steps and peak memory, by name. truncated: counts of truncated texts, by name.
    """
    import torch
    import transformers

    from fastbert._version import __version__

    task, settings = prepared.task, prepared.settings
    interval = None if predictions is None else task.interval(predictions, prepared.evaluation)
    facts = {
        "task": task.name,
        "model": settings.model,
        "labels": prepared.facts,
        "records": {"training": len(prepared.train), "evaluation": len(prepared.evaluation)},
        "steps": steps,
        "best_step": best_step,
        "seconds": round(seconds, 1),
        **clock,
        "calls": dict(calls),
        "settings": settings.as_dict(),
        "device": _device(settings.device),
        "versions": {"fastbert": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    intervals = {} if interval is None else {task.headline: interval}
    write_report(
        output, facts, metrics, headline=task.headline, intervals=intervals,
        tables=None if predictions is None else task.tables(predictions, prepared.evaluation),
        texts=[_text(record.values) for record in prepared.evaluation],
        places=[record.place for record in prepared.evaluation], history=history,
        truncated=truncated,
    )  # fmt: skip
    write_card(output, {**facts, "headline": task.headline, "metrics": metrics, "intervals": intervals})


def write_card(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> Path:
    """Writes README.md, the model card, from the content of metrics.json; returns its path."""
    path, task = Path(folder) / CARD, str(facts["task"])
    settings, labels = facts["settings"], facts["labels"].get("labels")
    lines = ["---", "library_name: transformers"]
    if task in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[task]}")
    lines += ["tags:", "- fastbert", "---", "", f"# {path.resolve().parent.name}", ""]
    lines += [f"`{facts['model']}`, fine-tuned by `fastbert finetune {task}`.", "", "## Results", ""]
    numbers = {name: value for name, value in facts["metrics"].items() if isinstance(value, float)}
    if numbers:
        lines += [f"The best model (step {facts['best_step']}) on {facts['records']['evaluation']:,} records that were "
                  "not trained on:", "", "| | |", "|---|---|"]  # fmt: skip
        for name, value in numbers.items():
            interval = facts["intervals"].get(name)
            shown = "" if interval is None else f" (95 %: {interval[0]:.4f} to {interval[1]:.4f})"
            lines.append(f"| {name.replace('_', ' ')} | {value:.4f}{shown} |")
    else:
        lines.append("There was no evaluation.")
    lines += ["", "## Training", "", "| | |", "|---|---|", f"| records | {facts['records']['training']:,} |"]
    if labels:
        shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
        lines.append(f"| labels | {shown.replace('|', chr(92) + '|')} |")
    for name in ("epochs", "learning_rate", "batch_size", "max_length", "seed", "precision", "lora", "freeze_encoder"):
        if settings[name] not in (None, False):
            lines.append(f"| {name.replace('_', ' ')} | {settings[name]} |")
    lines += [f"| steps | {facts['steps']:,} |", f"| duration | {facts['seconds']:.0f} s |",
              f"| device | {facts['device']} |"]  # fmt: skip
    lines += ["", "## License", "", "This card states no license. The licenses of the model that training began with "
              "and of the data bear on it.", ""]  # fmt: skip
    write_text(path, "\n".join(lines))
    return path


def _text(values: Mapping[str, Any]) -> str:
    names = "text", "text_pair", "context", "question", "choices"
    return " | ".join(str(values[name]) for name in names if values.get(name) is not None)


def _device(name: str | None) -> str:
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
