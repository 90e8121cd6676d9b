"""A Service holds the models of a server. It loads them, reports their state, and computes for callers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastbert.diagnostics.warmup import warmup
from fastbert.serving.auth import Keys
from fastbert.serving.batcher import Batcher
from fastbert.serving.errors import ApiError
from fastbert.serving.later import Later
from fastbert.serving.limits import Limits
from fastbert.serving.metrics import Metrics, ModelMetrics
from fastbert.serving.served import NotFinite, Served, Tokens, n_characters, serve_model
from fastbert.serving.work import Lane
from fastbert.serving.worker import Worker

logger = logging.getLogger("fastbert.serving")

TOKENIZERS = 2  # threads that tokenize during the computation of a batch
# The most texts and characters of a request that is tokenized faster than a thread starts.
FEW_TEXTS, FEW_CHARACTERS = 8, 1000
ALONE_SECONDS = 0.1  # a caller is alone if no other connection sent a request in this time
_TEXT = "One text."


@dataclass(frozen=True)
class Settings:
    """A Settings holds the settings of a server.

    batch_invariant: the models' setting, for `/info`. truncate: whether longer texts are truncated if a request does
    not set it.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    batch_invariant: bool = False
    truncate: bool = True


@dataclass
class Answer:
    """An Answer has a result for each text of a request."""

    results: list[Any]
    tokens: Tokens


class Service:
    """A Service is "starting" until its models are loaded and warm, then "ready", and "draining" before it stops.

    loaders: functions that load the models, by name. If the state is "failed", `error` has the reason. abandoned:
    whether it was stopped while it was starting. later: counts and log entries that follow after an answer. in_flight:
    the number of requests without an answer.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], settings: Settings | None = None) -> None:
        self.loaders, self.settings = dict(loaders), settings or Settings()
        self.later = Later()
        self.metrics = Metrics(self.later.now)
        self.in_flight = 0
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self._last_caller: tuple[Any, float] = (None, -ALONE_SECONDS)
        self._others_at = -ALONE_SECONDS
        self.metrics_of: dict[str, ModelMetrics] = {}
        self.models: dict[str, Served] = {}
        self.batchers: dict[str, Batcher] = {}
        self.state, self.error = "starting", None
        self.abandoned = False
        self.started = int(time.time())
        self._pool = ThreadPoolExecutor(TOKENIZERS, "fastbert-tokenizer")
        self._workers = [Worker("fastbert-cpu")]  # each model on another device has its own worker

    error: BaseException | None

    def load(self) -> None:
        """Loads and warms up all models. Then the service is ready or failed. A stop takes effect after each model."""
        try:
            for name, load in self.loaders.items():
                if self.state == "starting":
                    self._workers[0].call(partial(self._add, name, load))
        except BaseException as error:
            if self.state == "starting":  # otherwise the service was stopped
                self.state, self.error = "failed", error
            raise
        if self.state == "starting":
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info("ready", extra={"fields": {"models": list(self.models)}})

    def _add(self, name: str, load: Callable[[], Any]) -> None:
        torch.get_num_threads()  # this call sets OpenMP's number of threads in this thread
        model = serve_model(name, load())
        started = time.perf_counter()
        metrics = self.metrics_of[name] = self.metrics.of(name)

        def count(n_items: int, n_tokens: int) -> None:
            self.later.add(metrics.batch_texts.inc, n_items)
            self.later.add(metrics.batch_tokens.observe, n_tokens)

        warmup(model.model if model.kind == "embedding" else model.model.model)
        for task in sorted(model.tasks):
            lane = Lane(task)
            model.compute(lane, model.encode(lane, [_TEXT]).items)
        if model.bert.device.type != "cpu":
            self._workers.append(Worker(f"fastbert-{name}"))
        worker = self._workers[-1 if model.bert.device.type != "cpu" else 0]
        capacity = self.settings.limits.queue_tokens
        batcher = Batcher(model.compute, model.token_budget, capacity, count, model.compute_here, worker)
        self.metrics.queue.labels(name).set_function(lambda: batcher.n_tokens)
        self.models[name], self.batchers[name] = model, batcher
        seconds = round(time.perf_counter() - started, 3)
        logger.info("warm", extra={"fields": {"model": name, "kind": model.kind, "seconds": seconds}})

    def drain(self) -> None:
        """Reports from now on that the service is not ready. It still answers requests."""
        self.abandoned = self.abandoned or self.state == "starting"
        self.state = "failed" if self.state == "failed" else "draining"
        self.metrics.ready.set(0)

    def close(self) -> None:
        """Computes waiting requests, and ends all threads except one that is loading a model."""
        self.drain()
        for worker in self._workers:
            worker.close(0.0 if self.abandoned else self.settings.limits.seconds)
        self._pool.shutdown(cancel_futures=True)
        self.later.now()

    @property
    def alive(self) -> bool:
        """Tells whether the models can compute, or are still being loaded."""
        return self.state != "failed" and all(worker.alive for worker in self._workers)

    def check_serving(self) -> None:
        """Raises ApiError 503 before the models are loaded."""
        if len(self.models) < len(self.loaders):
            raise ApiError(503, "not_ready", "the models are being loaded", retry_after=1)

    def named(self, name: str) -> Served:
        """Returns the model with this name. Raises ApiError 404 if there is none."""
        if name not in self.models:
            message = f"there is no model of this name; there are {', '.join(self.models)}"
            raise ApiError(404, "model_not_found", message, param="model")
        return self.models[name]

    def model_for(self, tasks: frozenset[str], name: str | None) -> Served:
        """Returns the model with this name, or the first model with one of the tasks.

        Raises ApiError 424 if it has none of them.
        """
        models = list(self.models.values()) if name is None else [self.named(name)]
        for model in models:
            if model.tasks & tasks:
                return model
        wanted = " or ".join(sorted(tasks))
        raise ApiError(424, "unsupported_task", f"none of the requested models supports {wanted}", param="model")

    def is_only_caller(self, address: Any) -> bool:
        """Tells whether only the connection of this request has sent requests in the last ALONE_SECONDS.

        A connection has one request at a time. So no other request waits during its computation.
        """
        now = time.perf_counter()
        last, at = self._last_caller
        self._last_caller = address, now
        if last != address and now - at < ALONE_SECONDS:
            self._others_at = now
        return now - self._others_at > ALONE_SECONDS

    async def compute(
        self, model: Served, lane: Lane, texts: list[Any], truncate: bool | None, is_only: bool = False
    ) -> Answer:
        """Returns the results of texts. A cancellation takes them out of the queue.

        truncate: whether longer texts are cut, None for the settings' choice. is_only: no other request is there or
        expected, so that this one may hold the event loop for a moment. Raises ApiError: 429 for a full queue, 413 for
        longer texts that must not be cut and for too many tokens, and 500 where a text cannot be computed.
        """
        batcher, limits = self.batchers[model.name], self.settings.limits
        if model.limit is None:
            limits.check_characters(texts)
        # The estimate may exceed the limit of a request. Other requests must not be refused because of it.
        work = batcher.reserve(min(sum(model.bound(lane, text) for text in texts), limits.tokens))
        try:
            if len(texts) <= FEW_TEXTS and sum(map(n_characters, texts)) <= FEW_CHARACTERS:
                tokens = model.encode(lane, texts)
            else:
                tokens = await self.in_thread(model.encode, lane, texts)
            if tokens.n_truncated and not (self.settings.truncate if truncate is None else truncate):
                message = (
                    f"{tokens.n_truncated} of {len(texts)} texts have more tokens than the model reads, and truncate "
                    f"is false: {tokens.n_truncated_tokens} tokens too many"
                )
                raise ApiError(413, "text_too_long", message)
            if tokens.n_tokens > limits.tokens:
                message = f"the request has {tokens.n_tokens} tokens, expected at most {limits.tokens}"
                raise ApiError(413, "too_many_tokens", message)
            lane = lane._replace(side="")  # texts are truncated already, so the side may not separate them
            limits.check_numbers(tokens.n_tokens * model.bert.config.hidden_size if lane.task == "embed_all" else 0)
            if not (is_only and self.in_flight == 1 and batcher.run_here(work, lane, tokens.items)):
                await _done(batcher.submit(work, lane, tokens.items))
            results = work.future.result()
        finally:
            work.future.cancel()  # has no effect on a finished future
        for result in results:
            if isinstance(result, Exception):
                raise _failure(result)
        if lane.task == "sparse":
            limits.check_numbers(sum(len(weights) for _, weights in results))
        self.later.add(self._count, model.name, len(texts), tokens.n_tokens, tokens.n_truncated)
        return Answer(results, tokens)

    def _count(self, name: str, n_texts: int, n_tokens: int, n_truncated: int) -> None:
        metrics = self.metrics_of[name]
        metrics.texts.inc(n_texts)
        metrics.tokens.inc(n_tokens)
        metrics.truncated.inc(n_truncated)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


async def _done(future: Future[Any]) -> None:
    """Waits until a future of another thread is done, by one call of this thread's event loop."""
    loop, waiter = asyncio.get_running_loop(), asyncio.Future[None]()

    def wake(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and the caller with it
            loop.call_soon_threadsafe(_set, waiter)

    future.add_done_callback(wake)
    await waiter


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotFinite):
        return ApiError(500, "not_finite", "the model gave NaN or infinity for a text of this request")
    return ApiError(500, "computation_failed", f"the model failed on a text of this request: {type(error).__name__}")
