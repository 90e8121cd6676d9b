"""The load tool asks servers as their clients do, and says which server and version it asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.serving.server import ServerThread
from serving_cases import TEXTS, loaders, numbers, save_models, served

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import serve_load  # noqa: E402
import serve_rivals  # noqa: E402

INPUTS = [(text, len(text.split()) + 2) for text in TEXTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    models = save_models(tmp_path_factory.mktemp("models"))
    with served({"model": loaders(models)["encoder"]}) as server:
        yield server


def test_callers_ask_and_are_counted(server: ServerThread) -> None:
    """Catches answers that are cut off, callers that do not ask, and tokens or times of other requests."""
    connection, encoder = serve_load.Connection("ours", server.url), server.server.service.models["model"].model
    answer = json.loads(connection.ask(TEXTS[0]))
    expected = encoder.encode(TEXTS[0], normalize_embeddings=True)
    np.testing.assert_allclose(numbers(answer["data"][0]["embedding"]), expected, atol=2e-6)
    connection.close()
    row = serve_load.ask("ours", server.url, INPUTS, 3, 0.2)
    assert row.n_callers == 3 and len(row.seconds) >= 3 and 3 * len(row.seconds) <= row.n_tokens and "ours" in str(row)
    assert len(str(row)) == len(serve_load.HEAD)
    with pytest.raises(RuntimeError, match="ours: .*400"):
        serve_load.Connection("ours", server.url).ask("\ud800")


def test_latency_is_measured_in_turn(server: ServerThread, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a comparison of two sides that did not have the same texts, one that ran while the other did, and a part
    of the results that a later one takes away."""
    order: list[tuple[str, str]] = []
    sides: Any = [lambda text: order.append(("encode", text)), lambda text: order.append(("ask", text))]
    ours, theirs = serve_load.in_turn(sides, list("abc"), 0.01)
    assert len(ours) == len(theirs) > 0 and len(ours) % serve_load.IN_TURN == 0
    block = serve_load.IN_TURN + 1
    assert [side for side, _ in order[: 2 * block]] == ["encode"] * block + ["ask"] * block
    assert [text for _, text in order[:block]] == [text for _, text in order[block : 2 * block]]
    rows = serve_load.print_latency(len, {"ours": server.url, "again": server.url}, INPUTS, 0.05)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) == 1 + 3 * (1 + len(serve_load.LENGTHS)) and "ratio" in lines[0]
    assert [row["side"] for row in rows[:3]] == ["encode", "ours", "again"] and rows[0]["ratio_of_p50"] == 1
    assert lines[1].startswith("about 8 tokens") and rows[-1]["texts"] == "all"
    file = tmp_path / "new" / "serve.json"
    serve_load._save(file, "latency", rows)
    serve_load._save(file, "load", [serve_load.Row("ours", 1, 2.0, 30, [0.1] * 4).facts()])
    kept = json.loads(file.read_text())
    assert kept["latency"]["rows"] == rows and kept["load"]["rows"][0]["requests_per_second"] == 2
    serve_load._save(file, "latency", rows[:1])
    assert sorted(map(str, json.loads(file.read_text())["latency"]["rows"])) == sorted(map(str, rows))
    assert "threads" in kept["load"]["environment"]


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """Catches a rival without its version, and one that cannot start and leaves no word of the reason."""
    assert serve_rivals.version_of(sys.executable, "not-there", "numpy") == np.__version__
    assert serve_rivals.version_of(sys.executable, "not-there") is None
    starting = serve_rivals.started(serve_rivals.OURS, str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="(?s)fastbert serve did not start: .*no such folder"), starting:
        pass
