"""Cross-encoders learn toy problems by each loss, as without acceleration, and the result is read everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbert
from fastbert.training import train_cross_encoder
from fastbert.training.finetuning.records import RecordError
from fastbert.training.finetuning.vector_data import Example
from fastbert.training.finetuning.vector_evaluation import RankedLists, lists_of
from vector_cases import COMMON, PAIRS, SCORED, command, reset_precision, save_encoder

pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LABELLED = [{"text": row["sentence1"], "text_pair": row["sentence2"], "label": int(row["score"])} for row in SCORED]
# What can be learned without attention between texts: texts of some words are right for every query.
MARKED = [{**pair, "negative": pair["anchor"]} for pair in PAIRS]


@pytest.fixture(autouse=True)
def _precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    reset_precision()
    yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def both(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """The scores of the result, by both libraries."""
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(str(folder), device="cpu").predict(pairs)
    ours = fastbert.CrossEncoder.from_pretrained(folder, device="cpu").predict(pairs)
    assert np.abs(ours - theirs).max() < 1e-5 * max(1.0, np.abs(theirs).max())
    return ours


@pytest.mark.parametrize("loss", ["bce", "lambda"])
def test_wrong_texts(loss: str, encoder: str, tmp_path: Path) -> None:
    """Catches negatives that are taken for positives, and a result that a library reads to other scores."""
    result = train_cross_encoder(encoder, MARKED, tmp_path, eval=MARKED, steps=30, loss=loss, **COMMON)
    assert result.after["mrr"] > 0.93 and result.after["mrr"] >= result.before["mrr"]
    right = both(tmp_path, [(pair["anchor"], pair["positive"]) for pair in PAIRS[:6]])
    wrong = both(tmp_path, [(pair["anchor"], pair["anchor"]) for pair in PAIRS[:6]])
    assert right.min() > wrong.mean()
    assert (tmp_path / "last" / "config.json").exists() and (tmp_path / "report.html").exists()


def test_mined_negatives(encoder: str, tmp_path: Path) -> None:
    """Catches mined texts that do not reach the loss, and a held-out pair without wrong texts to be ranked among."""
    result = train_cross_encoder(
        encoder, PAIRS, tmp_path, eval=PAIRS, steps=4, miner=encoder, mine_negatives=3, eval_candidates=5, **COMMON
    )
    assert result.sizes["training"]["negatives"] == {"3": len(PAIRS)}
    assert result.headline == "mrr" and 0.2 <= result.before["mrr"] < 1.0


def test_margins(encoder: str, tmp_path: Path) -> None:
    """Catches a teacher's scores that the loss does not get, by name and as a column, and an activation over them."""
    data = [{**row, "score": [4.0, -3.0]} for row in MARKED]
    taught = train_cross_encoder(encoder, data, tmp_path / "one", eval=MARKED, steps=40, **COMMON)
    assert taught.sizes["loss"] == "marginmse" and taught.losses[-1][1] < 0.2 * taught.losses[0][1]
    pair = PAIRS[0]
    scores = both(tmp_path / "one", [(pair["anchor"], pair["positive"]), (pair["anchor"], pair["anchor"])])
    assert abs(scores[0] - scores[1] - 7.0) < 3.0
    again = train_cross_encoder(encoder, MARKED, tmp_path / "two", teacher=str(tmp_path / "one"), steps=3, **COMMON)
    assert again.sizes["loss"] == "marginmse"


def test_as_without_acceleration(encoder: str, tmp_path: Path) -> None:
    """Catches a curve that leaves that of the model's own code: 1e-4 on losses of about 1, in fp32."""
    results = [
        train_cross_encoder(encoder, LABELLED, tmp_path / str(on), eval=LABELLED, steps=10, accelerate=on, **COMMON)
        for on in (True, False)
    ]
    ours, theirs = ([loss for _, loss in result.losses] for result in results)
    assert len(ours) == 10 and ours == pytest.approx(theirs, abs=1e-4)


def test_scores_without_lists(encoder: str, tmp_path: Path) -> None:
    """Catches scored pairs that cannot be ranked, and are not evaluated at all."""
    data = [{**row, "label": 0.25 + 0.5 * row["label"]} for row in LABELLED]
    result = train_cross_encoder(encoder, data, tmp_path, eval=data, steps=2, **COMMON)
    assert result.headline == "spearman" and -1 <= result.after["spearman"] <= 1


def test_lists(encoder: str, tmp_path: Path) -> None:
    """Catches lists of unlike lengths that are refused, and labels in another order than their texts."""
    rows = [
        {"query": p["anchor"], "documents": [p["anchor"], p["positive"], *["balo"] * (k % 2)],
         "labels": [0, 1, *[0] * (k % 2)]}
        for k, p in enumerate(PAIRS)
    ]  # fmt: skip
    result = train_cross_encoder(encoder, rows, tmp_path, eval=rows, steps=25, **COMMON)
    assert result.sizes["loss"] == "lambda" and result.after["mrr"] > 0.95


def test_ranks_of_equal_scores() -> None:
    """Catches a model that scores all alike and is said to rank perfectly, and lists that could not be ranked."""
    lists = [("q", ["right", "wrong", "worse"], [1.0, 0.0, 0.0]), ("q", ["wrong"], [0.0]), ("q", ["right"], [1.0])]
    scores = RankedLists(lists).score(lambda pairs: np.zeros(len(pairs)))
    assert scores["mrr"] == pytest.approx(1 / 3)
    examples = [Example("pairs", "", f"a{k}", f"p{k}") for k in range(4)]
    made = lists_of([*examples, Example("pairs", "", "a0", "P1")], 3)
    assert made[0] == ("a0", ["p0", "P1", "p2"], [1.0, 1.0, 0.0])  # p1 is P1 but for case.


def test_the_command(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option that does not reach its field."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in LABELLED), encoding="utf-8")
    argv = ["rerank", "--model", encoder, "--train", str(file), "--output", str(tmp_path / "out"), "--steps", "2"]
    command([*argv, "--device", "cpu", "--no-progress", "--precision", "fp32", "--eval-share", "0.2"])
    assert "report.html" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out/metrics.json").read_text())["settings"]
    assert settings["eval_share"] == 0.2 and settings["batch_size"] == 32


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([{"text": "a", "text_pair": "b", "label": 3}], {}, ValueError, "record 1: label 3.0, expected 0 to 1"),
        (PAIRS, {}, ValueError, "the pairs have no wrong texts"),
        (PAIRS, {"mine_negatives": 2}, ValueError, "miner: expected a bi-encoder"),
        (LABELLED, {"loss": "marginmse"}, ValueError, "does not take records of the kind scored"),
        (MARKED, {"loss": "marginmse"}, ValueError, "teacher: expected a cross-encoder"),
        ([{"query": "a", "documents": ["b", "c"], "labels": [1]}], {}, RecordError, "a list of 2 numbers"),
    ],
)
def test_refusals(rows: Any, options: Any, error: Any, message: str, encoder: str, tmp_path: Path) -> None:
    """Catches data or settings that are taken for something else, and errors without a place."""
    with pytest.raises(error, match=message):
        train_cross_encoder(encoder, rows, tmp_path, eval_share=0.0, **options)
