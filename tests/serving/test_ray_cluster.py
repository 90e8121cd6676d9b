"""A Ray cluster encodes blocks, where an actor that is killed loses no row and doubles none, and serves vectors."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder
from fastbert.pipelines.bulk import BulkJob
from fastbert.serving import ray_embed, ray_serve
from fastbert.serving.ray_embed import Resources, resources_of
from fastbert.text import blocks
from helpers import tiny_bert
from ray_cases import two_nodes
from sentence_cases import TEXTS

MANY = [f"{text} {i}" for i in range(12) for text in TEXTS]
NODE = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}
CPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0}}
DEAD = {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}


@pytest.mark.parametrize(
    ("nodes", "n_actors", "expected"),
    [
        ([NODE, NODE, CPU_NODE, DEAD], None, Resources(8, 1, 1)),
        ([NODE], 2, Resources(2, 1, 1)),
        ([NODE], 9, Resources(4, 1, 1)),
        ([CPU_NODE, CPU_NODE, DEAD], None, Resources(2, 8, 0)),
        ([CPU_NODE, CPU_NODE], 4, Resources(4, 4, 0)),
        ([{"Alive": True, "Resources": {"CPU": 1.0}}], 3, Resources(3, 1, 0)),
    ],
)
def test_resources(nodes: list[Any], n_actors: int | None, expected: Resources) -> None:
    """Catches a GPU without a model or with two, and actors that wait for processors for ever."""
    assert resources_of(nodes, n_actors) == expected


def test_a_cluster_without_processors() -> None:
    """Catches actors that are asked of nodes that are gone."""
    with pytest.raises(RuntimeError, match="no node with a processor"):
        resources_of([DEAD], None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster with two nodes on this machine, a processor each."""
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(TEXTS * 3, 150)
    folder = tmp_path_factory.mktemp("model")
    SentenceEncoder(BertModel(config), tokenizer).save_pretrained(folder)
    loading = {"batch_invariant": True, "dtype": "float32"}
    return SimpleNamespace(
        folder=str(folder), loading=loading, encoder=SentenceEncoder.from_pretrained(folder, device="cpu", **loading)
    )


def plan_of(path: Path, texts: list[str], size: int) -> list[blocks.Block]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return blocks.plan([str(path)], block_bytes=size)


@pytest.mark.slow
def test_a_killed_actor_loses_no_row(cluster: Any, model: SimpleNamespace, tmp_path: Path) -> None:
    """Catches rows that are lost or doubled where an actor is killed, blocks that are made again though they are done,
    and a node without work."""
    plan = plan_of(tmp_path / "in.jsonl", MANY, 300)
    job = BulkJob(blocks.Parts(str(tmp_path / "out"), "jsonl", len(plan)), "text")
    job.parts.begin(resume=False)
    first, records = plan[0], []
    Path(job.parts.path(first.index)).write_text("done before\n")
    killed: list[int] = []

    def kill(record: dict[str, Any]) -> None:
        records.append(record)
        if not killed:
            killed.append(record["process"])
            os.kill(record["process"], signal.SIGKILL)

    counts = ray_embed.embed_blocks("", model.folder, model.loading, None, job, plan[1:], None, 1, kill)
    job.parts.finish()
    assert Path(job.parts.path(first.index)).read_text() == "done before\n"
    lines = [line for block in plan[1:] for line in Path(job.parts.path(block.index)).read_text().splitlines()]
    texts = [text for block in plan[1:] for text in blocks.read_lines(block, "text")]
    assert len(texts) > 80 and [json.loads(line)["text"] for line in lines] == texts
    vectors = np.array([json.loads(line)["embedding"] for line in lines], np.float32)
    np.testing.assert_array_equal(vectors, model.encoder.encode(texts))
    assert counts.texts == len(texts) and sorted(record["index"] for record in records) == list(range(1, len(plan)))
    processes = {record["process"] for record in records}
    assert len(processes) >= 2 and killed[0] in processes


@pytest.mark.slow
def test_an_error_in_a_block_names_its_place(cluster: Any, model: SimpleNamespace, tmp_path: Path) -> None:
    """Catches an error that comes wrapped in Ray's, or is tried for ever, and blocks that are lost with it."""
    plan = plan_of(tmp_path / "in.jsonl", [*MANY[:20], "x"], 400)
    with open(plan[0].path, "a") as file:
        file.write("not JSON\n")
    plan = blocks.plan([plan[0].path], block_bytes=400)
    job = BulkJob(blocks.Parts(str(tmp_path / "out"), "npy", len(plan)), "text")
    job.parts.begin(resume=False)
    with pytest.raises(ValueError, match=r"in\.jsonl, line at byte \d+: not JSON"):
        ray_embed.embed_blocks("", model.folder, model.loading, None, job, plan, 1, 1)
    assert len(plan) - 1 not in job.parts.done()


@pytest.mark.slow
def test_a_served_model(cluster: Any, model: SimpleNamespace) -> None:
    """Catches an application that Ray Serve cannot start, and answers that depend on who else called."""
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed; extra ray has it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"model": model.folder, "dtype": "float32", "batch_invariant": "true", "batch_tokens": "80"}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(ray_serve.app(arguments))

        def ask(i: int) -> tuple[int, Any]:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/", json.dumps({"input": MANY[i : i + 5]}).encode()
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                return i, json.load(response)

        with ThreadPoolExecutor(8) as threads:
            for i, content in threads.map(ask, range(24)):
                vectors = np.array([record["embedding"] for record in content["data"]], np.float32)
                np.testing.assert_array_equal(vectors, model.encoder.encode(MANY[i : i + 5]))
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", b"{", timeout=60)
        assert caught.value.code == 400 and "not JSON" in json.load(caught.value)["error"]["message"]
    finally:
        serve.shutdown()
