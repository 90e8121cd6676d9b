"""`fastbert serve` is a process: it says when it is ready, stops when told to, and keeps texts out of its log."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fastbert.cli.main import main
from fastbert.cli.serve import _name_and_source
from fastbert.serving.app import make_app
from fastbert.serving.server import Server, ServerThread, run
from fastbert.serving.service import Service
from helpers import source_env
from serving_cases import loaders, save_models, wait_until

SECRET = "fish and boats and a secret"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


# Loads as if it were downloading: in a thread that Python waits for at its end.
SLOW = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from fastbert.cli import models
from fastbert.cli.main import main
models.load_served = lambda *args: ThreadPoolExecutor().submit(time.sleep, 600).result()
sys.exit(main(sys.argv[1:]))
"""


class Process:
    """A Process is `fastbert serve` on a free port, with the lines of its log so far."""

    def __init__(self, *args: str, program: str = "", **env: str) -> None:
        self.lines: list[dict[str, Any]] = []
        start = ["-c", program] if program else ["-m", "fastbert"]
        self.process = subprocess.Popen(
            [sys.executable, *start, "serve", *args, "--device", "cpu", "--port", "0"],
            env=source_env(**env), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": line})

    def event(self, name: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["event"] == name), None)

    def url(self) -> str:
        wait_until(lambda: self.event("listening") is not None, 120)
        line = self.event("listening")
        assert line is not None
        return f"http://{line['host']}:{line['port']}"

    def listens(self) -> bool:
        try:
            httpx.get(f"{self.url()}/health")
        except httpx.ConnectError:
            return False
        return True

    def wait(self) -> int:
        """Waits for the end of the process and of its log, and returns its exit code."""
        code = self.process.wait(120)
        self._reader.join(30)
        return code


@contextmanager
def process(*args: str, **env: str) -> Iterator[Process]:
    one = Process(*args, **env)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait(30)


def test_a_stop_under_load_leaves_no_request_unanswered(models: SimpleNamespace) -> None:
    """Catches an accepted request without an answer, readiness that stays true while it drains, a key that nobody
    asks for, threads counted by the host (TEI#404, vLLM#45124), and a log that holds a text or is no JSON."""
    names = [f"{name}={getattr(models, name)}" for name in ("encoder", "reranker")]
    options = ("--drain", "6", "--batch-invariant", "--max-length", "30", "--threads", "2", "--dtype", "float32")
    with process(*names, *options, FASTBERT_API_KEY="key") as server:
        client = httpx.Client(base_url=server.url(), timeout=60, headers={"Authorization": "Bearer key"})
        assert client.get("/health").status_code == 200, "alive before it is ready"
        wait_until(lambda: client.get("/ready").status_code == 200, 120)
        assert httpx.get(f"{client.base_url}/info").status_code == 401
        info = client.get("/info").json()
        assert info["batch_invariant"] and info["max_input_length"] == 30 and info["models"] == ["encoder", "reranker"]

        statuses: list[int] = []
        stopped: list[str] = []

        def ask() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60, headers=client.headers) as own:
                while True:
                    try:
                        response = own.post("/embed", json={"inputs": [SECRET] * 20})
                    except httpx.ConnectError:  # nobody listens any more
                        return
                    except (httpx.ReadError, httpx.RemoteProtocolError) as error:
                        # The connection was closed before the server read a request: by a reset, or in good order.
                        signs = f"[Errno {errno.ECONNRESET}]", "Server disconnected without sending a response"
                        was_closed = any(sign in str(error) for sign in signs)
                        stopped.append("" if was_closed and not server.listens() else repr(error))
                        return
                    except httpx.HTTPError as error:
                        stopped.append(repr(error))
                        return
                    statuses.append(response.status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(statuses) > 8, 60)
        assert client.get("/info").json()["threads"] == 2
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json() == {"status": "draining"} and client.get("/health").status_code == 200
        assert server.wait() == 0
        for thread in threads:
            thread.join(60)
        assert set(statuses) == {200} and not any(stopped), stopped
        requests = [line for line in server.lines if line["event"] == "request" and line["route"] == "/embed"]
        assert len(requests) == len(statuses)
        assert {(line["status"], line["texts"], line["model"]) for line in requests} == {(200, 20, "encoder")}
        assert all("time" in line and "level" in line for line in server.lines), "a line that is no JSON"
        assert "secret" not in str(server.lines) and "key" not in {str(value) for value in requests[0].values()}
        client.close()


def test_a_model_that_cannot_be_loaded_ends_the_process(models: SimpleNamespace, tmp_path: Path) -> None:
    """Catches a server that stays up without its model, and a wrong option that is found out too late."""
    with process(str(tmp_path)) as server:
        assert server.wait() == 1
        assert server.lines[-1]["event"].startswith("fastbert: error: "), server.lines
    for arguments in (
        [models.encoder, models.encoder],
        [models.encoder, "--api-key-file", str(tmp_path / "none")],
        [models.encoder, "--timeout", "-1"],
    ):
        assert main(["serve", *arguments, "--device", "cpu"]) == 1


def test_a_stop_while_a_model_is_loaded() -> None:
    """Catches a process that SIGTERM, or Ctrl-C, ends only when its models are there, after minutes perhaps."""
    with process("a", "b", program=SLOW) as server:
        url = server.url()
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").json() == {"status": "starting"}
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - started < 10, server.lines
    for sign in (signal.SIGTERM, signal.SIGINT):
        service = Service({})
        ours = Server(service, "127.0.0.1", 0, drain_seconds=60.0)
        loop: Any = SimpleNamespace(call_soon_threadsafe=lambda f, *args: f(*args))
        ours._loop = loop
        ours.handle_exit(sign, None)
        assert ours.should_exit and service.abandoned, "nobody has to be told that it is ready no longer"


def test_a_stop_between_two_models() -> None:
    """Catches a thread that goes on to load models after the stop, and a stop that is taken for a failure."""
    loaded, may_load = [], threading.Event()

    def load() -> Any:
        loaded.append(1)
        assert may_load.wait(60)
        raise OSError("nobody waits for it any more")

    service = Service({"first": load, "second": load})
    server = ServerThread(service)
    server._thread.start()
    wait_until(lambda: bool(loaded))
    server.stop()
    may_load.set()
    wait_until(lambda: not any(worker.alive for worker in service._workers))
    assert service.state == "draining" and service.error is None and len(loaded) == 1


def test_ready_and_health_are_two_things(models: SimpleNamespace) -> None:
    """Catches health that is mixed with readiness (TGI#3241), and a request that fails otherwise before it is ready."""
    from starlette.testclient import TestClient

    may_load = threading.Event()

    def load() -> Any:
        assert may_load.wait(60)
        return loaders(models)["encoder"]()

    service = Service({"encoder": load})
    with TestClient(make_app(service)) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503 and client.get("/ready").json() == {"status": "starting"}
        early = client.post("/embed", json={"inputs": "a"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "not_ready"
        assert early.headers["Retry-After"] == "1" and "fastbert_ready 0.0" in client.get("/metrics").text
        may_load.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/embed", json={"inputs": "a"}).status_code == 200
        service.drain()
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        late = client.post("/embed", json={"inputs": "a"})
        assert late.status_code == 200 and late.headers["Connection"] == "close"
    assert not service.alive, "the threads have ended"


def test_a_server_that_cannot_start_says_why(models: SimpleNamespace) -> None:
    """Catches a thread that waits for ever for a model that cannot be loaded."""
    with pytest.raises(RuntimeError, match="did not start") as error, ServerThread(Service({"none": lambda: 1 // 0})):
        pass
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_address_that_cannot_be_had() -> None:
    """Catches a taken port that is found out after minutes, when the models are loaded, and one that ends nothing."""
    loaded: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("127.0.0.1", 99999), ("nowhere.invalid", 0)):
            with pytest.raises(OSError, match=f"cannot listen on {host}:{port}"):
                run(Service({"model": lambda: loaded.append("model")}), host, port)
    assert not loaded


def test_a_second_signal_ends_the_draining() -> None:
    """Catches a server that cannot be stopped while it drains, and one that SIGTERM stops without an answer."""
    service = Service({})
    service.state = "ready"
    delays: list[tuple[Any, ...]] = []
    ours = Server(service, "127.0.0.1", 0, drain_seconds=60.0)
    loop: Any = SimpleNamespace(call_soon_threadsafe=lambda f, *args: f(*args))
    loop.call_later = lambda *args: delays.append(args)
    ours._loop = loop
    ours.handle_exit(signal.SIGTERM, None)
    assert service.state == "draining" and not ours.should_exit and delays == [(60.0, ours.stop)]
    for _ in range(2):
        ours.handle_exit(signal.SIGTERM, None)
        assert ours.should_exit and not ours.force_exit and len(delays) == 1
    ours.handle_exit(signal.SIGINT, None)
    assert ours.force_exit, "who is in such a hurry waits for nobody"


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that callers cannot name, and a folder with an equals sign that is taken for a name."""
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _name_and_source("owner/model") == ("owner/model", "owner/model")
    assert _name_and_source("short=owner/model") == ("short", "owner/model")
    assert _name_and_source("a=b") == ("a=b", "a=b")
    assert _name_and_source(f"{tmp_path}{os.sep}") == (tmp_path.name, f"{tmp_path}{os.sep}")
