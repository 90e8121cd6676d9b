"""This module runs sentence-transformers' trainers: arguments, checkpoints, resuming, and results."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import write_text
from fastbert.training.distributed import Processes
from fastbert.training.finetuning import vector_planning
from fastbert.training.finetuning.running import last_step_class
from fastbert.training.finetuning.vector_evaluation import Scores, evaluator_of
from fastbert.training.finetuning.vector_processes import by_first
from fastbert.training.finetuning.vector_report import VectorResult, write_results
from fastbert.training.finetuning.vector_settings import MAY_DIFFER, VectorSettings

logger = logging.getLogger("fastbert")

CHECKPOINTS, LAST, METRICS, SETTINGS = "checkpoints", "last", "metrics.json", "settings.json"
STATE = "trainer_state.json"  # the file that a trainer writes last
OF_TRAINER = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", STATE, "training_args.bin")


def prepare_output(settings: VectorSettings, processes: Processes) -> str | None:
    """Makes the result folder, and returns the newest complete checkpoint of a run to resume, or None.

    The first process reads and writes for all. Raises FileExistsError for a folder with checkpoints if `resume` is off,
    and ValueError if the settings differ from those of the run to resume.
    """
    return by_first(processes, lambda: _prepared(settings))


def _prepared(settings: VectorSettings) -> str | None:
    if settings.dry_run:
        return None
    output = Path(settings.output)
    checkpoint = newest_checkpoint(output / CHECKPOINTS)
    file = output / SETTINGS
    values = json.loads(json.dumps(settings.as_dict()))
    if settings.resume and checkpoint is not None and file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in values if name not in MAY_DIFFER and old.get(name) != values[name]]
        if differing:
            name = differing[0]
            raise ValueError(f"{name}: got {values[name]!r}, but the run that is to go on has {old.get(name)!r}")
        return str(checkpoint)
    if not settings.resume and checkpoint is not None:
        raise FileExistsError(f"{output}: has checkpoints; continue from them with resume, or name another output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose state, which is written last, can be read; None without one."""
    numbered = [(int(p.name.split("-")[1]), p) for p in folder.glob("checkpoint-*") if re.search(r"-\d+$", p.name)]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            logger.warning("%s: the checkpoint is not complete, and is skipped", path)
    return None


def arguments_of(kind: Any, settings: VectorSettings, headline: str | None, **more: Any) -> Any:
    """Makes the arguments of a trainer. kind: their class.

    headline: the metric that selects the best model, or None.
    """
    import torch

    from fastbert.training.precision import takes_bf16

    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    names = inspect.signature(kind.__init__).parameters
    strategy = "epoch" if settings.evaluate_every is None else "steps"
    warmup: dict[str, Any] = {"warmup_steps": settings.warmup if settings.warmup < 1 else round(settings.warmup)}
    if settings.warmup < 1 and "logging_dir" in names:  # transformers 4
        warmup = {"warmup_ratio": settings.warmup}
    best: dict[str, Any] = {}
    if headline is not None:
        best = {
            "eval_strategy": strategy, "eval_steps": settings.evaluate_every, "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{headline}", "greater_is_better": True,
        }  # fmt: skip
    arguments = kind(
        output_dir=str(Path(settings.output) / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=takes_bf16(settings.precision, torch.device("cpu" if on_cpu else "cuda")),
        save_strategy=strategy,
        save_steps=settings.evaluate_every or 500,
        save_total_limit=settings.keep + (headline is not None),
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not settings.progress,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        **warmup,
        **best,
        **more,
    )
    if arguments.n_gpu > 1:  # Without torchrun the trainer would use DataParallel.
        arguments._n_gpu = 1
    return arguments


def across_devices(loss: Any) -> dict[str, Any]:
    """Returns the argument of a loss that uses negatives of all ranks, if it exists and there are several ranks."""
    import torch.distributed

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = several and torch.distributed.get_world_size() > 1
    known = "gather_across_devices" in inspect.signature(loss.__init__).parameters
    if several and not known:
        logger.warning("this version of sentence-transformers takes negatives from each process alone")
    return {"gather_across_devices": True} if several and known else {}


def run(
    trainer_class: Any,
    arguments: Any,
    model: Any,
    loss: Any,
    data: Any,
    settings: VectorSettings,
    score: Callable[[Any], Scores] | None,
    headline: str,
    checkpoint: str | None,
    sizes: Mapping[str, Any],
    processes: Processes,
    inputs: Sequence[Sequence[str | tuple[str, str]]],
) -> VectorResult:
    """Trains, and writes the best model, the last one, the metrics and the report into the result folder.

    inputs: the model's inputs from each record, as in `vector_planning.plan`; only a dry run, which makes a plan, uses
    them. Raises FloatingPointError for a loss or a gradient that is not finite, as `FiniteGuard` does.
    """
    from transformers import EarlyStoppingCallback

    from fastbert.training.callback import finite_callback

    if settings.dry_run:
        planned = vector_planning.plan(trainer_class, arguments, model, loss, data, settings, sizes, inputs)
        return VectorResult(Path(settings.output), headline, {}, {}, 0, 0, 0.0, [], [], dict(sizes), planned)
    before = by_first(processes, lambda: score(model)) if score is not None else {}
    if hasattr(model.model_card_data, "generate_widget_examples"):
        model.model_card_data.generate_widget_examples = False
    callbacks = [finite_callback(), last_step_class()()]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=callbacks,
        evaluator=None if score is None else evaluator_of(score, headline),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    if not trainer.state.global_step:
        raise ValueError(
            f"batch_size: no batch of {settings.batch_size} records could be made, without equal texts in it where the "
            "loss needs that; expected a smaller one, or more records"
        )
    after = by_first(processes, lambda: score(model)) if score is not None else {}
    state = trainer.state
    best = state.best_metric
    if best is not None and not math.isclose(best, after[headline], rel_tol=1e-2, abs_tol=1e-2):
        raise RuntimeError(f"the best model had {headline} = {best:.4f}, and has {after[headline]:.4f} once loaded")
    result = VectorResult(
        Path(settings.output), headline, before, after,
        int(str(state.best_model_checkpoint).rpartition("-")[2]) if best is not None else state.global_step,
        state.global_step, seconds,
        [(line["step"], line["loss"]) for line in state.log_history if "loss" in line],
        [(line["step"], line[f"eval_{headline}"]) for line in state.log_history if f"eval_{headline}" in line],
        dict(sizes),
    )  # fmt: skip
    by_first(processes, lambda: _write(result, settings, model))
    return result


def _write(result: VectorResult, settings: VectorSettings, model: Any) -> None:
    """Writes the best model, the last one, the metrics and the report."""
    model.save_pretrained(settings.output)
    last = newest_checkpoint(Path(settings.output) / CHECKPOINTS)
    if last is not None:
        shutil.rmtree(Path(settings.output) / LAST, ignore_errors=True)
        shutil.copytree(last, Path(settings.output) / LAST, ignore=shutil.ignore_patterns(*OF_TRAINER))
    write_results(result, settings)
