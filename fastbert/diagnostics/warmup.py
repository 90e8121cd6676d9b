"""`warmup` compiles kernels and captures CUDA graphs ahead, so that the first call does not wait for this."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from fastbert.checks import positive
from fastbert.diagnostics.explain.entry import backbone, find_model
from fastbert.engine import buckets
from fastbert.engine.events import CompileEvents, compile_events
from fastbert.models.pretrained import PreTrainedModel
from fastbert.pipelines.batching import default_token_budget
from fastbert.pipelines.sentence import SentenceEncoder

__all__ = ["WarmupReport", "compile_events", "warmup"]

_TEXT = "One text."


@dataclass(frozen=True)
class WarmupReport:
    """A `WarmupReport` describes the work of `warmup`; `str(report)` is a summary in a line or two.

    buckets: the token counts that have a CUDA graph now. events: the numbers of compiled kernels, loaded kernels and
    captured graphs. seconds: the time of the warm-up. notes: the reason if there is no graph.
    """

    model: str
    device: str
    buckets: tuple[int, ...]
    events: CompileEvents
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        compiled, loaded = self.events.compilations, self.events.loads
        if self.buckets:
            spread = f"{len(self.buckets)} CUDA graphs, for batches of {self.buckets[0]} to {self.buckets[-1]} tokens"
        else:
            spread = "no CUDA graphs"
        done = f"{spread}; {compiled} kernels compiled, {loaded} loaded from the cache on disk; {self.seconds:.1f} s"
        return "\n".join([f"{self.model} on {self.device}: {done}", *self.notes])


def warmup(model: Any, *, max_tokens: int | None = None) -> WarmupReport:
    """Compiles the kernels and captures the CUDA graphs of a model, so that no later batch waits for this.

    model: a BertModel, a model with a head, a SentenceEncoder, or a module that wraps one; in eval mode, on its
    device. max_tokens: the size of the largest expected batch, by default the encoder's token budget, or the largest
    bucket (fastbert.engine.graphs). Larger batches work too: their kernels are launched one by one.

    After that, `fastbert.compile_events()` does not change for any sequence lengths, in inference mode or under
    no_grad, until the model's weights, dtype, device or mode change. On a CPU a batch is run, which loads libraries and
    makes their buffers. Raises TypeError for another kind of model, ValueError for max_tokens.
    """
    inner = find_model(model)
    bert = backbone(inner)
    if max_tokens is None:
        max_tokens = buckets.LARGEST
        if isinstance(model, SentenceEncoder):
            max_tokens = model.token_budget or default_token_budget(model.device)
    max_tokens = positive("max_tokens", max_tokens)
    before, started = compile_events(), time.perf_counter()
    with torch.inference_mode():
        captured, obstacles = bert.engine.prepare(bert, max_tokens)
        _run_rest(model, inner)
    if bert.device.type == "cuda":
        torch.cuda.synchronize(bert.device)
    seconds = time.perf_counter() - started
    name, device = type(model).__name__, str(bert.device)
    notes = (f"No CUDA graphs: {'; '.join(obstacles)}.",) if obstacles else ()
    return WarmupReport(name, device, captured, compile_events() - before, seconds, notes)


def _run_rest(model: Any, inner: PreTrainedModel) -> None:
    """Runs the parts that follow the encoder: pooling, a head."""
    if isinstance(model, SentenceEncoder):
        for output in model.outputs:
            for normalize in (False, True) if output == "dense" else (False,):
                model.encode([_TEXT, _TEXT * 2], normalize_embeddings=normalize, output=output)
        return
    # There are two shapes, because kernels that are specialised for a size of one must also be compiled before serving.
    for batch_size, length in ((1, 1), (2, 8)):
        shape = (batch_size, 2, length) if type(inner).__name__ == "BertForMultipleChoice" else (batch_size, length)
        ids = torch.zeros(shape, dtype=torch.int64, device=inner.device)
        inner(ids)
        for mask in (ids + 1, ids == 0):  # integers and bools have different kernels
            inner(ids, mask)
