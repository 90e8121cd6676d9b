"""The text suite goes from strings to vectors, on docstrings of the standard library (workload f).

Throughput: all texts at once. Latency: one short text at a time. The model is MiniLM, or the given one. On a GPU there
is also a cross-encoder, from pairs of docstrings to scores. On CPUs there is also the throughput of a BERT-base with
random weights, on fewer texts: it works eight times as long for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers_pairs import PAIR_SCORERS, PairTask
from peers_text import text_encoders
from suites import LONG_MINUTES, Built, Case, LeftOut, Work

import models
from fastbert.bench.devices import fast_at_bfloat16
from fastbert.bench.engines import EAGER, SDPA, Compiled
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.text_encoders import SentenceTransformers, TextEncoder, TunedSentenceTransformers
from fastbert.bench.text_peers import Latency, Throughput
from fastbert.bench.text_task import TextTask
from fastbert.bench.texts import docstrings, spread

SUITE = "text"
BASE = "BERT-base"
THROUGHPUT, LATENCY = "throughput", "latency"
N_TEXTS = {"cpu": 32, "cuda": 100_000}  # at most; there are some thousands
N_TEXTS_LONG = {"cpu": 600, "cuda": 100_000}  # in runs of LONG_MINUTES and more
N_TEXTS_BASE, N_TEXTS_BASE_LONG = 16, 64
N_PAIRS = 4096  # at most, on a GPU
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
SETTINGS = ((THROUGHPUT, "docstrings", 2.0), (LATENCY, "short docstrings, one at a time", 1.0))  # and their weights
# On a CPU each competitor has a process, which takes several seconds. So there is one dtype, and only the usual
# choices.
MEMORY = (OURS, SDPA.name, SentenceTransformers.name, TunedSentenceTransformers.name)
LATENCY_ROUNDS = 50  # enough for percentiles
BASE_ROUNDS, BASE_BATCH = {"rounds": 3, "min_rounds": 2}, 8  # the batch that all competitors choose for MiniLM
# The time of a case relative to MiniLM's longest, in short and in long runs.
BASE_SCALE = {"float32": (2.0, 1.2), "bfloat16": (1.0, 0.6)}


@dataclass(frozen=True)
class Plan:
    """A Plan has the parts of a case.

    folder: makes or finds the checkpoint. n_texts: at most. left_out: competitors that are too slow for it. base: a
    large model, which no other case uses.
    """

    folder: Callable[[], Path]
    setting: str
    dtype: str
    n_texts: int
    left_out: tuple[str, ...]
    base: bool = False


def cases(device_type: str, model: Path | None = None, *, long: bool = False) -> list[Case]:
    """Returns the cases for "cuda" or "cpu", the most important first. model: a checkpoint, else MiniLM
    (models.text_model).

    long: the run has time for torch.compile on a GPU, which tunes for minutes, and on a CPU for more texts.
    """
    fast = device_type == "cuda" or fast_at_bfloat16(torch.device("cpu"))
    dtypes = [dtype for dtype in DTYPES[device_type] if fast or dtype != "bfloat16"]
    folder = functools.partial(models.text_model, model)
    n_texts = (N_TEXTS_LONG if long else N_TEXTS)[device_type]
    left_out = () if long or device_type == "cpu" else (Compiled.name,)
    minilm_cases = [
        _case(
            Plan(folder, setting, dtype, n_texts, left_out),
            models.text_model_name(model),
            workload,
            device_type,
            weight=weight,
            keep=setting == THROUGHPUT,
        )
        for dtype in dtypes
        for setting, workload, weight in SETTINGS
    ]
    if device_type == "cuda":
        return [*minilm_cases, *(pair_case(dtype, device_type) for dtype in dtypes)]
    return minilm_cases if model is not None else minilm_cases + _base_cases(dtypes, long)


def pair_case(dtype: str, device_type: str, name: str = "MiniLM", n_pairs: int = N_PAIRS) -> Case:
    """Returns a case from pairs of docstrings to scores of a random cross-encoder of a shape in models.CONFIGS."""

    def build_pairs(device: torch.device) -> Built:
        texts = spread(all_texts(), 2 * n_pairs)
        n = len(texts) // 2
        folder = models.random_pair_model(name)
        task = PairTask(folder, list(zip(texts[:n], texts[n : 2 * n], strict=True)), dtype=dtype, device=device)
        work = Work(models.flops(task.exact.model.config, task.lengths))
        extra = {"length": max(task.lengths), "flops_per_token": work.flops / sum(task.lengths)}
        peers = [scorer(task) for scorer in PAIR_SCORERS]
        return Built(peers, EAGER, task.reference(), sum(task.lengths), n, work, extra, {"warmup": 0})

    needs = "text", "model"
    return Case(
        SUITE, "pairs of docstrings", f"{name} cross-encoder", dtype, device_type, needs, build_pairs, THROUGHPUT
    )


def _base_cases(dtypes: list[str], long: bool) -> list[Case]:
    """Returns BERT-base on a CPU: the fewest bits first, because they are fastest; the others after all suites."""
    n_texts = N_TEXTS_BASE_LONG if long else N_TEXTS_BASE
    left_out = () if long else (Compiled.name, SentenceTransformers.name)
    return [
        _case(
            Plan(functools.partial(models.random_text_model, BASE), THROUGHPUT, dtype, n_texts, left_out, base=True),
            BASE,
            SETTINGS[0][1],
            "cpu",
            weight=2.0,
            scale=BASE_SCALE[dtype][long],
            late=dtype != dtypes[-1],
        )
        for dtype in reversed(dtypes)
    ]


def _case(plan: Plan, model: str, workload: str, device_type: str, **settings: Any) -> Case:
    build_it = functools.partial(build, plan)
    return Case(
        SUITE, workload, model, plan.dtype, device_type, ("text", "model"), build_it, setting=plan.setting, **settings
    )


def build(plan: Plan, device: torch.device) -> Built:
    task, encoders = prepared(plan.dtype, plan.folder, device, plan.n_texts)
    if plan.base:
        prepared.cache_clear()  # some gigabytes
        for encoder in encoders:
            encoder.batch_size = BASE_BATCH if encoder.batch_sizes else None
    texts = task.short_texts()
    peers: list[Peer] = []
    for encoder in encoders:
        if encoder.name in plan.left_out:
            reason = f"needs a run of {LONG_MINUTES:g} minutes: it takes long"
            peers.append(LeftOut(encoder.name, reason, encoder.dtype))
        else:
            takes_memory = plan.dtype == "float32" and encoder.name in MEMORY and not plan.base
            peers.append(Throughput(encoder, takes_memory) if plan.setting == THROUGHPUT else Latency(encoder, texts))
    if plan.setting == LATENCY:
        extra = {"length": int(task.token_lengths(texts).max()), "batch": 1}
        timing = {"rounds": LATENCY_ROUNDS, "min_rounds": 10, "warmup": 0}
        return Built(peers, EAGER, task.vectors(texts), items=1, extra=extra, timing=timing)
    work = Work(models.flops(task.exact.model.config, task.lengths.tolist()))
    extra = {"length": int(task.lengths.max()), "flops_per_token": work.flops / task.n_tokens}
    timing = {"warmup": 0, "memory": True} | (BASE_ROUNDS if plan.base else {})
    return Built(peers, EAGER, task.reference(), task.n_tokens, len(task.texts), work, extra, timing)


@functools.lru_cache(maxsize=1)  # throughput and latency of one dtype use the same loaded models
def prepared(
    dtype: str, folder: Callable[[], Path], device: torch.device, n_texts: int
) -> tuple[TextTask, list[TextEncoder]]:
    task = TextTask(folder(), spread(all_texts(), n_texts), dtype=dtype, device=device)
    return task, text_encoders(task)


@functools.cache
def all_texts() -> list[str]:
    """Returns the docstrings, the same for all cases. Competitors import modules, which would change the docstrings
    found.
    """
    return docstrings()
