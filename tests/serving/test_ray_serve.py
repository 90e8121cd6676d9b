"""Ray Serve's replicas read OpenAI's requests, and count batches in tokens."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder
from fastbert.serving import ray_serve
from fastbert.serving.answers import dump_in_pieces
from fastbert.serving.errors import ApiError
from fastbert.serving.ray_serve import ServeArguments, Texts, answer, app, read_request, tokens_in
from helpers import tiny_bert
from sentence_cases import TEXTS


def test_arguments_come_as_text() -> None:
    """Catches `serve run NAME=VALUE` that is read as text, and a name with a slip in it that is passed over."""
    arguments = ServeArguments.of({"model": "m", "batch_tokens": "64", "batch_invariant": "True", "wait_ms": "1.5"})
    assert arguments == ServeArguments("m", batch_tokens=64, batch_invariant=True, wait_ms=1.5)
    assert ServeArguments.of({"model": "m", "max_length": "12", "num_gpus": 1}).max_length == 12
    for bad, message in (
        ({"model": "m", "batch_token": "64"}, "arguments: got unknown batch_token, expected model and any of"),
        ({}, "arguments: got no model"),
        ({"model": "m", "batch_tokens": "many"}, "batch_tokens: got 'many', expected int"),
        ({"model": "m", "normalize": "maybe"}, "normalize: got 'maybe', expected bool"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeArguments.of(bad)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that does not say what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastbert-engine\[ray\]'"):
        app({"model": "m"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not UTF-8"),
        (b"[]", "body: expected a JSON object, got an array"),
        (b"{}", "input: expected a value"),
        (b'{"input": []}', "input: expected at least one item"),
        (b'{"input": ["a", 1]}', r"input\[1\]: expected a string, got a number"),
        (b'{"input": ["a", "\\ud800"]}', r"input\[1\]: holds half of a UTF-16 pair"),
        (b'{"input": "a", "encoding_format": "int8"}', "encoding_format: expected one of float, base64"),
    ],
)
def test_mistakes_of_callers(body: bytes, message: str) -> None:
    """Catches a mistake of a caller that would fail in a batch, with the texts of others."""
    with pytest.raises(ApiError, match=message):
        read_request(body)
    assert read_request(b'{"input": "a"}') == (["a"], False)


def test_answers() -> None:
    """Catches another form than OpenAI's clients read, and bits that are lost."""
    vectors = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    texts = Texts(["a", "b"], 7, 1, 100)
    floats, encoded = (json.loads(dump_in_pieces(answer("m", vectors, texts, which))) for which in (False, True))
    assert floats["object"] == "list" and floats["model"] == "m"
    with pytest.raises(ApiError, match="NaN or infinity"):
        answer("m", vectors * np.float32("nan"), texts, False)
    assert floats["usage"] == {"prompt_tokens": 7, "total_tokens": 7} and floats["truncated"] == 1
    for i in range(2):
        assert floats["data"][i]["index"] == i and floats["data"][i]["object"] == "embedding"
        np.testing.assert_array_equal(np.array(floats["data"][i]["embedding"], np.float32), vectors[i])
        again = np.frombuffer(base64.b64decode(encoded["data"][i]["embedding"]), "<f4")
        np.testing.assert_array_equal(again, vectors[i])


def test_a_large_request_is_a_batch_by_itself() -> None:
    """Catches a request with more tokens than a batch may have, which Ray Serve would refuse."""
    assert tokens_in([Texts(["a"], 500, 0, 100)]) == 100
    assert tokens_in([Texts(["a"], 30, 0, 100), Texts(["b"], 50, 0, 100)]) == 80


class Request:
    """A Request stands for one of starlette."""

    def __init__(self, content: Any) -> None:
        self.content = content

    async def body(self) -> bytes:
        return json.dumps(self.content).encode()


def test_batches_are_counted_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches batches of more tokens than are allowed, requests that never share one, and vectors of another caller."""
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed; extra ray has it")
    replica_context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=1024))
    monkeypatch.setattr(serve, "get_replica_context", lambda: replica_context)
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(TEXTS * 3, 150)
    SentenceEncoder(BertModel(config), tokenizer).save_pretrained(tmp_path)
    arguments = ServeArguments(str(tmp_path), "float32", True, batch_tokens=60, wait_ms=20.0)
    replica, sizes = ray_serve.Embeddings(arguments), []
    encode = replica._encode
    monkeypatch.setattr(replica, "_encode", lambda items: sizes.append([i.n_tokens for i in items]) or encode(items))
    requests = [[TEXTS[i % len(TEXTS)], f"fish {i}"][: 1 + i % 2] for i in range(20)] + [TEXTS * 3]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(replica(Request({"input": texts})) for texts in requests), replica(Request(5)))

    *answers, refused = asyncio.run(ask())
    for texts, response in zip(requests, answers, strict=True):
        rows = [record["embedding"] for record in json.loads(response.body)["data"]]
        np.testing.assert_array_equal(np.array(rows, np.float32), replica.encoder.encode(texts))
    assert refused.status_code == 400 and json.loads(refused.body)["error"]["type"] == "invalid_request_error"
    assert all(sum(batch) <= 60 or len(batch) == 1 for batch in sizes) and max(map(len, sizes)) > 1
    assert sum(map(len, sizes)) == len(requests)
