"""Servers of embeddings are asked by 1, 8 and 64 callers: requests and tokens a second, and the time of an answer.

Usage: `python benchmarks/serve_load.py --model FOLDER [--seconds 10] [--server NAME=URL ...]`. It starts two servers,
one after the other: `fastbert serve`, and a plain one of sentence-transformers behind starlette, as tutorials show it.
Both answer OpenAI's `/v1/embeddings`, and so do text-embeddings-inference and infinity: start one yourself, and name it
with --server. Each request has one text, a docstring of Python's library. Answers are base64.

`encode` in the table is `SentenceEncoder.encode` in this process, a text at a time, without HTTP.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastbert.bench import texts  # noqa: E402

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
async def ready(request):
    return JSONResponse({})
app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/ready", ready)])
uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")
"""


@dataclass(frozen=True)
class Row:
    """A Row is what some callers saw of a server. seconds: of each answer."""

    server: str
    n_callers: int
    wall: float
    n_tokens: int
    seconds: list[float]

    def __str__(self) -> str:
        centiles = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [self.seconds[0]] * 99
        rates = f"{len(self.seconds) / self.wall:11.1f} {self.n_tokens / self.wall:9.0f}"
        return f"{self.server:24} {self.n_callers:7} {rates} {1000 * centiles[49]:8.1f} {1000 * centiles[98]:8.1f}"


HEAD = f"{'server':24} {'callers':>7} {'requests/s':>11} {'tokens/s':>9} {'p50 ms':>8} {'p99 ms':>8}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """Starts a server, and gives its address when it is ready."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:4]} did not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(name: str, url: str, model: str, inputs: list[tuple[str, int]], n_callers: int, seconds: float) -> Row:
    """Lets that many callers ask for that long, one request after the other each. inputs: texts and their tokens."""
    end = time.perf_counter() + seconds
    took: list[float] = []
    n_tokens: list[int] = []

    def call(seed: int) -> None:
        generator, address = random.Random(seed), urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        while time.perf_counter() < end:
            text, n = generator.choice(inputs)
            body = json.dumps({"model": model, "input": text, "encoding_format": "base64"})
            start = time.perf_counter()
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"{name}: {response.status} {answer[:200]!r}")
            took.append(time.perf_counter() - start)
            n_tokens.append(n)
        connection.close()

    start = time.perf_counter()
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(n_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Row(name, n_callers, time.perf_counter() - start, sum(n_tokens), took)


def alone(encode: Callable[[str], object], inputs: list[tuple[str, int]], seconds: float) -> Row:
    """Encodes a text at a time in this process."""
    generator, took, n_tokens = random.Random(0), [], 0
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        text, n = generator.choice(inputs)
        before = time.perf_counter()
        encode(text)
        took.append(time.perf_counter() - before)
        n_tokens += n
    return Row("encode", 1, time.perf_counter() - start, n_tokens, took)


def main() -> None:
    """Prints a row for each server and number of callers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL", help="one that runs already")
    options = parser.parse_args()

    from fastbert import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(options.model, device="cpu", dtype="float32")
    some = texts.spread(texts.docstrings(), options.texts)
    limit = encoder.max_seq_length
    inputs = [(t, len(encoder.tokenizer.encode_packed([t], max_length=limit, warn=False).input_ids)) for t in some]
    print(f"{len(inputs)} texts of {min(n for _, n in inputs)} to {max(n for _, n in inputs)} tokens")
    print(HEAD)
    print(alone(lambda text: encoder.encode(text, show_progress_bar=False), inputs, options.seconds), flush=True)
    ours, plain = free_port(), free_port()
    serve = [
        "-m",
        "fastbert",
        "serve",
        f"model={options.model}",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--drain",
        "0",
    ]
    starts = {
        "fastbert serve": ([sys.executable, *serve, "--port", str(ours)], ours),
        "sentence-transformers": ([sys.executable, "-c", PLAIN, options.model, str(plain)], plain),
    }
    for name, (command, port) in starts.items():
        with started(command, port) as url:
            _measure(name, url, inputs, options)
    for each in options.server:
        name, _, url = each.partition("=")
        _measure(name, url, inputs, options)


def _measure(name: str, url: str, inputs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    ask(name, url, "model", inputs, 2, min(options.seconds, 2.0))  # warm
    for n_callers in options.callers:
        print(ask(name, url, "model", inputs, n_callers, options.seconds), flush=True)


if __name__ == "__main__":
    main()
