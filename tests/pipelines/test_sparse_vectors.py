"""Sparse vectors are those of sentence-transformers' SparseEncoder, and of bge-m3's formula."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

import fastbert
from fastbert import BertForMaskedLM, BertModel, SentenceEncoder
from fastbert.pipelines import token_heads
from helpers import tiny_bert

TEXTS = [
    "boats cross the river every morning", "", "a", "the river is wide and slow, and fish live in the river",
    "한국어 문장입니다", "fish " * 60, "a [MASK] river", "  every   evening ",
]  # fmt: skip
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A masked-language model, and SPLADE folders of sentence-transformers made of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("splade")
    config, tokenizer = tiny_bert(TEXTS * 3, 160)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    for pooling in ("max", "sum"):
        for activation in ("relu", "log1p_relu"):
            modules = [Transformer(str(folder / "bare"), transformer_task="fill-mask", max_seq_length=24),
                       SpladePooling(pooling, activation)]  # fmt: skip
            encoder = SparseEncoder(modules=modules, device="cpu", max_active_dims=40 if pooling == "sum" else None)
            encoder.save(str(folder / f"{pooling} {activation}"))
    return {path.name: path for path in folder.iterdir()}


def theirs(folder: Path) -> Any:
    return SparseEncoder(str(folder), device="cpu", local_files_only=True)


def assert_close(ours: Any, expected: Any, bound: float = 2e-6) -> None:
    ours, expected = ours.to_dense(), expected.to_dense()
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("name", ["max relu", "max log1p_relu", "sum relu", "sum log1p_relu"])
def test_splade_folders(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches another pooling, activation, truncation or order, a block that is lost, and a limit that is not kept."""
    ours, other = SentenceEncoder.from_pretrained(folders[name], device="cpu", dtype="float32"), theirs(folders[name])
    expected = other.encode(TEXTS)
    whole = ours.encode(TEXTS)
    assert_close(whole, expected)
    assert ours.outputs == ("sparse",) and ours.similarity_fn_name == "dot"
    monkeypatch.setitem(token_heads.LOGITS, "cpu", ours.get_embedding_dimension() * 7)  # seven tokens at a time
    monkeypatch.setitem(token_heads.NUMBERS, "cpu", ours.get_embedding_dimension() * 3)
    assert_close(ours.encode(TEXTS), expected)
    assert_close(ours.encode(TEXTS, max_active_dims=5), other.encode(TEXTS, max_active_dims=5))
    ours.save_pretrained(tmp_path)
    assert torch.equal(
        SentenceEncoder.from_pretrained(tmp_path, device="cpu", dtype="float32").encode(TEXTS).to_dense(),
        ours.encode(TEXTS).to_dense(),
    )
    assert_close(theirs(tmp_path).encode(TEXTS), expected)


def test_forms_of_the_result(folders: Folders) -> None:
    """Catches another layout, shape, dtype or device than sentence-transformers 6 gives."""
    ours, other = SentenceEncoder.from_pretrained(folders["max relu"], device="cpu"), theirs(folders["max relu"])
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (TEXTS, {}, {}),
        ("a river", {}, {}),
        (TEXTS, {"convert_to_sparse_tensor": False}, {"convert_to_sparse_tensor": False}),
        (TEXTS[:3], {"convert_to_numpy": False}, {"convert_to_tensor": False}),
        ([], {}, {}),
    ]
    for texts, mine, their_options in cases:
        got, expected = ours.encode(texts, **mine), other.encode(texts, **their_options)
        assert type(got) is type(expected)
        for one, want in zip(*(x if isinstance(x, list) else [x] for x in (got, expected)), strict=True):
            assert (one.shape, one.dtype, one.layout, one.device) == (want.shape, want.dtype, want.layout, want.device)
    got, expected = ours.encode(TEXTS), other.encode(TEXTS)
    few, their_few = ours.encode(TEXTS[:2]), other.encode(TEXTS[:2])
    assert ours.sparsity(got) == pytest.approx(other.sparsity(expected))
    assert ours.get_embedding_dimension() == other.get_embedding_dimension() == got.shape[1]
    assert torch.allclose(ours.similarity(got, few), other.similarity(expected, their_few), rtol=1e-5)
    assert [token for token, _ in ours.decode(got[0], top_k=4)] == [t for t, _ in other.decode(expected[0], top_k=4)]
    assert_close(ours.intersection(got[0], got), other.intersection(expected[0], expected))


def test_a_bare_masked_language_model(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a checkpoint without modules.json that cannot be a SPLADE, and truncation that is not counted."""
    ours, other = (
        SentenceEncoder.from_pretrained(folders["bare"], device="cpu", output="sparse"),
        theirs(folders["bare"]),
    )
    assert_close(ours.encode(TEXTS), other.encode(TEXTS))
    ours.max_seq_length = 10
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours.encode(TEXTS)
    assert "of 8 texts were longer than max_seq_length = 10 and truncated" in caplog.text
    dense = SentenceEncoder.from_pretrained(folders["bare"], device="cpu")
    assert dense.outputs == ("dense",)
    with pytest.raises(ValueError, match=r"output: got 'sparse', but this model has dense vectors; from_pretrained"):
        dense.encode("a", output="sparse")
    for arguments in ({"normalize_embeddings": True}, {"truncate_dim": 3}, {"precision": "int8"}, {"output": "multi"}):
        with pytest.raises(ValueError, match="output"):
            ours.encode("a", **arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, folders: Folders) -> None:
    """Catches a pooled vector that is rounded to the model's dtype, or logits that overflow it."""
    exact = SentenceEncoder.from_pretrained(folders["max relu"], device="cpu", dtype="float64").encode(TEXTS)
    half = SentenceEncoder.from_pretrained(folders["max relu"], device="cpu", dtype=dtype).encode(TEXTS)
    eager = theirs(folders["max relu"]).to(getattr(torch, dtype)).encode(TEXTS)
    assert half.dtype == torch.float32
    errors = [(x.to_dense().double() - exact.to_dense()).norm() / exact.to_dense().norm() for x in (half, eager)]
    assert errors[0] <= 1.25 * errors[1] + 4 * torch.finfo(getattr(torch, dtype)).eps


def test_no_logits_of_a_whole_batch(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches (T, V) logits in memory, for which long texts over a large vocabulary leave no room."""
    ours = SentenceEncoder.from_pretrained(folders["max relu"], device="cpu", dtype="float32")
    shapes: list[tuple[int, ...]] = []
    call = token_heads.hooks.call

    def spy(module: Any, *arguments: Any) -> torch.Tensor:
        logits = call(module, *arguments)
        if module is ours.heads["sparse"].cls:
            shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(token_heads.hooks, "call", spy)
    monkeypatch.setitem(token_heads.LOGITS, "cpu", ours.get_embedding_dimension() * 7)
    ours.encode(TEXTS)
    assert max(n_rows for n_rows, _ in shapes) == 7
    assert ours.last_timings is not None and sum(n_rows for n_rows, _ in shapes) == ours.last_timings.tokens


@pytest.mark.parametrize("name", ["max relu", "sum log1p_relu"])
def test_batch_invariance(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bits of a vector that depend on the texts beside it, or on where a block ends."""
    ours = SentenceEncoder.from_pretrained(folders[name], device="cpu", dtype="float32", batch_invariant=True)
    monkeypatch.setitem(token_heads.LOGITS, "cpu", ours.get_embedding_dimension() * 7)
    together = ours.encode(TEXTS, convert_to_sparse_tensor=False)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.equal(ours.encode(text, convert_to_sparse_tensor=False), vector)


def test_tools_that_take_an_encoder(folders: Folders) -> None:
    """Catches a tool that asks a SPLADE for dense vectors, or checks the ones that it does not make."""
    ours = SentenceEncoder.from_pretrained(folders["max relu"], device="cpu", dtype="float32")
    assert fastbert.verify(ours, TEXTS[:4]).ok
    assert not any("pool" in row.op for row in fastbert.explain(ours).rows)
    fastbert.warmup(ours)
    assert torch.equal(copy.deepcopy(ours).encode("a").to_dense(), ours.encode("a").to_dense())


# bge-m3


def bge_folder(folder: Path) -> Path:
    torch.manual_seed(1)
    config, tokenizer = tiny_bert(TEXTS * 3, 160)
    encoder = SentenceEncoder(BertModel(config), tokenizer, "cls")
    encoder.save_pretrained(folder)
    for name, n in (("sparse", 1), ("colbert", 24)):
        torch.save(torch.nn.Linear(config.hidden_size, n).state_dict(), folder / f"{name}_linear.pt")
    return folder


def test_bge_m3(tmp_path: Path) -> None:
    """Catches a weight of a special token, the last weight of a repeated token, and a CLS among the vectors."""
    ours = SentenceEncoder.from_pretrained(bge_folder(tmp_path / "bge"), device="cpu", dtype="float32")
    assert ours.outputs == ("dense", "sparse", "multi")
    sparse, multi, dense = (ours.encode(TEXTS, output=output) for output in ("sparse", "multi", None))
    assert dense.shape == (8, 32) and sparse.shape == (8, ours.tokenizer.vocab_size)
    linear, colbert = (torch.load(tmp_path / "bge" / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    special = {ours.tokenizer.cls_token_id, ours.tokenizer.sep_token_id, ours.tokenizer.unk_token_id,
               ours.tokenizer.pad_token_id}  # fmt: skip
    for i, item in enumerate(ours.encode(TEXTS, output_value=None)):
        hidden = item["token_embeddings"]
        expected = torch.zeros(sparse.shape[1])
        weights = torch.relu(hidden @ linear["weight"].T + linear["bias"])[:, 0]
        for token, weight in zip(item["input_ids"].tolist(), weights, strict=True):
            if token not in special:
                expected[token] = max(expected[token], weight)
        torch.testing.assert_close(sparse[i].to_dense(), expected)
        vectors = torch.nn.functional.normalize(hidden[1:] @ colbert["weight"].T + colbert["bias"], dim=-1)
        torch.testing.assert_close(multi[i], vectors)
    other = SentenceEncoder.from_pretrained(tmp_path / "bge", device="cpu", dtype="float32", output="sparse")
    assert torch.equal(other.encode(TEXTS).to_dense(), sparse.to_dense())
    ours.save_pretrained(tmp_path / "again")
    again = SentenceEncoder.from_pretrained(tmp_path / "again", device="cpu", dtype="float32")
    assert torch.equal(again.encode(TEXTS, output="sparse").to_dense(), sparse.to_dense())
    assert all(map(torch.equal, again.encode(TEXTS, output="multi"), multi))
    (tmp_path / "again" / "sparse_linear.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"sparse_linear\.pt: expected the weight and the bias of a linear layer"):
        SentenceEncoder.from_pretrained(tmp_path / "again", device="cpu")


def test_a_head_that_lacks_its_weights(folders: Folders, tmp_path: Path) -> None:
    """Catches a SPLADE whose masked-LM head is of random numbers."""
    (tmp_path / "x").mkdir()
    for path in folders["bare"].iterdir():
        (tmp_path / "x" / path.name).write_bytes(path.read_bytes())
    BertModel.from_pretrained(folders["bare"]).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="has no masked-LM head: it lacks"):
        SentenceEncoder.from_pretrained(tmp_path / "x", device="cpu", output="sparse")
    assert "BertForMaskedLM" in json.loads((folders["bare"] / "config.json").read_text())["architectures"]
