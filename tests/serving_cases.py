"""The tests of serving share tiny models, an app in this process, and a server in a thread."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient

from fastbert import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CrossEncoder,
    EntityRecognizer,
    SentenceEncoder,
)
from fastbert.pipelines.modules import Normalize
from fastbert.serving.app import make_app
from fastbert.serving.limits import Limits
from fastbert.serving.server import ServerThread
from fastbert.serving.service import Service, Settings
from helpers import tiny_bert

TEXTS = [
    "a river is wide", "small boats cross the river", "fish", "a river is wide and slow", "Fish!", "boats and boats",
    "the river is wide and slow, and small boats cross it every morning, and come back full of fish",
]  # fmt: skip
PROMPT = "query: "


def save_models(folder: Path) -> SimpleNamespace:
    """The folders of tiny random models: an encoder, a reranker, a classifier, a tagger and a masked-language model."""
    torch.manual_seed(0)
    config, tokenizer = tiny_bert([*TEXTS, PROMPT] * 3, 120)
    encoder = SentenceEncoder(BertModel(config), tokenizer, "mean", [Normalize()], prompts={"query": PROMPT})
    encoder.save_pretrained(folder / "encoder")
    heads: dict[str, tuple[Any, dict[int, str]]] = {
        "masked": (BertForMaskedLM, {0: "LABEL_0", 1: "LABEL_1"}),
        "reranker": (BertForSequenceClassification, {0: "LABEL_0"}),
        "classifier": (BertForSequenceClassification, {0: "bad", 1: "fair", 2: "good"}),
        "tagger": (BertForTokenClassification, {0: "O", 1: "B-LOC", 2: "I-LOC"}),
    }
    for name, (kind, labels) in heads.items():
        config.id2label = labels
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(**{path.name: str(path) for path in folder.iterdir()})


def loaders(models: SimpleNamespace, *names: str, **options: Any) -> dict[str, Callable[[], Any]]:
    """What loads the models of these names, all of them by default, on the CPU in float32."""
    options = {"device": "cpu", "dtype": "float32", **options}
    kinds: dict[str, Callable[[], Any]] = {
        "encoder": lambda: SentenceEncoder.from_pretrained(models.encoder, **options),
        "reranker": lambda: CrossEncoder.from_pretrained(models.reranker, **options),
        "classifier": lambda: CrossEncoder.from_pretrained(models.classifier, **options),
        "tagger": lambda: EntityRecognizer.from_pretrained(models.tagger, **options),
        "sparse": lambda: SentenceEncoder.from_pretrained(models.masked, output="sparse", **options),
    }
    return {name: kinds[name] for name in names or kinds}


@contextmanager
def client_of(service: Service) -> Iterator[TestClient]:
    """A client of the app, once it is ready."""
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        wait_until(lambda: service.state == "ready")
        yield client


@contextmanager
def served(
    sources: dict[str, Callable[[], Any]], limits: Limits | None = None, **settings: Any
) -> Iterator[ServerThread]:
    """A server on a port of this machine, in a thread."""
    with ServerThread(Service(sources, Settings(limits or Limits(), **settings))) as server:
        yield server


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.005)


def numbers(text: str) -> np.ndarray:
    """The float32 numbers behind base64."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def error_of(response: Any) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form."""
    body = json.loads(response.text)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    return body["error"]


def figure(page: str, name: str, **labels: str) -> float:
    """The sum of a metric over all series that have these labels."""
    total = 0.0
    for line in page.splitlines():
        head, _, value = line.rpartition(" ")
        if head.split("{")[0] == name and all(f'{key}="{text}"' in head for key, text in labels.items()):
            total += float(value)
    return total
