"""In a call on several devices, this process makes tokens and batches, and the processes of a pool compute the batches.

The batches are those of one process, so each text has the same neighbours as there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.encoded import Encoded
from fastbert.models.tasks import BertForSequenceClassification
from fastbert.ops import packing
from fastbert.pipelines.batching import default_token_budget, in_batches
from fastbert.pipelines.pipeline import Pipeline, Pooling
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.progress import Progress
from fastbert.pipelines.run import Request, Run, overlaps
from fastbert.text.encoding import PackedEncoding

CPU = torch.device("cpu")


class SentenceWork:
    """A SentenceWork computes the batches of a SentenceEncoder in a process of a pool."""

    def __init__(self, model: Any, tail: Sequence[nn.Module], heads: dict[str, nn.Module]) -> None:
        self.model, self.tail, self.heads = model, tuple(tail), heads

    def to(self, device: torch.device) -> None:
        for module in (self.model, *self.tail, *self.heads.values()):
            module.to(device)

    def __call__(self, job: tuple[Request, Pooling | None, list[int], Tensor, Tensor]) -> Tensor | list[Any]:
        request, pooling, lengths, input_ids, token_type_ids = job
        if request.head is not None:
            request.head.module = self.heads[request.head.output]
        no_tokenizer: Any = None
        # The batch is cut already, so the budget covers all its tokens.
        pipeline = Pipeline(self.model, no_tokenizer, 1, pooling, self.tail, token_budget=max(sum(lengths), 1))
        offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        return Run(pipeline, request).compute(PackedEncoding(input_ids, token_type_ids, offsets, 0, 0))


class ScoreWork:
    """A ScoreWork computes the logits of batches of pairs in a process of a pool."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        self.model = model

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def __call__(self, job: tuple[list[int], Tensor, Tensor]) -> Tensor:
        lengths, *ids = job
        bert = self.model.bert
        batch = packing.from_lengths(lengths, bert.device)
        with torch.inference_mode():
            hidden = bert.encode_packed(batch, *ids, check=False)[-1]
            return self.model.classify(Encoded(batch, hidden, None, None)).to(logits_dtype(bert))


def logits_dtype(bert: Any) -> torch.dtype:
    """Returns the dtype of logits: float32 at least."""
    return torch.promote_types(bert.dtype, torch.float32)


class PoolRun(Run):
    """A PoolRun is one call of a pipeline. The request's pool computes its batches."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        super().__init__(pipeline, request)
        assert request.pool is not None
        self.pool, self.device = request.pool, request.pool.device
        # Windows are those of one process, but tokenizing always overlaps.
        self.windows_grow = overlaps(self.device) and not request.even
        self.timings.overlapped = True
        head = None if request.head is None else replace(request.head, module=None)
        self.sent = replace(
            request,
            progress=None,
            pool=None,
            head=head,
            prompt="",
            batch_size=None,
            n_left_out=self.n_left_out,
            on_host=True,
        )
        self.futures: list[Future[Any]] = []

    def windows(self, texts: Iterable[str]) -> Iterator[Any]:
        with ExitStack() as stack:
            self.stack = stack
            try:
                yield from super().windows(texts)
            finally:
                cancel(self.futures)

    def compute(self, tokens: PackedEncoding) -> Any:
        if self.request.own_pool:  # started with the first window, and not if there are no texts
            self.stack.enter_context(self.pool)
            self.request.own_pool = False
        budget = self.pipeline.token_budget or default_token_budget(self.device)
        batches = send(self.pool, tokens, budget, self.request.batch_size, (self.sent, self.pipeline.pooling))
        self.futures = [future for future in self.futures if not future.done()] + [future for _, future in batches]
        return Pending(batches, tokens.cu_seqlens.shape[0] - 1, self.request.progress)

    def _read(self, result: Any) -> Any:
        started = time.perf_counter()
        output = result.output.get()
        self.timings.waiting_for_device += time.perf_counter() - started
        return output


def send(
    pool: Pool, tokens: PackedEncoding, token_budget: int, batch_size: int | None, common: tuple[Any, ...] = ()
) -> list[tuple[list[int], Future[Any]]]:
    """Sends all batches of a window to a pool, and returns the places of each batch's texts with its future."""
    return [
        (places, pool.submit((*common, batch.cu_seqlens_cpu.diff().tolist(), *ids)))
        for places, batch, *ids in in_batches(tokens, token_budget, batch_size, CPU)
    ]


def cancel(futures: Iterable[Future[Any]]) -> None:
    """Cancels the jobs that no process has begun."""
    for future in futures:
        future.cancel()


class Pending:
    """A Pending collects the batches of a window on the host: vectors (n, dim), or items, in the order of its texts."""

    def __init__(self, batches: list[tuple[list[int], Future[Any]]], n_texts: int, progress: Progress | None) -> None:
        self.batches, self.n_texts, self.progress = batches, n_texts, progress

    def get(self) -> Any:
        """Waits for all batches. Raises the error of the first failed one."""
        with torch.inference_mode(False):  # callers may use the vectors in autograd
            return self._collect()

    def _collect(self) -> Any:
        vectors: Tensor | None = None
        items: list[Any] = [None] * self.n_texts
        for places, future in self.batches:
            results = future.result()
            if isinstance(results, Tensor):
                if vectors is None:
                    vectors = results.new_empty(self.n_texts, *results.shape[1:])
                vectors[places] = results
            else:
                for place, item in zip(places, results, strict=True):
                    items[place] = item
            if self.progress is not None:
                self.progress(len(places))
        return items if vectors is None else vectors


def pool_logits(
    pool: Pool, pipeline: Pipeline, tokens: PackedEncoding, batch_size: int | None, progress: Progress | None
) -> Tensor:
    """Returns the result of `logits`, computed by a pool, on the host."""
    pipeline.model.check_ids(tokens.input_ids, tokens.token_type_ids)
    budget = pipeline.token_budget or default_token_budget(pool.device)
    batches = send(pool, tokens, budget, batch_size)
    try:
        return Pending(batches, tokens.cu_seqlens.shape[0] - 1, progress).get()
    finally:
        cancel(future for _, future in batches)
