"""The text level: strings in, vectors out, tokenization included, on docstrings of the standard library (workload f).

Throughput: all texts at once. Latency: one short text at a time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import models
import torch
from peers_text import text_encoders
from suites import Built, Case, Work

from fastbert.bench.engines import EAGER
from fastbert.bench.peers import Peer
from fastbert.bench.text import Latency, TextEncoder, TextTask, Throughput
from fastbert.bench.texts import docstrings, spread
from fastbert.demo import fast_at_bfloat16

SUITE = "text"
THROUGHPUT, LATENCY = "throughput", "latency"
N_TEXTS = {"cpu": 64, "cuda": 100_000}  # at most; there are some thousands
CUDA_CASES = ((THROUGHPUT, "bfloat16"), (LATENCY, "bfloat16"), (THROUGHPUT, "float16"))
CPU_CASES = ((THROUGHPUT, "float32"), (THROUGHPUT, "bfloat16"), (LATENCY, "float32"), (LATENCY, "bfloat16"))
LATENCY_ROUNDS = 50  # enough for percentiles


def cases(device_type: str, model: Path | None = None) -> list[Case]:
    """All cases for "cuda" or "cpu", the most important first. model: a checkpoint, else MiniLM (models.text_model)."""
    wanted = CUDA_CASES if device_type == "cuda" else CPU_CASES
    name = models.text_model_name(model)
    fast = device_type == "cuda" or fast_at_bfloat16(torch.device("cpu"))
    return [
        Case(
            SUITE,
            "docstrings" if setting == THROUGHPUT else "short docstrings, one at a time",
            name,
            dtype,
            device_type,
            ("text", "model"),
            functools.partial(build, setting, dtype, model),
            setting=setting,
        )
        for setting, dtype in wanted
        if fast or dtype != "bfloat16"
    ]


def build(setting: str, dtype: str, model: Path | None, device: torch.device) -> Built:
    task, encoders = prepared(dtype, model, device)
    peers: list[Peer]
    if setting == LATENCY:
        texts = task.short_texts()
        peers = [Latency(encoder, texts) for encoder in encoders]
        extra = {"length": int(task.token_lengths(texts).max()), "batch": 1}
        timing = {"rounds": LATENCY_ROUNDS, "min_rounds": 10}
        return Built(peers, EAGER, task.vectors(texts), items=1, extra=extra, timing=timing)
    peers = [Throughput(encoder) for encoder in encoders]
    work = Work(models.flops(task.exact.model.config, task.lengths.tolist()))
    extra = {"length": int(task.lengths.max()), "flops_per_token": work.flops / task.n_tokens}
    return Built(peers, EAGER, task.reference(), task.n_tokens, len(task.texts), work, extra)


@functools.lru_cache(maxsize=1)  # throughput and latency of one dtype use the same loaded models
def prepared(dtype: str, model: Path | None, device: torch.device) -> tuple[TextTask, list[TextEncoder]]:
    texts = spread(docstrings(), N_TEXTS[device.type])
    task = TextTask(models.text_model(model), texts, dtype=dtype, device=device)
    return task, text_encoders(task)
