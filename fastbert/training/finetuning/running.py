"""This module makes the Trainer of a run, its arguments from the settings, and its sealed checkpoints."""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.training.checkpoints import MARKER, obstacle, seal
from fastbert.training.distributed import n_processes
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import Task
from fastbert.training.precision import takes_bf16
from fastbert.training.settings import n_steps_of

logger = logging.getLogger("fastbert")

_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = 1 << 24  # bytes: a disk with less free space counts as full


def batch_size_of(settings: FinetuneSettings, features: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of sequences per batch: the setting, or the number that has batch_tokens on average."""
    if settings.batch_tokens is None:
        return settings.batch_size
    mean = sum(map(n_tokens, features)) / max(len(features), 1)
    return max(1, round(settings.batch_tokens / max(mean, 1)))


def n_tokens(feature: Mapping[str, Any]) -> int:
    """Returns the number of tokens of a feature, over all its choices."""
    ids = feature["input_ids"]
    return sum(map(len, ids)) if len(ids) and hasattr(ids[0], "__len__") else len(ids)


def n_steps(settings: FinetuneSettings, n_features: int, batch_size: int) -> int:
    """Returns the number of updates of a run, with the processes that torchrun has started."""
    if settings.steps is not None:
        return settings.steps
    batches = math.ceil(n_features / (batch_size * n_processes()))
    return max(1, math.ceil(settings.epochs * max(1, math.ceil(batches / settings.accumulate))))


def device_of(settings: FinetuneSettings) -> torch.device:
    """Returns the device for the Trainer. Raises ValueError for a device that it cannot select or that is missing."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}; CUDA_VISIBLE_DEVICES chooses among several GPUs")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a device that is there, got 'cuda'")
    return torch.device(name)


def arguments(settings: FinetuneSettings, task: Task, steps: int, batch_size: int, evaluates: bool) -> Any:
    """Makes the TrainingArguments of a run."""
    from transformers import TrainingArguments

    device = device_of(settings)
    _forget_precision()
    by_epoch = settings.evaluate_every is None
    every = None if by_epoch else settings.evaluate_every
    options: dict[str, Any] = {
        "output_dir": str(checkpoint_folder(settings)),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps or -1,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_steps": n_steps_of(settings.warmup, steps),
        "max_grad_norm": settings.clip,
        "seed": settings.seed,
        "bf16": takes_bf16(settings.precision, device),
        "use_cpu": device.type == "cpu",
        "save_strategy": "epoch" if by_epoch else "steps",
        "save_total_limit": None,  # The callback below deletes old checkpoints, after the new one is complete.
        "logging_steps": settings.log_every,
        "report_to": [],
        "label_names": list(task.label_names),
        "dataloader_num_workers": settings.workers,
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": not settings.progress,
    }
    if every is not None:
        options["save_steps"] = every
    if evaluates:
        options |= {
            "eval_strategy": options["save_strategy"],
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{task.headline}",
            "greater_is_better": task.greater_is_better,
        }
        if every is not None:
            options["eval_steps"] = every
    arguments = TrainingArguments(**options, **_grouped(settings))
    if arguments.n_gpu > 1:  # Without torchrun the Trainer would use DataParallel.
        arguments._n_gpu = 1
    return arguments


def _forget_precision() -> None:
    """Clears the precision and device that an earlier Trainer of this process has set."""
    from accelerate.state import AcceleratorState

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if n_processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


def _grouped(settings: FinetuneSettings) -> dict[str, Any]:
    """Returns the argument that groups texts by length. Its name changed with transformers 5."""
    import dataclasses

    from transformers import TrainingArguments

    if not settings.group_by_length:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"group_by_length": True} if "group_by_length" in names else {"train_sampling_strategy": "group_by_length"}


def make_trainer(
    settings: FinetuneSettings,
    task: Task,
    model: Any,
    tokenizer: Any,
    train: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]],
    compute_metrics: Any,
) -> Any:
    """Makes the Trainer of a run, for training features and optional evaluation features."""
    from transformers import EarlyStoppingCallback

    from fastbert.training.callback import finite_callback
    from fastbert.training.finetuning.clock import clock

    batch_size = batch_size_of(settings, train)
    steps = n_steps(settings, len(train), batch_size)
    callbacks = [finite_callback(), clock(), _keeper_class()(settings.keep)]
    if settings.early_stopping is not None and evaluation:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    return _trainer_class()(
        model,
        arguments(settings, task, steps, batch_size, bool(evaluation)),
        train_dataset=train,
        eval_dataset=evaluation or None,
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer),
        compute_metrics=compute_metrics,
        compute_loss_func=task.loss(settings),
        preprocess_logits_for_metrics=task.keep,
        callbacks=callbacks,
    )


@functools.cache
def _trainer_class() -> type:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class OrderedTrainer(Trainer):
        """The Trainer keeps the order of records in evaluations, even if training groups texts by length.

        It treats the model's own loss as the mean of a batch, which it is. If forward has **kwargs, transformers'
        Trainer would treat it as a share of the whole step: it would not divide by the number of accumulated batches,
        and would multiply by the number of processes.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            if hasattr(eval_dataset, "__len__"):  # accelerate distributes it over several processes
                return SequentialSampler(eval_dataset)
            return super()._get_eval_sampler(eval_dataset)

    return OrderedTrainer


@functools.cache
def last_step_class() -> Any:
    """Makes the class of a callback of transformers' Trainer at its first use."""
    from transformers import TrainerCallback

    class LastStep(TrainerCallback):
        """The callback makes the Trainer evaluate and save at the last step, whatever the interval of evaluations."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step >= state.max_steps and args.save_strategy == "steps":
                control.should_evaluate = args.eval_strategy != "no"
                control.should_save = True
            return control

    return LastStep


@functools.cache
def _keeper_class() -> type:
    class Keeper(last_step_class()):  # type: ignore[misc]
        """The callback seals checkpoints, deletes old ones, and makes the Trainer evaluate and save at the end."""

        def __init__(self, keep: int) -> None:
            self.keep = keep

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.best_model_checkpoint:  # The folder of a resumed run may have been moved.
                state.best_model_checkpoint = str(Path(args.output_dir) / Path(state.best_model_checkpoint).name)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            folder = Path(args.output_dir)
            seal(folder / f"checkpoint-{state.global_step}", {"step": state.global_step})
            best = Path(state.best_model_checkpoint or "").name
            for path in checkpoints(folder)[: -self.keep]:
                if path.name != best:
                    (path / MARKER).unlink(missing_ok=True)
                    shutil.rmtree(path)

    return Keeper


def checkpoint_folder(settings: FinetuneSettings) -> Path:
    """Returns the folder of the Trainer's checkpoints."""
    return Path(settings.output) / "checkpoints"


def checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints, complete or not, the oldest first."""
    if not folder.is_dir():
        return []
    checkpoints = [
        (int(m[1]), path) for path in folder.iterdir() if path.is_dir() and (m := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(checkpoints)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint, or None. The log names newer ones that are incomplete."""
    for path in reversed(checkpoints(folder)):
        reason = obstacle(path, contents=True)
        if reason is None:
            return path
        logger.warning("checkpoint %s is skipped: %s", path, reason)
    return None


def clock_of(trainer: Any) -> dict[str, Any]:
    """Returns the times and peak memory of `clock.clock`, from a Trainer of `make_trainer`."""
    facts: dict[str, Any] = next(each.facts() for each in trainer.callback_handler.callbacks if hasattr(each, "facts"))
    return facts


def train(trainer: Any, resume: Path | None) -> None:
    """Trains to the end. Raises OSError, with the name of the last good checkpoint, if the disk is full."""
    folder = Path(trainer.args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except Exception as error:
        number = getattr(error, "errno", None)
        if number != errno.ENOSPC and (number is not None or shutil.disk_usage(_existing(folder)).free >= _FULL):
            raise
        for path in checkpoints(folder):
            if obstacle(path) is not None:
                shutil.rmtree(path, ignore_errors=True)
        good = newest_checkpoint(folder)
        kept = "there is no earlier one" if good is None else f"{good.name} stays; --resume continues from it"
        raise OSError(errno.ENOSPC, f"a checkpoint was not written, the disk is full ({kept})", str(folder)) from error


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())
