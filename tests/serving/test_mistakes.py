"""A caller's mistake has a clear answer in OpenAI's form, and the server lives on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from fastbert import SentenceEncoder
from fastbert.serving.auth import Keys
from fastbert.serving.limits import Limits
from fastbert.serving.server import ServerThread
from fastbert.serving.service import Service, Settings
from serving_cases import TEXTS, client_of, error_of, figure, loaders, save_models, served, wait_until

SMALL = Limits(body_bytes=4000, texts=5, tokens=60, numbers=200, queue_tokens=80, body_seconds=0.3, seconds=20)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def service(models: SimpleNamespace) -> Service:
    return Service(loaders(models), Settings(SMALL))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service) as client:
        yield client


BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b'{"inputs": NaN}', 400, "invalid_json"),
    (b'{"inputs": ' + b"9" * 3900 + b"}", 400, "invalid_value"),
    (b"[" * 3000, 400, "invalid_json"),
    (b'{"inputs": "\xff"}', 400, "invalid_utf8"),
    (b'{"inputs": "\\ud800"}', 400, "invalid_value"),
    (b"[]", 400, "invalid_value"),
    (b'"text"', 400, "invalid_value"),
    (b"{}", 400, "missing_field"),
    (b'{"inputs": ' + b" " * 4000 + b"}", 413, "body_too_large"),
    (b'\xef\xbb\xbf{"inputs": "a"}', 400, "invalid_json"),
    ('{"inputs": "a"}'.encode("utf-16"), 400, "invalid_utf8"),
    (b'{"inputs": 1e999}', 400, "invalid_value"),
]


@pytest.mark.parametrize(
    ("body", "status", "code"), BODIES, ids=[code + str(i) for i, (_, _, code) in enumerate(BODIES)]
)
def test_bodies_that_are_no_request(client: TestClient, body: bytes, status: int, code: str) -> None:
    """Catches a body that ends in a 500, or in an answer that clients cannot read."""
    response = client.post("/embed", content=body, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (status, code), response.text
    assert client.post("/embed", json={"inputs": "fish"}).status_code == 200


VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("/embed", {"inputs": 3}, "inputs"),
    ("/embed", {"inputs": True}, "inputs"),
    ("/embed", {"inputs": []}, "inputs"),
    ("/embed", {"inputs": [[]]}, "inputs[0]"),
    ("/embed", {"inputs": [[["a"]]]}, "inputs[0]"),
    ("/embed", {"inputs": [[5], "a"]}, "inputs[1]"),
    ("/embed", {"inputs": [True]}, "inputs[0]"),
    ("/embed", {"inputs": [None]}, "inputs[0]"),
    ("/embed", {"inputs": {"text": "a"}}, "inputs"),
    ("/embed", {"inputs": ["a", 1]}, "inputs[1]"),
    ("/embed", {"inputs": ["a", ["b"]]}, "inputs[1]"),
    ("/embed", {"inputs": [1, 2.5]}, "inputs"),
    ("/embed", {"inputs": [1, -1]}, "inputs"),
    ("/embed", {"inputs": [[1], [10**30]]}, "inputs[1]"),
    ("/embed", {"inputs": "a", "normalize": "yes"}, "normalize"),
    ("/embed", {"inputs": "a", "truncate": 1}, "truncate"),
    ("/embed", {"inputs": "a", "truncation_direction": "up"}, "truncation_direction"),
    ("/embed", {"inputs": "a", "dimensions": 33}, "dimensions"),
    ("/embed", {"inputs": "a", "dimensions": 0}, "dimensions"),
    ("/embed", {"inputs": "a", "dimensions": 10**40}, "dimensions"),
    ("/embed", {"inputs": "a", "dimensions": 2.5}, "dimensions"),
    ("/embed", {"inputs": "a", "dimensions": True}, "dimensions"),
    ("/embed", {"inputs": "a", "prompt_name": "none"}, "prompt_name"),
    ("/v1/embeddings", {"input": "a"}, "model"),
    ("/v1/embeddings", {"input": "a", "model": 3}, "model"),
    ("/v1/embeddings", {"model": "encoder"}, "input"),
    ("/v1/embeddings", {"input": "a", "model": "encoder", "encoding_format": "int8"}, "encoding_format"),
    ("/similarity", {"inputs": "a"}, "inputs"),
    ("/similarity", {"inputs": {"source_sentence": "a"}}, "inputs.sentences"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": "b"}}, "inputs.sentences"),
    ("/rerank", {"query": "a", "texts": "b"}, "texts"),
    ("/rerank", {"texts": ["b"]}, "query"),
    ("/predict", {"inputs": ["a", "b", "c"]}, "inputs"),
    ("/predict", {"inputs": [["a"], []]}, "inputs[1]"),
    ("/predict", {"inputs": [["a", 1]]}, "inputs[0][1]"),
    ("/entities", {"inputs": "a", "parameters": {"aggregation_strategy": "best"}}, "parameters.aggregation_strategy"),
    ("/entities", {"inputs": "a", "parameters": []}, "parameters"),
    ("/predict", {"inputs": "a", "parameters": {"function_to_apply": "relu"}}, "parameters.function_to_apply"),
    ("/predict", {"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
    ("/tokenize", {"inputs": None}, "inputs"),
    ("/", {"texts": ["a"]}, "inputs"),
]


@pytest.mark.parametrize(("path", "body", "param"), VALUES, ids=lambda value: value if isinstance(value, str) else "")
def test_values_that_are_wrong(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    """Catches a wrong value that is taken, and an error that does not name its field."""
    response = client.post(path, json=body)
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and param in error["message"], error
    assert error["type"] == "invalid_request_error"


def test_limits(client: TestClient, service: Service) -> None:
    """Catches a request that takes more than its share, and one rule for a text and another for lists (TEI#662)."""
    for path, body, code in (
        ("/embed", {"inputs": ["a"] * 6}, "too_many_texts"),
        ("/embed", {"inputs": ["fish " * 30] * 2}, "too_many_tokens"),
        ("/entities", {"inputs": "fish " * 80}, "too_many_tokens"),
        ("/entities", {"inputs": " " * 970}, "too_many_tokens"),
        ("/tokenize", {"inputs": " " * 970}, "too_many_tokens"),
        ("/embed", {"inputs": [5] * 61}, "too_many_tokens"),
        ("/decode", {"ids": [[5] * 31] * 2}, "too_many_tokens"),
        ("/embed_all", {"inputs": "fish " * 20}, "answer_too_large"),
        ("/embed_sparse", {"inputs": ["fish and boats and a river"] * 5}, "answer_too_large"),
    ):
        response = client.post(path, json=body)
        assert (response.status_code, error_of(response)["code"]) == (413, code), response.text
        assert ("connection" in response.headers) is False, "all of its body was read"
    assert client.post("/embed", content=b" " * 4001, headers=JSON).headers["connection"] == "close"
    held = service.batchers["encoder"].reserve(79)
    for inputs in ("fish and boats", ["fish and boats"], ["fish", "boats"]):
        response = client.post("/embed", json={"inputs": inputs})
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
    held.future.cancel()
    held = service.batchers["encoder"].reserve(20)  # beside it there is room for all that a request may have
    assert client.post("/embed", json={"inputs": ["ж" * 80] * 5}).status_code == 200, "a guess of 200 tokens"
    held.future.cancel()
    for inputs in ("fish and boats", ["fish and boats"], ["fish", "boats"]):
        assert client.post("/embed", json={"inputs": inputs}).status_code == 200


def test_routes_and_forms_that_are_not_there(client: TestClient) -> None:
    """Catches an error of the framework, which clients cannot read."""
    for method, path, status in (("GET", "/none", 404), ("GET", "/embed", 405), ("POST", "/health", 405)):
        response = client.request(method, path)
        assert response.status_code == status and error_of(response)["type"] == "invalid_request_error"
    for headers in ({"Content-Type": "text/plain"}, {**JSON, "Content-Encoding": "gzip"}):
        response = client.post("/embed", content=b'{"inputs": "a"}', headers=headers)
        assert response.status_code == 415 and error_of(response)["code"] == "unsupported_media_type"


def test_requests_that_are_odd_and_right(client: TestClient) -> None:
    """Catches texts of any characters that are refused, and fields of other servers that are in the way."""
    expected = client.post("/embed", json={"inputs": "fish"}).json()
    for body in (
        b'{"inputs": "boats", "inputs": "fish"}',  # the last one counts, as in most readers of JSON
        b'{"inputs": "fish", "user": 3, "unknown": [{}], "truncate": null, "prompt_name": null}',
        b' \r\n\t{"inputs": "\\u0066ish"} ',
    ):
        assert client.post("/embed", content=body, headers=JSON).json() == expected
    for content_type in ("application/json; charset=utf-8", "Application/JSON"):
        response = client.post("/embed", content=b'{"inputs": "fish"}', headers={"Content-Type": content_type})
        assert response.json() == expected
    texts = ["", " ", "\u0000", "\ufeff", "물고기 🐟", "e\u0301" * 9]
    assert np.isfinite(client.post("/embed", json={"inputs": texts[:5]}).json()).all()
    assert client.post("/embed?model=", json={"inputs": texts[5]}).status_code == 200
    assert client.post("/embed?model=%ff", json={"inputs": "a"}).status_code == 404
    assert client.head("/v1/models").status_code == client.head("/health").status_code == 200
    for method in ("OPTIONS", "HEAD", "PUT", "TRACE"):
        response = client.request(method, "/embed")
        assert response.status_code == 405 and response.headers["allow"] == "POST"
    for id_, is_kept in (("mine-1", True), ("a b", False)):
        response = client.post("/embed", json={"inputs": "a"}, headers={"X-Request-Id": id_})
        assert (response.headers["x-request-id"] == id_) is is_kept


def test_other_ways_of_http(models: SimpleNamespace) -> None:
    """Catches requests that come before the last answer, old HTTP, and bodies in pieces, that are not answered."""
    body = b'{"inputs": "fish"}'
    post = head(len(body)) + body
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + pieces
    last = post.replace(b"Host: a", b"Host: a\r\nConnection: close")
    with served(loaders(models, "encoder")) as server:
        for data, n_answers in (
            (post * 3 + chunked + last, 5),
            (post.replace(b"HTTP/1.1", b"HTTP/1.0"), 1),
            (last.replace(b"Host: a", b"Host: a\r\nExpect: 100-continue"), 1),
        ):
            with send(server, data) as connection:
                answer = b"".join(iter(lambda: connection.recv(65536), b""))  # noqa: B023
            assert answer.count(b" 200 OK\r\n") == n_answers, answer
        with send(server, b"NONSENSE\r\n\r\n") as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_weights_that_make_nan(models: SimpleNamespace) -> None:
    """Catches an answer with NaN, which is no JSON, or a server that such a model brings down."""

    def load() -> SentenceEncoder:
        encoder = SentenceEncoder.from_pretrained(models.encoder, device="cpu", dtype="float32")
        with torch.no_grad():
            encoder.model.embeddings.word_embeddings.weight[encoder.tokenizer.get_vocab()["fish"]] = float("nan")
        return encoder

    with client_of(Service({"encoder": load})) as client:
        for _ in range(2):
            response = client.post("/v1/embeddings", json={"model": "encoder", "input": ["boats", "fish"]})
            assert response.status_code == 500 and error_of(response)["code"] == "not_finite"
            assert error_of(response)["type"] == "server_error"
            assert client.post("/embed", json={"inputs": "boats"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_an_exception_ends_nothing(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that answers nothing after one exception (infinity#242), and texts in what callers are told."""
    model = service.models["encoder"]
    compute = model._compute

    def failing(lane: Any, items: Any) -> Any:
        if any(item.n_tokens == 7 for item in items):
            raise RuntimeError("secret text")
        return compute(lane, items)

    monkeypatch.setattr(model, "_compute", failing)
    for _ in range(3):
        response = client.post("/embed", json={"inputs": [[5] * 5]})
        assert response.status_code == 500 and error_of(response)["code"] == "computation_failed"
        assert "secret" not in response.text
        assert client.post("/embed", json={"inputs": "fish"}).status_code == 200
    monkeypatch.setattr(model, "encode", lambda lane, texts: 1 // 0)  # a mistake of our own, outside any batch
    response = client.post("/embed", json={"inputs": "fish"})
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"


def test_keys(models: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a route that is open to everybody, and probes that ask for a key."""
    file = tmp_path / "keys"
    file.write_text("first\n\nsécond\n", encoding="utf-8")
    with client_of(Service(loaders(models, "encoder"), Settings(keys=Keys.read(file)))) as client:
        for path in ("/v1/models", "/info", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer first"}).status_code == 200
        for header in ("", "first", "Basic first", "Bearer firs", "Bearer ", "Bearer first second"):
            response = client.post("/embed", json={"inputs": "a"}, headers={"Authorization": header})
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    file.write_bytes("\ufeffone\r\nsécond\r\n".encode())  # as some editors write it
    with client_of(Service({}, Settings(keys=Keys.read(file)))) as client:
        for key in ("one", "sécond"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
    file.write_text("\n")
    with pytest.raises(ValueError, match="expected an API key"):
        Keys.read(file)
    monkeypatch.setenv("FASTBERT_API_KEY", "by variable")
    assert Keys.read().allow("Bearer by variable") and not Keys.read().allow("Bearer first")
    monkeypatch.delenv("FASTBERT_API_KEY")
    assert not Keys.read()


def send(server: ServerThread, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def head(length: int) -> bytes:
    lines = ("POST /embed HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}", "", "")
    return "\r\n".join(lines).encode()


def test_slow_and_vanishing_clients(models: SimpleNamespace) -> None:
    """Catches a slow client that holds a place for ever, and texts that are computed for one who has gone."""
    with served(loaders(models, "encoder"), SMALL) as server:
        service = server.server.service
        batcher, model = service.batchers["encoder"], service.models["encoder"]
        slow = send(server, head(100) + b'{"inputs"')
        assert b" 408 " in slow.recv(65536).split(b"\r\n")[0]
        chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1388\r\n" + b" " * 5000
        large = send(server, chunked + b"\r\n")
        assert b" 413 " in large.recv(65536).split(b"\r\n")[0]

        gate, entered, computed = threading.Event(), threading.Event(), []
        compute = model._compute

        def waiting(lane: Any, items: Any) -> Any:
            entered.set()
            assert gate.wait(20)
            computed.append(len(items))
            return compute(lane, items)

        model._compute = waiting  # type: ignore[method-assign]
        body = json.dumps({"inputs": TEXTS[0]}).encode()
        first = send(server, head(len(body)) + body)
        assert entered.wait(20)
        others = [send(server, head(len(body)) + body) for _ in range(3)]
        n_tokens = len(model.tokenizer.encode_packed(TEXTS[:1]).input_ids)
        wait_until(lambda: batcher.n_tokens == 4 * n_tokens)
        for gone in others[:2]:
            gone.close()
        wait_until(lambda: batcher.n_tokens == 2 * n_tokens)
        gate.set()
        for stays in (first, others[2]):
            assert stays.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert computed == [1, 1]
        page = service.metrics.page().decode()
        assert figure(page, "fastbert_requests_total", status="499") == 2
        for connection in (slow, large, first, others[2]):
            connection.close()


def test_no_answer_in_time(models: SimpleNamespace) -> None:
    """Catches a caller who waits for ever."""
    limits = Limits(seconds=0.2)
    with client_of(Service(loaders(models, "encoder"), Settings(limits))) as client:
        model = client.app.state.service.models["encoder"]  # type: ignore[attr-defined]
        compute = model._compute
        model._compute = lambda lane, items: time.sleep(0.6) or compute(lane, items)
        response = client.post("/embed", json={"inputs": "fish"})
        assert response.status_code == 504 and error_of(response)["code"] == "timeout"
        model._compute = compute
        wait_until(lambda: client.post("/embed", json={"inputs": "fish"}).status_code == 200)
        assert np.isfinite(client.post("/embed", json={"inputs": "fish"}).json()).all()
