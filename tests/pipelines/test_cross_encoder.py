"""CrossEncoder gives pairs the scores of sentence-transformers."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastbert import BertForSequenceClassification, BertModel, CrossEncoder
from fastbert.pipelines import cross
from helpers import tiny_bert

NEEDS_6 = pytest.mark.skipif(
    int(importlib.metadata.version("sentence-transformers").split(".")[0]) < 6,
    reason="what is compared is as in sentence-transformers 6",
)
TEXTS = [
    "the river is wide and slow",
    "a",
    "",
    "small boats cross the river every morning, and in the evening they come back full of fish",
    "Fish!",
    "boats boats boats boats boats boats " * 5,
]
PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


def tiny(folder: Path, n_labels: int = 1, **extra: Any) -> Path:
    """A checkpoint with random weights: hidden 32, two layers, 40 positions, no limit in the tokenizer."""
    torch.manual_seed(0)
    labels = {i: f"LABEL_{i}" for i in range(n_labels)}
    config, tokenizer = tiny_bert([*TEXTS, "query: what?"] * 3, 150, id2label=labels, extra=extra)
    tokenizer.save_pretrained(folder)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def encoder(one: Path) -> CrossEncoder:
    return CrossEncoder.from_pretrained(one, device="cpu")


def theirs(folder: Path, **options: Any) -> Any:
    """Their encoder in float64: in float32 the random weights magnify what differs between processors."""
    from sentence_transformers import CrossEncoder as Theirs

    return Theirs(str(folder), device="cpu", local_files_only=True, **options).double()


def exact(folder: Path, **options: Any) -> CrossEncoder:
    """Our encoder in float64, whose scores are float32, as theirs."""
    return CrossEncoder.from_pretrained(folder, device="cpu", dtype="float64", **options)


def assert_same(ours: Any, expected: Any) -> None:
    """Scores of float64 are the same but for the last bit of float32."""
    assert_close(ours, expected, 2e-7)


def assert_close(ours: Any, expected: Any, tolerance: float = 5e-6) -> None:
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"apply_softmax": True},
        {"activation_fn": nn.Tanh()},
        {"activation_fn": nn.Identity(), "batch_size": 3},
        {"prompt": "query: "},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", ["one", "three"])
def test_scores_of_sentence_transformers(
    labels: str, arguments: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Catches another type, shape, order, truncation, activation or number than CrossEncoder.predict gives."""
    folder = request.getfixturevalue(labels)
    ours, other, single = exact(folder), theirs(folder), CrossEncoder.from_pretrained(folder, device="cpu")
    assert ours.num_labels == other.num_labels and ours.max_seq_length == other.max_seq_length == 40
    assert type(ours.activation_fn) is type(other.activation_fn)
    for pairs in (PAIRS, [list(pair) for pair in PAIRS], PAIRS[3], list(PAIRS[9])):
        result, expected = ours.predict(pairs, **arguments), other.predict(pairs, **arguments)
        in_float32 = single.predict(pairs, **arguments)
        assert type(result) is type(in_float32) is type(expected)
        parts = [(result, in_float32, expected)]
        if isinstance(expected, list):
            parts = list(zip(result, in_float32, expected, strict=True))
        for got, rounded, want in parts:
            assert type(got) is type(rounded) is type(want) and rounded.dtype in (torch.float32, np.float32)
            assert_same(got, want)


@pytest.mark.parametrize("limit", [3, 8, 9, 17])
def test_truncation_is_longest_first(one: Path, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    """Catches tokens cut from another text than theirs, at limits odd and even, and a cut without a word."""
    ours, other = exact(one, max_length=limit), theirs(one, max_length=limit)
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert_same(ours.predict(PAIRS), other.predict(PAIRS))
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and f"of {len(PAIRS)} pairs were longer than max_seq_length = {limit}" in told[0]
    assert ours.max_length == ours.max_seq_length == limit


@pytest.mark.parametrize(("budget", "batch_size"), [(1, None), (30, None), (100, 3), (None, 1)])
def test_batches_are_packed_and_within_the_budget(
    one: Path, encoder: CrossEncoder, monkeypatch: pytest.MonkeyPatch, budget: int | None, batch_size: int | None
) -> None:
    """Catches a padded batch, a budget that is not kept, scores that depend on batches, and a window's boundary."""
    expected = encoder.predict(PAIRS)
    ours = CrossEncoder.from_pretrained(one, device="cpu", token_budget=budget)
    seen: list[list[int]] = []
    run = ours.model.bert.encode_packed

    def spy(batch: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(batch.cu_seqlens_cpu.diff().tolist())
        assert input_ids.shape == (sum(seen[-1]),), "rows beyond the tokens"
        return run(batch, input_ids, *args, **kwargs)

    monkeypatch.setattr(ours.model.bert, "encode_packed", spy)
    monkeypatch.setattr(cross, "WINDOW", 13)
    assert_close(ours.predict(PAIRS, batch_size=batch_size), expected)
    lengths = [len(ids) for ids in ours.tokenizer(*map(list, zip(*PAIRS, strict=True)), max_length=40)["input_ids"]]
    assert sorted(sum(seen, [])) == sorted(lengths)
    assert all(len(batch) == 1 or sum(batch) <= (budget or 2048) for batch in seen)
    assert all(len(batch) <= (batch_size or len(PAIRS)) for batch in seen)


def test_rank(one: Path, three: Path) -> None:
    """Catches another order, form or number of results than CrossEncoder.rank gives."""
    encoder, other = exact(one), theirs(one)
    documents = [*TEXTS, TEXTS[0]]  # equal scores stay in order
    for options in ({}, {"top_k": 3}, {"return_documents": True}, {"activation_fn": nn.Identity(), "top_k": 99}):
        ours, expected = (
            encoder.rank("which boats?", documents, **options),
            other.rank("which boats?", documents, **options),
        )
        assert [list(hit) for hit in ours] == [list(hit) for hit in expected]
        for hit, want in zip(ours, expected, strict=True):
            assert (hit["corpus_id"], hit.get("text")) == (want["corpus_id"], want.get("text"))
            assert type(hit["score"]) is float and hit["score"] == pytest.approx(want["score"], rel=2e-7)
    assert encoder.rank("which boats?", []) == []
    with pytest.raises(ValueError, match="rank: expected a model with one label, got 3"):
        CrossEncoder.from_pretrained(three, device="cpu").rank("a", ["b"])


@NEEDS_6
def test_folders_of_sentence_transformers(one: Path, tmp_path: Path) -> None:
    """Catches a folder of version 6, with modules.json, that is not read, and settings in it that are not followed."""
    other = theirs(one, activation_fn=nn.Tanh(), prompts={"query": "query: "}, default_prompt_name="query")
    other.save_pretrained(str(tmp_path))
    assert (tmp_path / "modules.json").is_file()
    ours = exact(tmp_path)
    assert isinstance(ours.activation_fn, nn.Tanh) and ours.prompts["query"] == "query: "
    assert_same(ours.predict(PAIRS), theirs(tmp_path).predict(PAIRS))
    assert_same(ours.predict(PAIRS, prompt=""), other.predict(PAIRS, prompt=""))
    with pytest.raises(ValueError, match="prompt_name: got 'nope', expected one of"):
        ours.predict(PAIRS, prompt_name="nope")
    modules = json.loads((tmp_path / "modules.json").read_text())
    score = {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, score]))
    with pytest.raises(ValueError, match="modules.json: expected a Transformer alone, got Transformer, Dense"):
        CrossEncoder.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), None], ids=str)
def test_saved_folder_loads_in_sentence_transformers(one: Path, tmp_path: Path, activation: Any) -> None:
    """Catches an activation function or a limit that is lost on the way out and in again."""
    ours = exact(one, activation_fn=activation, max_length=11)
    ours.save_pretrained(tmp_path)
    again, other = exact(tmp_path), theirs(tmp_path)
    expected = ours.predict(PAIRS)
    for loaded in (again, other):
        assert type(loaded.activation_fn) is type(ours.activation_fn) and loaded.max_seq_length == 11
        assert_same(loaded.predict(PAIRS), expected)
    ours.activation_fn = lambda x: x * 2
    assert_same(ours.predict(PAIRS), 2 * ours.predict(PAIRS, activation_fn=nn.Identity()))
    with pytest.raises(ValueError, match="activation_fn: got function, expected one of Tanh, Identity"):
        ours.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_activation_of_the_config(tmp_path: Path, extra: dict[str, Any]) -> None:
    """Catches scores through a sigmoid where the config of versions 3 to 5 says otherwise."""
    folder = tiny(tmp_path, **extra)
    ours = exact(folder)
    assert type(ours.activation_fn) is nn.Identity
    assert_same(ours.predict(PAIRS), theirs(folder).predict(PAIRS))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an activation function that is imported by the name that a checkpoint gives it."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = CrossEncoder.from_pretrained(
            tiny(tmp_path / "a", sentence_transformers={"activation_fn": "antigravity.Sigmoid"}), device="cpu"
        )
    assert type(ours.activation_fn) is nn.Sigmoid and "'antigravity.Sigmoid' is not one of torch's" in caplog.text
    for path in ("torch.hub.load", "torch.nn.Bilinear", "torch.os.Sigmoid"):
        folder = tiny(tmp_path / path, sentence_transformers={"activation_fn": path})
        with pytest.raises(ValueError, match=f"activation_fn is '{path}', expected one of Tanh, Identity"):
            CrossEncoder.from_pretrained(folder, device="cpu")


def test_a_missing_head_is_refused(one: Path, tmp_path: Path) -> None:
    """Catches scores by a head of random numbers."""
    shutil.copytree(one, tmp_path / "folder")
    BertModel.from_pretrained(one).save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="has no classification head: it lacks .*classifier.weight"):
        CrossEncoder.from_pretrained(tmp_path / "folder", device="cpu")


def test_inputs_of_other_kinds(encoder: CrossEncoder) -> None:
    """Catches inputs that are refused: without a length, arrays of pairs, the earlier name, or no pairs at all."""
    expected = encoder.predict(PAIRS)
    for pairs in (iter(PAIRS), np.array(PAIRS), np.array(PAIRS, dtype=object), tuple(PAIRS)):
        assert_close(encoder.predict(pairs), expected)
    assert_close(encoder.predict(sentences=PAIRS, num_workers=2), expected)
    assert_close(encoder.predict(np.array(PAIRS[3])), expected[3])
    assert encoder.predict([]).shape == (0,)
    assert (
        encoder.predict([], convert_to_tensor=True).shape == (0,) and encoder.predict([], convert_to_numpy=False) == []
    )


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ("a text", TypeError, "inputs: got str, expected a pair"),
        (5, TypeError, "inputs: got int"),
        ([("a", "b"), ("c",)], TypeError, r"inputs\[1\]: got 1 texts, expected a pair of texts"),
        ([("a", "b"), "c"], TypeError, r"inputs\[1\]: got str"),
        (["a", "b", "c"], TypeError, "inputs: got 3 texts"),
        ([("a", "b"), ("c", None)], TypeError, r"inputs\[1\]\[1\]: got NoneType, expected str"),
        ([("a", "\ud800")], ValueError, r"inputs\[0\]\[1\]: lone surrogate"),
    ],
)
def test_what_is_no_pair_is_named(encoder: CrossEncoder, inputs: Any, kind: type[Exception], message: str) -> None:
    """Catches a pair that is misread in silence, and an error that does not say where it stands."""
    with pytest.raises(kind, match=message):
        encoder.predict(inputs)


def test_bad_arguments(one: Path, encoder: CrossEncoder) -> None:
    """Catches an argument that is ignored in silence."""
    for arguments in ({"pool": {}}, {"device": []}, {"device": ["cpu", "cuda"]}, {"workers": 0}):
        with pytest.raises(ValueError, match="pool|device|workers"):
            encoder.predict(PAIRS, **arguments)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        encoder.predict(PAIRS, batch_size=0)
    with pytest.raises(TypeError, match="inputs: expected"):
        encoder.predict()
    with pytest.raises(ValueError, match="max_seq_length: got 41, but the model has 40 positions"):
        CrossEncoder.from_pretrained(one, device="cpu", max_length=41)
    with pytest.raises(ValueError, match="default_prompt_name: got 'query'"):
        CrossEncoder(encoder.model, encoder.tokenizer, default_prompt_name="query")


@NEEDS_6
@pytest.mark.parametrize("name", ["predict", "rank"])
def test_signature_is_that_of_sentence_transformers(name: str) -> None:
    """Catches an argument in another place or under another name than where callers of theirs put it."""
    from sentence_transformers import CrossEncoder as Theirs

    expected = [n for n in inspect.signature(getattr(Theirs, name)).parameters if n != "kwargs"]
    assert list(inspect.signature(getattr(CrossEncoder, name)).parameters)[: len(expected)] == expected


def test_dtypes_modes_and_autograd(encoder: CrossEncoder, three: Path) -> None:
    """Catches 16-bit scores, dropout, scores that autograd refuses, and the activation in the state dict."""
    expected = encoder.predict(PAIRS)
    encoder.train()
    assert_close(encoder.predict(PAIRS), expected)
    scores = encoder.predict(PAIRS, convert_to_tensor=True)
    (scores * torch.ones(len(PAIRS), requires_grad=True)).sum().backward()
    halved = CrossEncoder.from_pretrained(three, device="cpu", dtype="bfloat16")
    assert halved.predict(PAIRS).dtype == np.float32 and halved.dtype == torch.bfloat16
    assert all(name.startswith("model.") for name in encoder.state_dict())


def test_triton_backend_under_strict(one: Path, encoder: CrossEncoder, device: torch.device) -> None:
    """Catches an operation of this path that the kernels do not run, or run wrong."""
    kernels = CrossEncoder.from_pretrained(one, device=device, backend="triton", strict=True)
    assert_close(kernels.predict(PAIRS[:5]), encoder.predict(PAIRS[:5]), 1e-5)


def test_progress_bar_only_where_asked_for(encoder: CrossEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that shows by default, goes to standard output, or counts batches."""
    encoder.predict(PAIRS)
    assert capsys.readouterr() == ("", "")
    encoder.predict(PAIRS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == "" and f"{len(PAIRS)}/{len(PAIRS)}" in err
