"""`fastbert embed` reads from object storage and writes to it, alone and on a Ray cluster that loses a node.

The store is moto's server on this machine, which speaks as S3 does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder
from fastbert.cli.main import main
from fastbert.pipelines.bulk import EMBEDDING, BulkJob
from fastbert.serving import ray_embed
from fastbert.text import blocks, storage
from helpers import tiny_bert
from ray_cases import two_nodes
from sentence_cases import TEXTS

pyarrow = pytest.importorskip("pyarrow", reason="URLs need pyarrow; extra ray has it")
parquet = pytest.importorskip("pyarrow.parquet", reason="URLs need pyarrow; extra ray has it")
moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed: it stands for an object store")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed; moto[server] brings it")

MANY = [f"{text} {i}" for i in range(12) for text in [*TEXTS, "강물이 넓다"]]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(MANY))


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A client of a store with an empty bucket, to which the environment leads, as docs/many-devices.md says."""
    with pytest.MonkeyPatch.context() as patch:
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        server.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(MANY, 250)
    folder = tmp_path_factory.mktemp("model")
    SentenceEncoder(BertModel(config), tokenizer).save_pretrained(folder)
    loading = {"batch_invariant": True, "dtype": "float32"}
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu", **loading)
    return SimpleNamespace(folder=str(folder), loading=loading, vectors=encoder.encode(MANY))


def put(store: Any, key: str, content: bytes) -> str:
    store.put_object(Bucket="bucket", Key=key, Body=content)
    return f"s3://bucket/{key}"


def get(store: Any, key: str) -> bytes:
    return store.get_object(Bucket="bucket", Key=key)["Body"].read()


def embed(source: str, target: str, model: SimpleNamespace, *options: str) -> int:
    options = ("--model", model.folder, "--dtype", "float32", *options)
    return main(["embed", source, target, "--device", "cpu", *options])


def check_lines(content: bytes, model: SimpleNamespace, tolerance: float) -> None:
    records = [json.loads(line) for line in content.splitlines()]
    assert [record["text"] for record in records] == MANY
    vectors = np.array([record["embedding"] for record in records], np.float32)
    np.testing.assert_allclose(vectors, model.vectors, atol=tolerance)


def test_lines_in_a_store(store: Any, model: SimpleNamespace) -> None:
    """Catches lines that cannot be read under a URL, an output that nobody can resume, and one that is written over."""
    source = put(store, "in/a.jsonl", LINES.encode())
    put(store, "in/_SUCCESS", b"")
    assert embed("s3://bucket/in", "s3://bucket/lines", model) == 0
    check_lines(get(store, "lines/part-000000.jsonl"), model, 2e-6)
    assert json.loads(get(store, "lines/manifest.json"))["complete"] is True
    assert embed("s3://bucket/in", "s3://bucket/lines", model) == 1, "holds a finished output"

    store.delete_object(Bucket="bucket", Key="lines/part-000000.jsonl")
    assert embed("s3://bucket/in", "s3://bucket/lines", model, "--resume") == 0
    check_lines(get(store, "lines/part-000000.jsonl"), model, 2e-6)
    put(store, "in/a.jsonl", LINES.encode() + b'{"text": "one more"}\n')
    assert embed(source, "s3://bucket/lines", model, "--resume") == 1, "the input has changed"
    assert embed("s3://bucket/none", "s3://bucket/other", model) == 1


def test_parquet_in_a_store(store: Any, model: SimpleNamespace, tmp_path: Path) -> None:
    """Catches rows of a Parquet file that are lost between a store and a disk, and columns that are left behind."""
    table = pyarrow.table({"id": range(len(MANY)), "text": MANY})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=16)
    source = put(store, "rows/in.parquet", (tmp_path / "in.parquet").read_bytes())
    for target in ("s3://bucket/deep/vectors/", str(tmp_path / "vectors")):
        assert embed(source, target, model) == 0
    stored = parquet.read_table(io.BytesIO(get(store, "deep/vectors/part-000000.parquet")))
    assert stored.equals(parquet.read_table(tmp_path / "vectors" / "part-000000.parquet"))
    assert stored.column("text").to_pylist() == MANY and stored.column("id").to_pylist() == list(range(len(MANY)))
    np.testing.assert_allclose(np.array(stored.column(EMBEDDING).to_pylist()), model.vectors, atol=2e-6)


@pytest.mark.slow
def test_a_lost_node_loses_no_row_of_a_store(store: Any, model: SimpleNamespace) -> None:
    """Catches rows that are lost or doubled where a node of two is killed half-way, and nodes that cannot reach the
    store."""
    source = put(store, "many/in.jsonl", LINES.encode())
    plan = blocks.plan([source], block_bytes=300)
    job = BulkJob(blocks.Parts("s3://bucket/of-ray", "jsonl", len(plan)), "text")
    job.parts.begin(resume=False)
    places: list[int] = []
    with two_nodes() as cluster:
        other = next(node for node in cluster.list_all_nodes() if not node.head)

        def kill(record: dict[str, Any]) -> None:
            places.append(record["index"])
            if len(places) == 3:
                cluster.remove_node(other, allow_graceful=False)

        counts = ray_embed.embed_blocks("", model.folder, model.loading, None, job, plan, None, 1, kill)
        assert len(cluster.list_all_nodes()) == 1
    job.parts.finish()
    assert len(plan) > 10 and sorted(places) == list(range(len(plan))) and counts.texts == len(MANY)
    assert storage.names_in(job.parts.folder) == {f"part-{i:06}.jsonl" for i in range(len(plan))} | {blocks.MANIFEST}
    content = b"".join(get(store, f"of-ray/part-{i:06}.jsonl") for i in range(len(plan)))
    check_lines(content, model, 0.0)
