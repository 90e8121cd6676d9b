"""`finetune` trains a head on a pre-trained encoder.

It combines data, model, Trainer, metrics and the result folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import read_json, write_text
from fastbert.training.finetuning.prepared import Prepared
from fastbert.training.finetuning.settings import MAY_DIFFER, FinetuneSettings

logger = logging.getLogger("fastbert")

RUN, LAST = "run.json", "last"


@dataclass(frozen=True)
class Finetuned:
    """A `Finetuned` is the result of a run. metrics: those of the best model, {} without evaluation data."""

    output: Path
    metrics: dict[str, Any]
    steps: int
    best_step: int | None
    seconds: float
    history: list[dict[str, Any]]  # the Trainer's log
    plan: dict[str, Any] | None = None  # the plan of a dry run, which runs no step and writes nothing


def finetune(settings: FinetuneSettings | None = None, **fields: Any) -> Finetuned:
    """Fine-tunes a pre-trained encoder; returns the metrics and the folder of the result.

    settings: a `FinetuneSettings`, or its fields by name: task="classify", model="bert-base-uncased", train=...,
    output="folder". train and eval are files, or any iterables of dicts, such as a datasets.Dataset.

    The output folder holds the best model in the format of transformers, with its tokenizer, metrics.json, a report and
    a model card. The last model is in `last`, and the Trainer's checkpoints are in `checkpoints`. Raises RecordError,
    with the position in the data, for a wrong record; ValueError for wrong settings; FloatingPointError for a gradient
    that is not finite; OSError for a file that cannot be read or written.
    """
    from fastbert.adapters import counts
    from fastbert.training.finetuning.cut import warn_of_cut, what_was_cut
    from fastbert.training.finetuning.loading import accelerated, load_weights, merged, restricted
    from fastbert.training.finetuning.results import write_results
    from fastbert.training.finetuning.running import checkpoint_folder, clock_of, make_trainer, newest_checkpoint, train

    settings = FinetuneSettings(**fields) if settings is None else dataclasses.replace(settings, **fields)
    start, output = time.monotonic(), Path(settings.output)
    if settings.dry_run:
        from fastbert.training.finetuning.planning import plan

        return Finetuned(output, {}, 0, None, 0.0, [], plan(settings))
    _refuse_to_overwrite(settings)
    prepared = Prepared.of(settings)
    task, settings = prepared.task, prepared.settings
    resume = _resumed(prepared) if settings.resume else None
    model = accelerated(restricted(prepared.model, settings), settings)
    features, evaluated = prepared.features(prepared.train), prepared.features(prepared.evaluation)
    cut = {"train": what_was_cut(features, prepared.longest, task.windows)}
    if evaluated:
        cut["eval"] = what_was_cut(evaluated, prepared.longest, task.windows)
    for source, counted in cut.items():
        warn_of_cut(source, counted, prepared.longest)

    def predictions_of(logits: Any) -> Any:
        return task.predictions(logits, evaluated, prepared.evaluation)

    def compute_metrics(output: Any) -> dict[str, float]:
        scores = task.score(predictions_of(output.predictions), prepared.evaluation)
        return {name: float(value) for name, value in scores.items() if isinstance(value, (int, float))}

    trainer = make_trainer(settings, task, model, prepared.tokenizer, features, evaluated, compute_metrics)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / RUN, json.dumps(_identity(prepared), indent=1) + "\n")
    train(trainer, resume)
    best = Path(trainer.state.best_model_checkpoint) if trainer.state.best_model_checkpoint else None
    predictions = predictions_of(trainer.predict(evaluated).predictions) if evaluated else None
    scores = {} if predictions is None else task.score(predictions, prepared.evaluation)
    result = Finetuned(
        output, scores, trainer.state.global_step, None if best is None else int(best.name.rpartition("-")[2]),
        time.monotonic() - start, trainer.state.log_history,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        _save(merged(model), prepared.tokenizer, output)
        newest = newest_checkpoint(checkpoint_folder(settings))
        if newest is not None and newest != best:
            load_weights(model, newest)
        _save(merged(model), prepared.tokenizer, output / LAST)
        if newest is not None and best is not None and newest != best:
            load_weights(model, best)
        write_results(
            prepared, output, metrics=scores, predictions=predictions, history=result.history, steps=result.steps,
            best_step=result.best_step, seconds=result.seconds, calls=counts(model), clock=clock_of(trainer),
            truncated={"longest input that is read": f"{prepared.longest} tokens", **cut},
        )  # fmt: skip
    return result


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_to_overwrite(settings: FinetuneSettings) -> None:
    run = Path(settings.output) / RUN
    if run.exists() and not settings.resume:
        raise ValueError(f"output: {settings.output} holds a run; continue it with --resume, or name another folder")


def _identity(prepared: Prepared) -> dict[str, Any]:
    """Returns the settings, labels and data that must be the same when a run resumes."""
    digest = hashlib.sha256()
    for record in prepared.train:
        digest.update(repr(sorted(record.values.items())).encode())
    same = {name: value for name, value in prepared.settings.as_dict().items() if name not in MAY_DIFFER}
    return json.loads(json.dumps({**same, "facts": prepared.facts, "data": digest.hexdigest()}, default=float))


def _resumed(prepared: Prepared) -> Path | None:
    """Returns the checkpoint to resume from, or None. Raises ValueError if the run had other settings."""
    from fastbert.training.finetuning.running import checkpoint_folder, newest_checkpoint

    output = Path(prepared.settings.output)
    newest = newest_checkpoint(checkpoint_folder(prepared.settings))
    if newest is None:
        logger.warning("%s holds no checkpoint to resume from: a new run begins", output)
        return None
    before, now = read_json(output / RUN), _identity(prepared)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        shown = ", ".join(f"{name} (then {before.get(name)!r:.80}, now {now.get(name)!r:.80})" for name in changed)
        raise ValueError(f"resume: the run in {output} had other settings: {shown}")
    return newest
