"""This script measures the requests and tokens a second, and the latency, of embedding servers with 1 to 64 callers.

Usage: `python benchmarks/serve_load.py --model FOLDER [--seconds 10] [--latency] [--out FILE.json]`. It starts the
servers one after the other: `fastbert serve`, a plain one of sentence-transformers, and infinity and vLLM if they are
installed. These two need other versions than this project: `--python infinity=PATH/bin/python` names the environment of
one. `--server NAME=URL` names a server that runs already. text-embeddings-inference needs this option, because it is
built or comes as a container: no package registry of Python, npm or Debian has it.

Each request has one text, a docstring of Python's library. Answers are base64. `encode` in the table is
`SentenceEncoder.encode` in this process, a text at a time, without HTTP. `--latency` compares it, in turn, by the
length of texts, with one caller of `fastbert serve` and of two servers that show the cost of HTTP alone. "encode in
starlette" calls `encode` in the thread that reads the request, and "starlette" always answers the same vector.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import serve_rivals  # noqa: E402

from fastbert.bench import texts  # noqa: E402

Inputs = list[tuple[str, int]]  # texts and their tokens
LENGTHS = (8, 32, 128)  # tokens, of `--latency`
IN_TURN = 10  # texts that one side computes before the other side

SIDES = (serve_rivals.OURS, serve_rivals.INLINE, serve_rivals.BARE)  # beside encode, of `--latency`
HEAD = f"{'server':32} {'callers':>7} {'requests/s':>11} {'tokens/s':>9} {'p50 ms':>8} {'p99 ms':>8}"


@dataclass(frozen=True)
class Row:
    """A Row has the measurements of some callers of a server. seconds: of each answer."""

    server: str
    n_callers: int
    wall: float
    n_tokens: int
    seconds: list[float]

    def facts(self) -> dict[str, Any]:
        """Returns the values to keep."""
        return {
            "server": self.server,
            "callers": self.n_callers,
            "seconds": self.wall,
            "requests": len(self.seconds),
            "tokens": self.n_tokens,
            "requests_per_second": len(self.seconds) / self.wall,
            "tokens_per_second": self.n_tokens / self.wall,
            "p50_ms": 1000 * centile(self.seconds, 50),
            "p99_ms": 1000 * centile(self.seconds, 99),
        }

    def __str__(self) -> str:
        rates = f"{len(self.seconds) / self.wall:11.1f} {self.n_tokens / self.wall:9.0f}"
        times = f"{1000 * centile(self.seconds, 50):8.1f} {1000 * centile(self.seconds, 99):8.1f}"
        return f"{self.server:32} {self.n_callers:7} {rates} {times}"


def centile(seconds: list[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100)[percent - 1] if len(seconds) > 1 else seconds[0]


class Connection:
    """A Connection asks for vectors. It does little in Python: the client shares the processors with the server."""

    def __init__(self, name: str, url: str) -> None:
        address = urlsplit(url)
        self.name, self._host = name, address.netloc.encode()
        self._socket = socket.create_connection((address.hostname or "", address.port or 80), timeout=300)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, text: str) -> bytes:
        """Returns the answer to a request with one text. Raises RuntimeError for any status except 200."""
        body = json.dumps({"model": "model", "input": text, "encoding_format": "base64"}).encode()
        lines = (b"POST /v1/embeddings HTTP/1.1", b"Host: " + self._host, b"Content-Type: application/json")
        self._socket.sendall(b"\r\n".join((*lines, b"Content-Length: %d" % len(body), b"", body)))
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._read()
        head, _, answer = answer.partition(b"\r\n\r\n")
        status, *fields = head.lower().split(b"\r\n")
        length = next((int(each[15:]) for each in fields if each.startswith(b"content-length:")), None)
        if b" 200" not in status or length is None:
            raise RuntimeError(f"{self.name}: {head[:200]!r} {answer[:200]!r}")
        while len(answer) < length:
            answer += self._read()
        return answer

    def _read(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise RuntimeError(f"{self.name}: closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()


def ask(name: str, url: str, inputs: Inputs, n_callers: int, seconds: float) -> Row:
    """Lets so many callers send requests for so many seconds, one request after the other each."""
    end = time.perf_counter() + seconds
    took: list[float] = []
    n_tokens: list[int] = []

    def call(seed: int) -> None:
        generator, connection = random.Random(seed), Connection(name, url)
        while time.perf_counter() < end:
            text, n = generator.choice(inputs)
            start = time.perf_counter()
            connection.ask(text)
            took.append(time.perf_counter() - start)
            n_tokens.append(n)
        connection.close()

    start = time.perf_counter()
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(n_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not took:
        raise RuntimeError(f"{name}: no answer")
    return Row(name, n_callers, time.perf_counter() - start, sum(n_tokens), took)


def alone(encode: Callable[[str], object], inputs: Inputs, seconds: float) -> Row:
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


def in_turn(sides: list[Callable[[str], object]], some: list[str], seconds: float) -> list[list[float]]:
    """Returns the time of each side for the texts. The sides take turns with some texts each."""
    took: list[list[float]] = [[] for _ in sides]
    end, place = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        block = [some[(place + i) % len(some)] for i in range(IN_TURN)]
        place += IN_TURN
        for side, own in zip(sides, took, strict=True):
            side(block[-1])  # the caches hold the other side's data
            for text in block:
                start = time.perf_counter()
                side(text)
                own.append(time.perf_counter() - start)
    return took


def print_latency(
    encode: Callable[[str], object], urls: Mapping[str, str], inputs: Inputs, seconds: float
) -> list[dict[str, Any]]:
    """Prints the p25 and p50 of `encode` and of one caller of each server, for texts of some lengths and for all.

    Ratios are over `encode`. Returns the printed text.
    """
    connections = [Connection(name, url) for name, url in urls.items()]
    rows: list[dict[str, Any]] = []
    print(f"{'texts':18} {'side':22} {'p25 ms':>8} {'p50 ms':>8} {'ratio of p25':>13} {'of p50':>7}")
    nearest = {n: sorted(inputs, key=lambda pair: abs(pair[1] - n))[:20] for n in LENGTHS}
    for label, some in [*((f"about {n} tokens", own) for n, own in nearest.items()), ("all", inputs)]:
        sides = [encode, *(connection.ask for connection in connections)]
        took = in_turn(sides, [text for text, _ in some], seconds)
        p25, p50 = ([1000 * centile(own, percent) for own in took] for percent in (25, 50))
        for name, low, middle in zip(("encode", *urls), p25, p50, strict=True):
            row = {"texts": label, "side": name, "p25_ms": low, "p50_ms": middle}
            rows.append({**row, "ratio_of_p25": low / p25[0], "ratio_of_p50": middle / p50[0]})
            print(
                f"{label:18} {name:22} {low:8.2f} {middle:8.2f} {low / p25[0]:13.2f} {middle / p50[0]:7.2f}", flush=True
            )
    for connection in connections:
        connection.close()
    return rows


def main() -> None:
    """Prints a row for each server and number of callers, or the latencies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 8, 64])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--threads", type=int, help="of `encode` and of each server (default: all processors)")
    parser.add_argument("--latency", action="store_true", help="of one caller beside encode, and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, to which another run of the tool may add")
    parser.add_argument("--only", nargs="+", choices=serve_rivals.RIVALS, default=list(serve_rivals.RIVALS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON", help="where it is installed")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL", help="one that runs already")
    options = parser.parse_args()
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # PyTorch reads this when it is loaded

    from fastbert import SentenceEncoder

    logging.getLogger("fastbert").setLevel(logging.ERROR)  # longer texts are truncated, and encode reports each one
    encoder = SentenceEncoder.from_pretrained(options.model, device="cpu", dtype="float32")
    some = texts.spread(texts.docstrings(), options.texts)
    limit = encoder.max_seq_length
    inputs = [(t, len(encoder.tokenizer.encode_packed([t], max_length=limit, warn=False).input_ids)) for t in some]
    print(f"{len(inputs)} texts of {min(n for _, n in inputs)} to {max(n for _, n in inputs)} tokens")
    print(f"fastbert serve has {serve_rivals.what_uvicorn_takes()}")

    def encode(text: str) -> object:
        return encoder.encode(text, show_progress_bar=False)

    if options.latency:
        with ExitStack() as stack:
            urls = {name: stack.enter_context(serve_rivals.started(name, options.model)) for name in SIDES}
            latencies = print_latency(encode, urls, inputs, options.seconds)
        _save(options.out, "latency", latencies)
        return
    print(HEAD)
    rows = [alone(encode, inputs, options.seconds)]
    print(rows[0], flush=True)
    pythons = dict(each.split("=", 1) for each in options.python)
    for name in options.only:
        python = pythons.get(name, sys.executable)
        version = serve_rivals.version_of(python, *serve_rivals.KINDS[name].packages)
        if version is None and name != serve_rivals.OURS:
            print(f"{name:32} is not installed: --python {name}=PYTHON names where it is", flush=True)
            continue
        try:
            with serve_rivals.started(name, options.model, python) as url:
                rows += _measure(f"{name} {version or ''}".strip(), url, inputs, options)
        except RuntimeError as error:  # a failed rival does not stop the next one
            print(f"{name:32} {str(error).strip().splitlines()[-1]}", flush=True)
    for each in options.server:
        name, _, url = each.partition("=")
        rows += _measure(name, url, inputs, options)
    _save(options.out, "load", [row.facts() for row in rows])


def _measure(name: str, url: str, inputs: Inputs, options: argparse.Namespace) -> list[Row]:
    ask(name, url, inputs, 2, min(options.seconds, 2.0))  # warm-up
    rows = []
    for n_callers in options.callers:
        rows.append(ask(name, url, inputs, n_callers, options.seconds))
        print(rows[-1], flush=True)
    return rows


def _name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(map(row.get, ("server", "callers", "side", "texts")))


def _save(path: Path | None, part: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows and their machine into a part of a file. Rows of other servers or texts in the part stay."""
    if path is None:
        return
    import torch

    from fastbert.bench.results import environment

    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = set(map(_name_of, rows))
    others = [row for row in content.get(part, {}).get("rows", []) if _name_of(row) not in names]
    content[part] = {"environment": environment(torch.device("cpu")), "rows": others + rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
