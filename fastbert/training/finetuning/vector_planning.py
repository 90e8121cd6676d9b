"""A plan describes a training of vectors or of a cross-encoder before it starts: data, lengths, steps, and time."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.training.finetuning.clock import clock
from fastbert.training.finetuning.planning import TIMED, WARMUP, percentiles
from fastbert.training.finetuning.vector_settings import VectorSettings

MEASURED = 10_000  # number of inputs whose tokens are counted, evenly spaced in the data

Input = str | tuple[str, str]


def plan(
    trainer_class: Any,
    arguments: Any,
    model: Any,
    loss: Any,
    data: Any,
    settings: VectorSettings,
    sizes: Mapping[str, Any],
    inputs: Sequence[Sequence[Input]],
) -> dict[str, Any]:
    """Times a few steps, and returns facts about a run by name, as JSON values.

    inputs: for each record, the texts or pairs of texts that the model reads. Lengths are in tokens, before truncation,
    of at most `MEASURED` inputs. Times are in seconds, of this process. The call trains the model for some steps, and
    writes nothing. Raises the errors of a run.
    """
    lengths = _lengths(model, inputs)
    longest = _longest(model)
    texts_of_record = statistics.mean(map(len, inputs))
    records = settings.batch_size * settings.accumulate
    n_batches, seconds = _timed(trainer_class, arguments, model, loss, data)
    steps = settings.steps or max(1, math.ceil(settings.epochs * max(1, math.ceil(n_batches / settings.accumulate))))
    return {
        "model": settings.model,
        **sizes,
        "tokens of an input, by percentile": percentiles(lengths),
        "longest input that is read": longest,
        "inputs that were counted": len(lengths),
        "of these truncated": sum(length > longest for length in lengths),
        "records of a step": records,
        "tokens of a step": round(statistics.mean(min(n, longest) for n in lengths) * texts_of_record * records),
        "steps": steps,
        "seconds of a step": seconds,
        "seconds of training": steps * seconds,
    }  # fmt: skip


def _lengths(model: Any, inputs: Sequence[Sequence[Input]]) -> list[int]:
    """Counts the tokens of inputs, including special tokens."""
    flat = [each for record in inputs for each in record]
    chosen = [flat[i] for i in np.linspace(0, len(flat) - 1, min(len(flat), MEASURED)).astype(int).tolist()]
    pairs = [(each, None) if isinstance(each, str) else each for each in chosen]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    encoded = model.tokenizer(first, None if second[0] is None else second, truncation=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _longest(model: Any) -> int:
    """Returns the maximum number of tokens that the model reads of an input."""
    longest = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None)
    return int(longest or model.tokenizer.model_max_length)


def _timed(trainer_class: Any, arguments: Any, model: Any, loss: Any, data: Any) -> tuple[int, float]:
    """Returns the number of batches of an epoch, and the median time of an update, from a run of a few steps."""
    times = clock()
    arguments.disable_tqdm = True
    arguments.save_strategy = arguments.eval_strategy = arguments.logging_strategy = "no"
    arguments.load_best_model_at_end = False
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder
        trainer = trainer_class(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[times])
        n_batches = len(trainer.get_train_dataloader())
        arguments.max_steps = WARMUP + TIMED
        trainer.train()
    if not times.steps:
        raise ValueError(f"batch_size: no batch of {arguments.per_device_train_batch_size} records could be made")
    return n_batches, statistics.median(times.steps[WARMUP:] or times.steps)
