"""A load is many requests of mixed kinds, sizes and mistakes, with what is right known before the first is sent."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import numpy as np

from fastbert.serving.service import Service
from fastbert.serving.work import Lane
from serving_cases import TEXTS, numbers

QUERIES = {1: "a river", 2: "boats", 7: "fish and " * 30}  # by the number of texts
JSON = {"Content-Type": "application/json"}
MISTAKES: list[tuple[str, Any, int]] = [
    ("/embed", b"{", 400),
    ("/embed", b'{"inputs": "\xff"}', 400),
    ("/embed", {"inputs": 5}, 400),
    ("/v1/embeddings", {"input": "a", "model": "none"}, 404),
    ("/embed", {"inputs": "fish " * 60, "truncate": False}, 413),
    ("/rerank?model=encoder", {"query": "a", "texts": ["b"]}, 424),
]


@dataclass
class Question:
    """A Question is a request and what is right: a status, and the numbers or places of its answer."""

    kind: str
    path: str
    body: bytes
    status: int
    n_texts: int = 0
    right: Any = None


def pool(n: int) -> list[str]:
    """n texts of one to forty-five words, in the order of a seed."""
    generator, words = random.Random(0), " ".join(TEXTS).split()
    return [" ".join(generator.choices(words, k=generator.choice((1, 3, 8, 20, 45)))) for _ in range(n)]


def questions(service: Service, n: int) -> Iterator[Question]:
    """Yields n requests, the same ones each time. Each of their texts is computed alone to know what is right."""
    all_texts, alone = pool(60), Alone(service)
    for number in range(n):
        generator = random.Random(number)
        kind = generator.choice(("openai", "embed", "ids", "rerank", "predict", "entities", "mistake"))
        if kind == "mistake":
            path, body, status = generator.choice(MISTAKES)
            yield Question(kind, path, body if isinstance(body, bytes) else json.dumps(body).encode(), status)
            continue
        n_texts = generator.choice((1, 1, 2, 7))
        texts = generator.choices(all_texts, k=n_texts)
        path, body = _request(service, kind, texts)
        yield Question(kind, path, json.dumps(body).encode(), 200, n_texts, alone.right(kind, texts))


def _request(service: Service, kind: str, texts: list[str]) -> tuple[str, Any]:
    if kind == "rerank":
        return "/rerank", {"query": QUERIES[len(texts)], "texts": texts}
    if kind == "predict":
        return "/predict?model=classifier", {"inputs": [[text] for text in texts]}
    if kind in ("embed", "entities"):
        return f"/{kind}", {"inputs": texts}
    tokenizer = service.models["encoder"].tokenizer
    rows = [tokenizer.encode_packed([text], max_length=40, warn=False).input_ids.tolist() for text in texts]
    inputs = rows if kind == "ids" else texts
    return "/v1/embeddings", {"model": "encoder", "input": inputs, "encoding_format": "base64"}


class Alone:
    """An Alone computes each text alone, in Python, once."""

    def __init__(self, service: Service) -> None:
        self._models = service.models
        self._of_text = cache(self._compute)

    def right(self, kind: str, texts: list[str]) -> list[Any]:
        """Returns what is right for each text of a request."""
        kind = "embed" if kind in ("openai", "ids") else kind
        return [self._of_text(kind, text, len(texts) if kind == "rerank" else 0) for text in texts]

    def _compute(self, kind: str, text: str, n_texts: int) -> Any:
        if kind == "rerank":
            return self._models["reranker"].model.predict([(QUERIES[n_texts], text)])[0]
        if kind == "predict":
            classifier, lane = self._models["classifier"], Lane("predict")
            return np.sort(classifier.compute(lane, classifier.encode(lane, [text]).items)[0])[::-1]
        if kind == "entities":
            return _places(self._models["tagger"].model(text))
        return self._models["encoder"].model.encode(text, normalize_embeddings=True)


def _places(entities: Any) -> list[Any]:
    return [(each["entity_group"], each["start"], each["end"], each["word"]) for each in entities]


class Callers:
    """Callers ask a server at once, each for one question after the other, and keep what was answered wrongly.

    tolerance: of numbers, 0 for equal bits.
    """

    def __init__(self, url: str, tolerance: float) -> None:
        self.url, self.tolerance = url, tolerance
        self.wrong: list[str] = []
        self.answered: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.n_texts = 0
        self.seconds: list[float] = []  # of each answer
        self._lock = threading.Lock()

    def ask(self, todo: Iterable[Question], n_callers: int, seconds: float) -> None:
        """Asks all questions. Raises AssertionError where an answer is lost or wrong."""
        waiting = list(todo)
        n = len(waiting)
        pool = httpx.Limits(max_connections=n_callers)
        with httpx.Client(base_url=self.url, timeout=120, limits=pool) as client:
            threads = [
                threading.Thread(target=self._ask_in_turn, args=(waiting, client), daemon=True)
                for _ in range(n_callers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(seconds)
        assert self.wrong[:5] == [] and sum(self.answered.values()) == n, f"{n - sum(self.answered.values())} are lost"

    def _ask_in_turn(self, waiting: list[Question], client: httpx.Client) -> None:
        while True:
            with self._lock:
                if not waiting:
                    return
                question = waiting.pop()
            start = time.perf_counter()
            try:
                response = client.post(question.path, content=question.body, headers=JSON)
                right = response.status_code == question.status and self._is_right(question, response)
                wrong = "" if right else f"{question.kind}: {response.status_code} {response.text[:300]}"
            except Exception as error:
                wrong = f"{question.kind}: {type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            with self._lock:
                self.seconds.append(seconds)
                if wrong:
                    self.wrong.append(wrong)
                    continue
                self.answered[question.path.split("?")[0], response.status_code] += 1
                self.n_texts += question.n_texts

    def _is_right(self, question: Question, response: httpx.Response) -> bool:
        answer = response.json()
        if question.status != 200:
            return set(answer) == {"error"}
        if question.kind == "entities":
            return [_places(each) for each in answer] == question.right
        if question.kind == "rerank":
            scores = [each["score"] for each in answer]
            in_order = sorted(answer, key=lambda each: each["index"])
            return scores == sorted(scores, reverse=True) and self._same([e["score"] for e in in_order], question.right)
        if question.kind == "predict":
            return self._same([[each["score"] for each in own] for own in answer], question.right)
        if question.kind == "embed":
            return self._same(answer, question.right)
        return self._same([numbers(each["embedding"]) for each in answer["data"]], question.right)

    def _same(self, ours: Any, right: Any) -> bool:
        a, b = np.asarray(ours, np.float32), np.asarray(right, np.float32)
        if self.tolerance == 0:
            return np.array_equal(a, b)
        return a.shape == b.shape and float(np.abs(a - b).max()) <= self.tolerance
