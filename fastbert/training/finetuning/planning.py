"""A plan describes a run before it starts: labels, lengths, truncation, number of steps, and estimated time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastbert.training.finetuning.cut import full_lengths
from fastbert.training.finetuning.prepared import Prepared
from fastbert.training.finetuning.settings import FinetuneSettings

WARMUP, TIMED = 1, 4  # steps
SHARES = 0, 25, 50, 75, 90, 95, 99, 100


def plan(settings: FinetuneSettings) -> dict[str, Any]:
    """Prepares a run, times a few of its steps, and returns facts about the run by name, as JSON values.

    Lengths are in tokens, before truncation; times are in seconds. Nothing is written. Raises the errors of a run.
    """
    from fastbert.training.finetuning.running import batch_size_of, device_of, n_steps, n_tokens

    prepared = Prepared.of(settings)
    features, evaluated = prepared.features(prepared.train), prepared.features(prepared.evaluation)
    limit, windows = prepared.longest, prepared.task.windows
    full = full_lengths(features)
    tokens = [n_tokens(each) for each in features]
    batch_size = batch_size_of(prepared.settings, features)
    steps = n_steps(prepared.settings, len(features), batch_size)
    seconds = _seconds_of_step(prepared, features, batch_size, device_of(prepared.settings))
    truncated, of_evaluation = (sum(n > limit for n in full_lengths(some)) for some in (features, evaluated))
    became = "split into windows" if windows else "truncated"
    return {
        "task": settings.task,
        "model": settings.model,
        "records of training": len(prepared.train),
        "records of evaluation": len(prepared.evaluation),
        **prepared.facts,
        "tokens of an input, by percentile": percentiles(full),
        "longest input that is read": limit,
        became: truncated,
        f"{became}, of evaluation": of_evaluation,
        "features of training": len(features),
        "features of a step": batch_size * settings.accumulate,
        "tokens of a step": round(statistics.mean(tokens) * batch_size * settings.accumulate),
        "steps": steps,
        "seconds of a step": seconds,
        "seconds of training": steps * seconds,
    }  # fmt: skip


def lines(plan: Mapping[str, Any]) -> list[str]:
    """Returns a plan as text, with one line per fact."""
    written = []
    for name, value in plan.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}: {each}" for key, each in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:.3g}"
        written.append(f"{name}: {value}")
    return written


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Returns the lengths at the percentiles in SHARES, by percentile."""
    return {str(share): int(value) for share, value in zip(SHARES, np.percentile(lengths, SHARES), strict=True)}


def _seconds_of_step(
    prepared: Prepared, features: list[dict[str, Any]], batch_size: int, device: torch.device
) -> float:
    """Returns the median time of a few updates with features from all of the data.

    The model is not usable afterwards.
    """
    from fastbert.training.finetuning.loading import accelerated, restricted
    from fastbert.training.precision import takes_bf16

    settings, collate = prepared.settings, prepared.task.collator(prepared.tokenizer)
    model = accelerated(restricted(prepared.model.to(device).train(), settings), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-9)
    names = prepared.inputs()
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    times = []
    for step in range(WARMUP + TIMED):
        start = time.perf_counter()
        for i in range(settings.accumulate):
            first = (step * settings.accumulate + i) * batch_size
            rows = [features[drawn[(first + j) % len(drawn)]] for j in range(batch_size)]
            batch = collate([{name: value for name, value in row.items() if name in names} for row in rows])
            with torch.autocast(device.type, torch.bfloat16, enabled=takes_bf16(settings.precision, device)):
                loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP:])
