"""Sentence embeddings learn toy problems by each loss, as without acceleration, and the result is read everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbert
from fastbert.training import train_embeddings
from fastbert.training.finetuning.records import RecordError
from vector_cases import COMMON, PAIRS, SCORED, command, reset_precision, save_encoder

pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    reset_precision()
    yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def teacher(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an encoder that has learned the pairs."""
    folder = tmp_path_factory.mktemp("teacher")
    reset_precision()
    result = train_embeddings(encoder, PAIRS, folder, eval=PAIRS, steps=60, **COMMON)
    assert result.after["mrr"] > result.before["mrr"] + 0.4
    return str(folder)


def vectors_of(folder: str | Path, texts: list[str]) -> np.ndarray:
    return fastbert.SentenceEncoder.from_pretrained(folder, device="cpu").encode(texts)


def learns(result: Any, least: float) -> None:
    """The headline rises by so much, and the best evaluation is that of the result."""
    name = result.headline
    assert result.after[name] >= result.before[name] + least, (result.before[name], result.after[name])
    assert max(value for _, value in result.evaluations) == pytest.approx(result.after[name], abs=1e-6)


def test_the_result_is_read_everywhere(teacher: str) -> None:
    """Catches a folder that a library does not load, or to other vectors, and results that are not written."""
    from sentence_transformers import SentenceTransformer

    texts = [pair["anchor"] for pair in PAIRS[:5]]
    theirs = SentenceTransformer(teacher, device="cpu").encode(texts)
    assert np.abs(vectors_of(teacher, texts) - theirs).max() < 1e-5
    last = SentenceTransformer(str(Path(teacher) / "last"), device="cpu").encode(texts)
    assert last.shape == theirs.shape
    metrics = json.loads((Path(teacher) / "metrics.json").read_text())
    assert metrics["headline"] == "mrr" and metrics["after"]["mrr"] > 0.6 and metrics["data"]["loss"] == "mnrl"
    assert metrics["before"]["mrr_interval"][0] < metrics["before"]["mrr"] < metrics["before"]["mrr_interval"][1]
    assert "mrr is " in (Path(teacher) / "report.html").read_text()


def test_cached_batches_are_whole_ones(encoder: str, tmp_path: Path) -> None:
    """Catches parts of a batch that know only the texts of their part."""
    options = {**COMMON, "eval": PAIRS, "steps": 12}
    one = train_embeddings(encoder, PAIRS, tmp_path / "whole", **options)
    other = train_embeddings(encoder, PAIRS, tmp_path / "parts", loss="cached-mnrl", **options)
    assert [loss for _, loss in other.losses] == pytest.approx([loss for _, loss in one.losses], abs=1e-4)


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scored_pairs(loss: str, encoder: str, tmp_path: Path) -> None:
    """Catches scores that the loss does not get, or gets as whole numbers."""
    data = [{**pair, "score": 4.5 * pair["score"]} for pair in SCORED]
    options = {**COMMON, "loss": loss, "score_scale": 5.0}
    learns(train_embeddings(encoder, data, tmp_path, eval=data, steps=50, **options), 0.15)


def test_mined_negatives_and_matryoshka(encoder: str, tmp_path: Path) -> None:
    """Catches negatives that do not reach the loss, and widths that are not trained."""
    from sentence_transformers import SentenceTransformer

    result = train_embeddings(
        encoder, PAIRS, tmp_path, eval=PAIRS, steps=60, mine_negatives=2, mine_skip=1, matryoshka="32,8", **COMMON
    )
    learns(result, 0.4)
    assert result.sizes["training"]["negatives"] == {"2": len(PAIRS)}
    assert result.after["width 8"]["mrr"] > result.before["width 8"]["mrr"] + 0.2
    short = SentenceTransformer(str(tmp_path), truncate_dim=8, device="cpu").encode("balo demu")
    assert short.shape == (8,)
    ours = fastbert.SentenceEncoder.from_pretrained(tmp_path, truncate_dim=8, device="cpu").encode("balo demu")
    assert np.abs(ours - short).max() < 1e-5


def test_a_teacher_s_vectors(encoder: str, teacher: str, tmp_path: Path) -> None:
    """Catches vectors of other texts, of a teacher by name and as a column."""
    texts = [pair[name] for pair in PAIRS for name in pair]
    options = {**COMMON, "steps": 40, "learning_rate": 1e-2}
    by_name = train_embeddings(encoder, [{"text": text} for text in texts], tmp_path / "a", teacher=teacher, **options)
    learns(by_name, 0.0)
    assert by_name.after["cosine"] > by_name.before["cosine"] + 0.1
    rows = [{"text": t, "vector": v.tolist()} for t, v in zip(texts, vectors_of(teacher, texts), strict=True)]
    by_column = train_embeddings(encoder, rows, tmp_path / "b", **options)
    assert by_column.after["cosine"] == pytest.approx(by_name.after["cosine"], abs=1e-3)


def test_margins(encoder: str, tmp_path: Path) -> None:
    """Catches margins that the loss does not get, alone or as a score for each text."""
    rows = [{**pair, "negative": PAIRS[(k + 4) % len(PAIRS)]["positive"]} for k, pair in enumerate(PAIRS)]
    losses = []
    for name, score in (("margin", 30.0), ("scores", [35.0, 5.0])):
        data = [{**row, "score": score} for row in rows]
        result = train_embeddings(encoder, data, tmp_path / name, eval=PAIRS, steps=30, **COMMON)
        losses.append([loss for _, loss in result.losses])
        assert result.sizes["loss"] == "marginmse"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert np.mean(losses[0][-5:]) < 0.3 * losses[0][0]


def test_as_without_acceleration(encoder: str, tmp_path: Path) -> None:
    """Catches a curve that leaves that of the model's own code: 1e-4 on losses of about 1, in fp32."""
    results = [
        train_embeddings(
            encoder, PAIRS, tmp_path / str(on), eval=PAIRS, steps=15, accelerate=on, mine_negatives=1,
            query_prompt="query: ", document_prompt="document: ", max_length=12, pooling="cls", **COMMON,
        )
        for on in (True, False)
    ]  # fmt: skip
    ours, theirs = ([loss for _, loss in result.losses] for result in results)
    assert len(ours) == 15 and ours == pytest.approx(theirs, abs=1e-4)
    assert results[0].after["mrr"] == pytest.approx(results[1].after["mrr"], abs=0.02)
    loaded = fastbert.SentenceEncoder.from_pretrained(tmp_path / "True", device="cpu")
    assert loaded.prompts["query"] == "query: " and loaded.max_seq_length == 12
    assert "cls" in str(loaded.pooling)


def test_resuming(encoder: str, tmp_path: Path) -> None:
    """Catches a run that begins anew, or that goes on otherwise, after a torn checkpoint; and changed settings."""
    options = {**COMMON, "eval": PAIRS, "steps": 20, "evaluate_every": 5, "keep": 4, "mine_negatives": 1}
    whole = train_embeddings(encoder, PAIRS, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("checkpoints", "settings.json"):
        source = tmp_path / "whole" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, killed / name)
    shutil.rmtree(killed / "checkpoints/checkpoint-20")
    (killed / "checkpoints/checkpoint-15/trainer_state.json").write_text('{"global_step": 1')
    with pytest.raises(FileExistsError, match="has checkpoints"):
        train_embeddings(encoder, PAIRS, killed, **options)
    with pytest.raises(ValueError, match="learning_rate: got 1.0, but the run that is to go on has 0.003"):
        train_embeddings(encoder, PAIRS, killed, resume=True, **{**options, "learning_rate": 1.0})
    resumed = train_embeddings(encoder, PAIRS, killed, resume=True, **options)
    assert [step for step, _ in resumed.losses] == list(range(1, 21))
    assert resumed.losses == whole.losses and resumed.after == whole.after


def test_the_command(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option that does not reach its field, and columns under other names."""
    file = tmp_path / "pairs.csv"
    rows = "\n".join(f"{pair['anchor']},{pair['positive']}" for pair in PAIRS)
    file.write_text(f"left,right\n{rows}\n", encoding="utf-8")
    argv = ["--model", encoder, "--train", str(file), "--output", str(tmp_path / "out"), "--steps", "3"]
    argv += ["--columns", "anchor=left", "positive=right", "--device", "cpu", "--no-progress", "--precision", "fp32"]
    command(["embed", *argv, "--matryoshka", "32,16", "--mine-negatives", "1"])
    assert "mrr: " in capsys.readouterr().out
    settings = json.loads((tmp_path / "out/metrics.json").read_text())["settings"]
    assert settings["matryoshka"] == [32, 16] and settings["steps"] == 3 and settings["progress"] is False


def test_preserved_vectors_stay(encoder: str, tmp_path: Path) -> None:
    """Catches texts that are to keep their vectors and move as far as without that, and a loss that other sets get."""
    texts = [f"{pair['positive']} and other news of {i}" for i, pair in enumerate(PAIRS)]
    options: Any = {**COMMON, "eval_share": 0.0, "steps": 30, "batch_size": 4, "learning_rate": 3e-3}
    before = vectors_of(encoder, texts)

    def moved(name: str, **more: Any) -> float:
        train_embeddings(encoder, PAIRS, tmp_path / name, **options, **more)
        after = vectors_of(tmp_path / name, texts)
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        return float(1 - ((before * after).sum(1) / lengths).mean())

    kept = moved("kept", preserve=[{"text": text} for text in texts])
    assert kept < 0.5 * moved("free")
    facts = json.loads((tmp_path / "kept/metrics.json").read_text())
    assert facts["settings"]["preserve"] == "<list>" and facts["settings"]["preserve_weight"] == 20.0


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (PAIRS, {"preserve": [{"text": "a"}], "loss": "distillation"}, ValueError, "preserve: not with loss"),
        (PAIRS, {"preserve": [{"other": "a"}]}, RecordError, "record 1"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": "c"}], {}, RecordError, "record 2: has other columns"),
        ([{"anchor": "a", "positive": " "}], {}, RecordError, "record 1"),
        ([{"sentence1": "a", "sentence2": "b", "score": "x"}], {}, RecordError, "record 1: score: expected a finite"),
        ([{"sentence1": "a", "sentence2": "b", "score": 5}], {"loss": "cosine"}, ValueError, "is no cosine"),
        (PAIRS, {"loss": "cosent"}, ValueError, "does not take records of the kind pairs"),
        (SCORED, {"mine_negatives": 2}, ValueError, "mine_negatives: expected pairs"),
        (PAIRS, {"mine_skip": 100}, ValueError, "mine_skip: expected less than mine_depth"),
        (PAIRS, {"pooling": "none"}, ValueError, "pooling"),
        ([{"other": "a"}], {}, RecordError, "record 1: has the columns other"),
    ],
)
def test_refusals(rows: Any, options: Any, error: Any, message: str, encoder: str, tmp_path: Path) -> None:
    """Catches data or settings that are taken for something else, and errors without a place."""
    with pytest.raises(error, match=message):
        train_embeddings(encoder, rows, tmp_path, eval_share=0.0, **options)
