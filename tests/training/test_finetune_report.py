"""The report of a fine-tuned model says what its numbers are, and shows where the model is wrong."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.pages.html import STYLESHEET
from fastbert.training.finetuning import metrics
from fastbert.training.finetuning.report import as_json, most_wrong, write_report

FACTS: dict[str, Any] = {"task": "classify", "model": "mini <b>", "device": "a CPU", "records": {"training": 9}}
HISTORY = [
    {"step": 10, "loss": 1.2, "learning_rate": 1e-5}, {"step": 20, "loss": float("nan")}, {"step": 30, "loss": 0.4},
    {"step": 20, "eval_loss": 0.9, "eval_accuracy": 0.5}, {"step": 30, "eval_loss": 0.5, "eval_accuracy": 0.8125},
    {"step": 30, "train_runtime": 3.0},
]  # fmt: skip


def made(n_classes: int = 3, n: int = 40) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and tables of a classifier that is right in most cases."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, n_classes, n)
    logits = generator.normal(size=(n, n_classes)) + 2 * (np.arange(n_classes) == labels[:, None])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = [f"class <{i}>" for i in range(n_classes)]
    return metrics.classification(labels, p), {"labels": labels, "probabilities": p, "names": names}


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_classes(tmp_path: Path) -> None:
    """Catches a page with another stylesheet or something from outside, and a part that is left out of it."""
    pytest.importorskip("matplotlib", reason="draws the figures")
    found, tables = made()
    texts = [f"text {i} " + "word " * 90 for i in range(40)]
    written = write_report(
        tmp_path, FACTS, found, headline="accuracy", intervals={"accuracy": (0.5, 0.9)}, tables=tables, texts=texts,
        places=[f"e.csv, line {i + 2}" for i in range(40)], history=HISTORY, truncated={"texts_cut": 3},
    )  # fmt: skip
    assert written == [tmp_path / "metrics.json", tmp_path / "report.html"]
    page = page_of(tmp_path)
    assert re.findall(r"<style>(.*?)</style>", page, flags=re.S)[0] == STYLESHEET
    assert "http" not in page and "<script" not in page and "<b>" not in page
    assert not re.search(r'\b(src|href)="(?!#)', page)
    assert headings(page) == [
        "Metrics", "Classes", "Confusion", "Calibration", "Learning curve", "Examples that are most wrong",
        "What was cut", "Method", "Environment",
    ]  # fmt: skip
    assert page.count("<svg") == 3
    sentence = f"Accuracy is {found['accuracy']:.4f} (95 % interval: 0.5000 to 0.9000) on 40 examples"
    assert sentence in page and "0.5000 to 0.9000</td>" in page and "accuracy 0.8125" in page
    worst = most_wrong(tables)
    assert f"e.csv, line {worst[0] + 2}" in page and f"text {worst[0]} word" in page and "class &lt;0&gt;" in page
    assert max(len(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page)) <= 300
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert kept["metrics"]["confusion"] == found["confusion"] and kept["intervals"] == {"accuracy": [0.5, 0.9]}
    assert kept["task"] == "classify" and kept["headline"] == "accuracy"


@pytest.mark.parametrize("case", ["many classes", "labels", "numbers", "spans", "nothing", "state"])
def test_other_tasks(tmp_path: Path, case: str) -> None:
    """Catches a task or an empty run for which no report can be written."""
    pytest.importorskip("matplotlib", reason="draws the figures")
    generator, found, options = np.random.default_rng(0), {}, {}  # type: ignore[var-annotated]
    expected = ["Metrics"]
    if case == "many classes":
        found, tables = made(60)
        options = {"tables": tables, "headline": "macro_f1"}
        expected += ["Classes", "Confusion", "Calibration"]
    elif case == "labels":
        truth, p = generator.integers(0, 2, (9, 3)), generator.random((9, 3))
        found = metrics.multilabel(truth, p)
        options = {"tables": {"labels": truth, "probabilities": p, "names": ["a", "b", "c"]}, "texts": ["x"] * 9}
        expected += ["Classes", "Examples that are most wrong"]
    elif case == "numbers":
        x = generator.normal(size=9)
        found = metrics.regression(x, np.zeros(9))  # no correlation: NaN
        options = {"tables": {"labels": x, "values": np.zeros(9)}, "texts": ["x"] * 9, "headline": "pearson"}
        expected += ["Examples that are most wrong"]
    elif case == "spans":
        found = metrics.spans([["B-A", "O"]], [["B-A", "O"]])
        answers = {"scores": [1.0, 0.5, 0.0], "true": ["a", "b", "c"], "predicted": ["a", "b d", ""]}
        options = {"tables": answers, "texts": ["x", "y", "z"]}
        expected += ["Types", "Examples that are most wrong"]
    elif case == "state":
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[:1]}))
        expected += ["Learning curve"]
    write_report(tmp_path, FACTS, found, **options)
    page = page_of(tmp_path)
    assert headings(page) == [*expected, "Method", "Environment"]
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    if case == "numbers":
        assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["pearson"] is None
    if case == "spans":
        assert re.findall(r'<th scope="row">(example .)</th>', page) == ["example 3", "example 2"]
    if case == "nothing":
        assert "There was no evaluation." in page


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report that fails where nothing can draw, or keeps still about its missing figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found, tables = made()
    write_report(tmp_path, FACTS, found, headline="accuracy", tables=tables, history=HISTORY)
    page = page_of(tmp_path)
    assert "<svg" not in page and "There are no figures" in page
    assert headings(page) == ["Metrics", "Classes", "Confusion", "Method", "Environment"]


def test_the_most_wrong() -> None:
    """Catches an order by the probability of the prediction in the place of the truth, and right examples in it."""
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.0, 1.0]])
    assert most_wrong({"labels": np.array([1, 1, 0, 0]), "probabilities": p}) == [3, 0, 2]
    assert most_wrong({"labels": np.array([0.0, 5.0, 1.0]), "values": np.array([1.0, 2.0, 1.0])}) == [1, 0]
    several = {"labels": np.array([[1, 0], [0, 1]]), "probabilities": np.array([[0.9, 0.6], [0.1, 0.9]])}
    assert most_wrong(several) == [0]


def test_json() -> None:
    """Catches a number that JSON does not have, and an array that is not written."""
    value = as_json({1: np.array([1.0, math.inf]), "a": (np.float32(0.5), None, True)})
    assert value == {"1": [1.0, None], "a": [0.5, None, True]}
