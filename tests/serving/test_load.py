"""Many callers at once get the right answers, and the same bits where that was asked for; the figures agree.

FASTBERT_LOAD_REQUESTS is the number of requests, 600 where nothing is said; 10,000 take a few minutes, and say how long
an answer took: `FASTBERT_LOAD_REQUESTS=10000 pytest tests/serving/test_load.py -k 64_callers`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from fastbert.serving.limits import Limits
from load_cases import Callers, questions
from serving_cases import TEXTS, figure, loaders, save_models, served

N_REQUESTS = int(os.environ.get("FASTBERT_LOAD_REQUESTS", "600"))
N_CALLERS = 64
NAMES = ("encoder", "reranker", "classifier", "tagger")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


def resident_mib() -> float:
    """The memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_every_answer_of_64_callers_is_right(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an answer that is lost or another caller's, figures that do not agree with what was sent, and memory that
    creeps (infinity#517)."""
    with served(loaders(models, *NAMES)) as server:
        todo = list(questions(server.server.service, N_REQUESTS))
        callers = Callers(server.url, 2e-6)
        callers.ask(todo[: N_REQUESTS // 2], N_CALLERS, 600)
        before = resident_mib()
        again = Callers(server.url, 2e-6)
        again.ask(todo[N_REQUESTS // 2 :], N_CALLERS, 600)
        after = resident_mib()
        assert after < before + 64
        if "FASTBERT_LOAD_REQUESTS" in os.environ:
            p50, p99 = np.percentile(callers.seconds + again.seconds, [50, 99]) * 1000
            told = f"{N_REQUESTS} requests of {N_CALLERS} callers: p50 {p50:.0f} ms, p99 {p99:.0f} ms"
            with capsys.disabled():
                print(f"\n{told}; memory in the second half: {after - before:+.1f} MiB")

        page = httpx.get(f"{server.url}/metrics").text
        answered = callers.answered + again.answered
        for (route, status), n in answered.items():
            assert figure(page, "fastbert_requests_total", route=route, status=str(status)) == n
        assert figure(page, "fastbert_requests_total") == N_REQUESTS
        assert figure(page, "fastbert_request_seconds_count") == N_REQUESTS
        assert figure(page, "fastbert_texts_total") == callers.n_texts + again.n_texts
        assert figure(page, "fastbert_tokens_total") == figure(page, "fastbert_batch_tokens_sum")
        n_batches, n_texts = (figure(page, f"fastbert_batch_{name}") for name in ("tokens_count", "texts_total"))
        assert n_batches < n_texts / 2, "callers share no batches"
        for name in ("fastbert_queue_tokens", "fastbert_requests_in_flight"):
            assert figure(page, name) == 0


def test_batch_invariant_answers_have_the_same_bits_under_load(models: SimpleNamespace) -> None:
    """Catches a vector, or an order of a reranker (NeMo-Retriever#2439), that depends on who else called."""
    with served(loaders(models, *NAMES, batch_invariant=True), batch_invariant=True) as server:
        callers = Callers(server.url, 0.0)
        callers.ask(questions(server.server.service, N_REQUESTS // 2), N_CALLERS, 600)
        assert httpx.get(f"{server.url}/info").json()["batch_invariant"] is True


def test_a_full_queue_answers_all_with_success_or_429(models: SimpleNamespace) -> None:
    """Catches a queue without a bound, and a caller who is told neither to come back nor what was asked for."""
    limits = Limits(tokens=300, queue_tokens=300)
    with served(loaders(models, "encoder"), limits) as server:
        statuses: list[int] = []

        client = httpx.Client(base_url=server.url, timeout=60)

        def ask(inputs: object) -> None:
            response = client.post("/embed", json={"inputs": inputs})
            assert response.status_code == 200 or int(response.headers["Retry-After"]) >= 1
            statuses.append(response.status_code)

        threads = [threading.Thread(target=ask, args=(TEXTS if i % 2 else TEXTS[-1],)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        page = client.get("/metrics").text
        client.close()
        assert len(statuses) == 40 and set(statuses) <= {200, 429} and 200 in statuses
        assert figure(page, "fastbert_requests_total", status="429") == statuses.count(429)
        assert figure(page, "fastbert_queue_tokens") == 0
