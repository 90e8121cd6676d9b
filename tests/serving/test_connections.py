"""A connection takes no more of the server than its share: slow clients are told so, or cut off."""

from __future__ import annotations

import json
import socket
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fastbert.serving.connection import HEAD_BYTES
from fastbert.serving.limits import Limits
from fastbert.serving.server import ServerThread
from serving_cases import loaders, save_models, served, wait_until

SECONDS = 0.4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    models: SimpleNamespace = save_models(tmp_path_factory.mktemp("models"))
    with served(loaders(models, "encoder"), Limits(body_seconds=SECONDS)) as server:
        yield server


def connect(server: ServerThread) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_to(server: ServerThread, *parts: bytes) -> tuple[int, str]:
    """The status and the code of the error to bytes that come in parts, after which the connection is closed."""
    with connect(server) as connection:
        for part in parts:
            time.sleep(0.02)
            connection.sendall(part)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return int(head.rpartition(b"HTTP/1.1 ")[2].split()[0]), error["code"]


def test_what_is_no_http(server: ServerThread) -> None:
    """Catches an error in another form than that of all others, and a server that such bytes bring down."""
    head = b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    for data in (
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /health\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        head + b"Content-Length: -5\r\n\r\n{}",
        head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ):
        assert answer_to(server, data) == (400, "invalid_http")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_slow_and_large_heads(server: ServerThread) -> None:
    """Catches a client that holds a connection for ever with half a head, or fills the memory with its headers."""
    request = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    assert answer_to(server, request[:20], request[20:25]) == (408, "headers_timeout")
    assert answer_to(server, request, request[:20]) == (408, "headers_timeout"), "also after a request"
    lines = [b"X: " + b"a" * 8000 + b"\r\n"] * 9
    assert sum(map(len, lines)) > HEAD_BYTES
    assert answer_to(server, request[:-2], *lines) == (431, "headers_too_large")
    with connect(server) as silent:
        assert silent.recv(100) == b"", "closed, as nothing was asked"
    with connect(server) as patient:
        for part in (request[:20], request[20:], request):
            time.sleep(SECONDS / 3)
            patient.sendall(part)
        time.sleep(SECONDS * 1.5)  # between two requests a connection may wait longer
        patient.sendall(request)
        answer = b""
        while answer.count(b"200 OK") < 3:
            data = patient.recv(65536)
            assert data, answer
            answer += data


def test_an_answer_that_nobody_reads(server: ServerThread) -> None:
    """Catches answers that stay in memory for ever, for a client who does not read them."""
    connections = server.server.server_state.connections
    request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wait_until(lambda: len(connections) == 1)
        connection.setblocking(False)
        sent = connection.send(request * 2000)  # 20 MB of answers, more than sockets hold
        assert sent > 500 * len(request)
        wait_until(lambda: len(connections) == 0)
    assert httpx.get(f"{server.url}/health").status_code == 200
