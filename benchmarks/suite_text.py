"""The text level: strings in, vectors out, tokenization included, on docstrings of the standard library (workload f).

Throughput: all texts at once. Latency: one short text at a time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import models
import torch
from peers_text import text_encoders
from suites import LONG_MINUTES, Built, Case, LeftOut, Work

from fastbert.bench.engines import EAGER, SDPA, Compiled
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.text import (
    Latency,
    Pooled,
    SentenceTransformers,
    TextEncoder,
    TextTask,
    Throughput,
    TunedSentenceTransformers,
)
from fastbert.bench.texts import docstrings, spread
from fastbert.demo import fast_at_bfloat16

SUITE = "text"
THROUGHPUT, LATENCY = "throughput", "latency"
N_TEXTS = {"cpu": 32, "cuda": 100_000}  # at most; there are some thousands
N_TEXTS_LONG = {"cpu": 600, "cuda": 100_000}  # in runs of LONG_MINUTES and more
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
SETTINGS = ((THROUGHPUT, "docstrings", 2.0), (LATENCY, "short docstrings, one at a time", 1.0))  # and their weights
# On a CPU a process each, which takes several seconds: in one dtype, and of what most would use.
MEMORY = (OURS, SDPA.name, SentenceTransformers.name, TunedSentenceTransformers.name)
LATENCY_ROUNDS = 50  # enough for percentiles


def cases(device_type: str, model: Path | None = None, *, long: bool = False) -> list[Case]:
    """All cases for "cuda" or "cpu", the most important first. model: a checkpoint, else MiniLM (models.text_model).

    long: the run has time for torch.compile on a GPU, where it tunes for minutes; on a CPU it always takes part.
    """
    fast = device_type == "cuda" or fast_at_bfloat16(torch.device("cpu"))
    return [
        Case(
            SUITE,
            workload,
            models.text_model_name(model),
            dtype,
            device_type,
            ("text", "model"),
            functools.partial(build, setting, dtype, model, long),
            setting=setting,
            weight=weight,
            keep=setting == THROUGHPUT,
        )
        for dtype in DTYPES[device_type]
        if fast or dtype != "bfloat16"
        for setting, workload, weight in SETTINGS
    ]


def build(setting: str, dtype: str, model: Path | None, long: bool, device: torch.device) -> Built:
    compiled = long or device.type == "cpu"
    task, encoders = prepared(dtype, model, device, (N_TEXTS_LONG if long else N_TEXTS)[device.type])
    texts = task.short_texts()
    peers: list[Peer] = []
    for encoder in encoders:
        if isinstance(encoder, Pooled) and isinstance(encoder.engine, Compiled) and not compiled:
            peers.append(LeftOut(encoder.name, f"needs a run of {LONG_MINUTES:g} minutes: it compiles for some"))
        else:
            takes_memory = dtype == "float32" and encoder.name in MEMORY
            peers.append(Throughput(encoder, takes_memory) if setting == THROUGHPUT else Latency(encoder, texts))
    if setting == LATENCY:
        extra = {"length": int(task.token_lengths(texts).max()), "batch": 1}
        timing = {"rounds": LATENCY_ROUNDS, "min_rounds": 10, "warmup": 0}
        return Built(peers, EAGER, task.vectors(texts), items=1, extra=extra, timing=timing)
    work = Work(models.flops(task.exact.model.config, task.lengths.tolist()))
    extra = {"length": int(task.lengths.max()), "flops_per_token": work.flops / task.n_tokens}
    timing = {"warmup": 0, "memory": True}
    return Built(peers, EAGER, task.reference(), task.n_tokens, len(task.texts), work, extra, timing)


@functools.lru_cache(maxsize=1)  # throughput and latency of one dtype use the same loaded models
def prepared(dtype: str, model: Path | None, device: torch.device, n_texts: int) -> tuple[TextTask, list[TextEncoder]]:
    texts = spread(docstrings(), n_texts)
    task = TextTask(models.text_model(model), texts, dtype=dtype, device=device)
    return task, text_encoders(task)
