"""The subcommands search, rerank and verify print what the library gives."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cli_cases import TEXTS, fails
from fastbert import (
    BertForSequenceClassification,
    BertModel,
    CrossEncoder,
    SentenceEncoder,
    semantic_search,
)
from fastbert.cli.main import main
from fastbert.pipelines.modules import Normalize
from helpers import tiny_bert

QUERIES = ["which river?", "boats"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders with tiny random models: sentence encoder, cross-encoders, a plain model without a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    texts = [*TEXTS, *QUERIES, "query: document: boats"] * 3
    config, tokenizer = tiny_bert(texts, 100, num_hidden_layers=1, max_position_embeddings=24)
    prompts = {"query": "query: ", "document": "document: "}
    SentenceEncoder(BertModel(config), tokenizer, "mean", [Normalize()], prompts=prompts).save_pretrained(
        folder / "sentence"
    )
    for name, labels in (("cross", 1), ("three", 3)):
        config.id2label = {i: str(i) for i in range(labels)}
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    BertModel(config).save_pretrained(folder / "plain")
    return SimpleNamespace(**{path.name: str(path) for path in folder.iterdir()})


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return str(tmp_path / "texts.txt")


@pytest.fixture
def queries(tmp_path: Path) -> str:
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES) + "\n")
    return str(tmp_path / "queries.txt")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_search(
    models: SimpleNamespace, texts: str, queries: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hits of another text than their line, prompts left out, and a matrix that gives others than the file."""
    encoder = SentenceEncoder.from_pretrained(models.sentence, device="cpu")
    vectors = encoder.encode_document(TEXTS)
    expected = semantic_search(encoder.encode_query(QUERIES), vectors, top_k=3)
    lists = run(capsys, "search", *QUERIES, "--file", texts, "--top-k", "3", "--model", models.sentence)
    assert [line["query"] for line in lists] == QUERIES
    for line, hits in zip(lists, expected, strict=True):
        assert [hit["text"] for hit in line["hits"]] == [TEXTS[hit["corpus_id"]] for hit in hits]
        assert [hit["score"] for hit in line["hits"]] == pytest.approx([hit["score"] for hit in hits], abs=1e-6)
    np.save(tmp_path / "vectors.npy", vectors)
    matrix = str(tmp_path / "vectors.npy")
    arguments = "search", "--queries", queries, "--vectors", matrix, "--top-k", "3", "--model", models.sentence
    assert run(capsys, *arguments, "--file", texts) == lists
    alone = run(capsys, *arguments, "--score", "dot")
    assert [[hit["corpus_id"] for hit in line["hits"]] for line in alone] == [
        [hit["corpus_id"] for hit in hits] for hits in expected
    ]
    assert "text" not in alone[0]["hits"][0]


def test_rerank(
    models: SimpleNamespace, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches scores given to other texts, an order by something else, and hits of a search that lose their ids."""
    encoder = CrossEncoder.from_pretrained(models.cross, device="cpu")
    (line,) = run(capsys, "rerank", QUERIES[0], "--file", texts, "--top-k", "4", "--model", models.cross)
    expected = encoder.rank(QUERIES[0], TEXTS, top_k=4, return_documents=True)
    assert line["query"] == QUERIES[0] and [hit["text"] for hit in line["hits"]] == [hit["text"] for hit in expected]
    assert [hit["score"] for hit in line["hits"]] == pytest.approx([hit["score"] for hit in expected], abs=1e-6)

    main(["search", *QUERIES, "--file", texts, "--top-k", "3", "--model", models.sentence, "--device", "cpu"])
    printed = capsys.readouterr().out
    (tmp_path / "hits.jsonl").write_text(printed)
    hits = run(capsys, "rerank", "--hits", str(tmp_path / "hits.jsonl"), "--model", models.cross)
    for line, before in zip(hits, map(json.loads, printed.splitlines()), strict=True):
        documents = [hit["text"] for hit in before["hits"]]
        ranked = encoder.rank(before["query"], documents)
        assert [hit["corpus_id"] for hit in line["hits"]] == [
            before["hits"][r["corpus_id"]]["corpus_id"] for r in ranked
        ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(printed.encode())))
    assert run(capsys, "rerank", "--hits", "-", "--model", models.cross) == hits


def test_verify(
    models: SimpleNamespace, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches a report that is not written, texts that are not read, and an exit code of 0 for what is wrong."""
    files = ["--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html")]
    assert main(["verify", models.sentence, "--texts", texts, "--limit", "5", "--device", "cpu", *files]) == 0
    printed = capsys.readouterr().out
    assert "Vectors of 5 texts (encode's)" in printed and "encoder.layer.0" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True and report["n_texts"] == 5 and report["states"][-1]["name"] == "vectors"
    assert "<h1>fastbert verify</h1>" in (tmp_path / "report.html").read_text()
    assert main(["verify", models.cross, "--dtype", "bfloat16", "--device", "cpu", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16" and report["states"][1]["name"] == "bert.encoder.layer.0"
    assert main(["verify", models.plain, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "random token ids" in printed and "Gradients" not in printed
    assert main(["verify", models.plain, "--device", "cpu", "--gradients"]) == 0
    assert "gradients: the worst part is " in capsys.readouterr().out

    from fastbert import ops

    right = ops.varlen_attention
    monkeypatch.setattr(ops, "varlen_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert main(["verify", models.sentence, "--texts", texts, "--device", "cpu"]) == 1
    assert "model.encoder.layer.0 is the first wrong output" in capsys.readouterr().out


def test_errors_are_one_line(
    models: SimpleNamespace, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or an error that does not name the file or line."""
    np.save(tmp_path / "short.npy", np.zeros((3, 32), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    (tmp_path / "bad.jsonl").write_text('{"query": "a", "hits": [{"corpus_id": 1, "text": "b"}]}\n{"query": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    m, short, flat = ["--model", models.sentence], str(tmp_path / "short.npy"), str(tmp_path / "flat.npy")
    assert "short.npy has 3 rows, but" in fails(capsys, "search", "a", "--file", texts, "--vectors", short, *m)
    assert "flat.npy to hold one matrix" in fails(capsys, "search", "a", "--vectors", flat, *m)
    assert "texts.txt is no .npy file" in fails(capsys, "search", "a", "--vectors", texts, *m)
    assert "input: there is no file" in fails(capsys, "search", "a", "--file", "nothing.txt", *m)
    assert "input: there is no file" in fails(capsys, "search", "--queries", "nothing.txt", "--vectors", short, *m)
    assert "standard input cannot be both" in fails(capsys, "search", "--queries", "-", "--file", "-", *m)
    cross = ["--model", models.cross]
    assert "hits: there is no file" in fails(capsys, "rerank", "--hits", "nothing.jsonl", *cross)
    hits = str(tmp_path / "bad.jsonl")
    assert f"{hits}, line 2: expected an object" in fails(capsys, "rerank", "--hits", hits, *cross)
    assert "has 3 labels" in fails(capsys, "rerank", "a", "--file", texts, "--model", models.three)
    assert "is empty" in fails(capsys, "verify", models.plain, "--texts", str(tmp_path / "empty.txt"))
    assert "there is no folder" in fails(capsys, "verify", models.plain, "--html", str(tmp_path / "no" / "x.html"))
