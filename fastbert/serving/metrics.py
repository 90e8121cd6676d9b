"""This module counts the work of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(2**n for n in range(4, 18))


class ModelMetrics(NamedTuple):
    """A ModelMetrics holds the metrics of one model. The label is looked up once and not for each request."""

    texts: Counter
    tokens: Counter
    truncated: Counter
    batch_texts: Counter
    batch_tokens: Histogram


class Metrics:
    """A Metrics holds the metrics of one server in its own registry, so that a process may have several servers.

    complete: is called before the metrics are read.
    """

    def __init__(self, complete: Callable[[], None] = lambda: None) -> None:
        self._complete = complete
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastbert_requests", "Answered requests.", ("route", "model", "status"), registry=registry
        )
        self.seconds = Histogram(
            "fastbert_request_seconds", "From the head of a request to its answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.texts = Counter("fastbert_texts", "Texts in successful answers.", ("model",), registry=registry)
        self.tokens = Counter(
            "fastbert_tokens", "Tokens in successful answers, special tokens included.", ("model",), registry=registry
        )
        self.truncated = Counter(
            "fastbert_truncated_texts", "Texts that were cut, in successful answers.", ("model",), registry=registry
        )
        self.batch_texts = Counter("fastbert_batch_texts", "Texts that were computed.", ("model",), registry=registry)
        self.batch_tokens = Histogram(
            "fastbert_batch_tokens", "Tokens in a batch.", ("model",), buckets=_TOKENS, registry=registry
        )
        self.queue = Gauge("fastbert_queue_tokens", "Tokens that wait or run.", ("model",), registry=registry)
        self.in_flight = Gauge("fastbert_requests_in_flight", "Requests without an answer.", registry=registry)
        self.ready = Gauge("fastbert_ready", "1 if the server is ready and no stop was requested.", registry=registry)

    def of(self, model: str) -> ModelMetrics:
        """Returns the metrics of one model."""
        return ModelMetrics(
            self.texts.labels(model), self.tokens.labels(model), self.truncated.labels(model),
            self.batch_texts.labels(model), self.batch_tokens.labels(model),
        )  # fmt: skip

    def page(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        self._complete()
        return generate_latest(self.registry)
