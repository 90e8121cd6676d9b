"""The curve and the card of a run say what its journal holds, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastbert.pages.html import STYLESHEET
from fastbert.training.journal import Journal
from fastbert.training.model_card import write_card
from fastbert.training.report import History, curve, smoothed, verdict_of, write_curve

FACTS: dict[str, Any] = {
    "parameters": 11_171_074, "layers": 4, "hidden_size": 256, "model_type": "bert", "model_config": "mini",
    "vocabulary": 8000, "nsp": True, "mlm_probability": 0.15, "files": 3, "documents": 1276, "corpus_tokens": 339_000,
    "corpus_hash": "ab12", "held_out_documents": 13, "steps": 40, "tokens_per_step": 8192, "processes": 1,
    "precision": "fp32", "device": "a CPU | <2 threads>", "seed": 0, "unigram_loss": 6.3, "unigram_accuracy": 0.037,
    "versions": {"fastbert": "1.0", "torch": "2.13"},
}  # fmt: skip


def write_journal(folder: Path, *, nsp: bool = True, evaluations: bool = True, steps: int = 40) -> None:
    """A run whose losses sink."""
    with Journal(folder, tensorboard=False) as journal:
        journal.write("start", 0, **FACTS)
        for step in range(1, steps + 1):
            values = {"mlm_loss": 9 - 4 * step / steps, "mlm_accuracy": 0.4 * step / steps}
            if nsp:
                values |= {"nsp_loss": 0.6, "nsp_accuracy": 0.75}
            values |= {"loss": values["mlm_loss"], "tokens": step * 8000}
            journal.write(
                "train", step, learning_rate=1e-4, **(values | ({"mlm_loss": float("nan")} if step == 7 else {}))
            )
            if evaluations and step % 10 == 0:
                journal.write("evaluation", step, **values)
        journal.write("end", steps, seconds=90.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_journal(tmp_path)
    return tmp_path


def test_the_page(folder: Path) -> None:
    """Catches a page with another stylesheet, with something from outside, or without its numbers and figure."""
    pytest.importorskip("matplotlib", reason="draws the figure")
    assert write_curve(folder) == [folder / "curve.png", folder / "curve.html"]
    page = (folder / "curve.html").read_text(encoding="utf-8")
    assert re.findall(r"<style>(.*?)</style>", page, flags=re.S)[0] == STYLESHEET
    assert "http" not in page and "<script" not in page and not re.search(r'\b(src|href)="(?!#)', page)
    assert page.count("<svg") == 1 and re.findall(r"<h2>(.*?)</h2>", page) == [
        "Curve", "Evaluations", "Method", "Environment",
    ]  # fmt: skip
    sentence = re.findall(r'<p class="sentence">(.*?)</p>', page, flags=re.S)[0]
    assert sentence == (
        "After step 40, masked tokens have a loss of 5.000 on held-out documents, and 6.300 by frequency alone; "
        "40.0% are right, and 3.7% by frequency alone. 75.0% of pairs are right, where guessing gives half."
    )
    assert "<td>320,000</td><td>5.0000</td><td>40.00%</td>" in page and "a CPU | &lt;2 threads&gt;" in page
    for text in (
        "held-out documents",
        "by frequency alone",
        "guessing",
        "training, smoothed",
        "320 k",
        "Learning rate",
    ):
        assert text in page, text
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["no evaluation", "no pairs", "one step", "thousands of steps", "no step"])
def test_odd_runs(tmp_path: Path, case: str) -> None:
    """Catches a run that ends with a traceback because its curve has nothing, or very much, to draw."""
    steps = {"one step": 1, "thousands of steps": 3000, "no step": 0}.get(case, 40)
    write_journal(tmp_path, nsp=case != "no pairs", evaluations=case != "no evaluation", steps=steps)
    assert (tmp_path / "curve.html") in write_curve(tmp_path)
    history = History.read(tmp_path)
    assert ("of pairs" in verdict_of(history).sentence) == (case not in ("no pairs", "no step"))
    assert verdict_of(history).good == (steps > 0)
    if case == "thousands of steps":
        assert len((tmp_path / "curve.html").read_bytes()) < 400_000
    assert "Results" in write_card(tmp_path, FACTS).read_text(encoding="utf-8")


def test_a_loss_above_the_unigram_loss_is_not_good() -> None:
    """Catches a model that has learnt less than frequencies, on a page that looks like success."""
    evaluation = {"step": 5, "mlm_loss": 7.0, "mlm_accuracy": 0.03}
    assert not verdict_of(History(FACTS, (), (evaluation,), {})).good


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that ends with an ImportError, and a missing picture that nobody speaks of."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_curve(folder) == [folder / "curve.html"]
    page = (folder / "curve.html").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in page and "matplotlib is not installed" in caplog.text
    assert "<svg" not in page and "Evaluations" in page
    assert "curve.png" not in write_card(folder, FACTS).read_text(encoding="utf-8")


def test_no_journal(tmp_path: Path) -> None:
    """Catches a page of nothing in a folder without a run."""
    with pytest.raises(FileNotFoundError):
        write_curve(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_series_leave_out_what_is_not_there(folder: Path) -> None:
    """Catches null drawn as 0, and a smoothed line that is shifted or shorter."""
    history = History.read(folder)
    steps, _ = history.series("mlm_loss")
    assert steps.tolist() == [step for step in range(1, 41) if step != 7]
    assert history.series("gradient_norm").shape == (2, 0)
    line = np.arange(1000.0)
    np.testing.assert_allclose(smoothed(line)[10:-10], line[10:-10])
    assert smoothed(line).shape == (1000,) and smoothed(np.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert "loss of masked tokens 5.000" in curve(history).alt


def test_the_card(folder: Path) -> None:
    """Catches front matter that the hub cannot read, and a number of the run that is left out."""
    (folder / "curve.png").touch()
    text = write_card(folder, {**FACTS, "seconds": 4000.0, "tokens_seen": 320_000, "language": "no"}).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["bert", "fill-mask", "fastbert"],
        "language": ["no"],
    }
    for line in (
        "| loss of masked tokens (nats) | 5.000 | 6.300 |", "| masked tokens predicted right | 40.0% | 3.7% |",
        "| pairs told apart, next or random | 75.0% |  |", "| text: tokens | 339,000 |", "| duration | 1 h 07 min |",
        "| seed | 0 |", r"| device | a CPU \| <2 threads> |", "| versions | fastbert 1.0, torch 2.13 |", "(curve.png)",
        "fastbert next-sentence", "On 13 held-out documents, after step 40.", "states no license",
    ):  # fmt: skip
        assert line in body, line


def test_the_card_claims_nothing_that_is_not_known(tmp_path: Path) -> None:
    """Catches results, a language or a picture in the card of a run that had none."""
    text = write_card(tmp_path, {"model_config": "./earlier", "nsp": False}).read_text()
    assert "language" not in text.split("---")[1] and "curve" not in text and "next-sentence" not in text
    assert "no evaluation on held-out documents" in text and "None" not in text
    assert "continued from `./earlier`" in text and "besides what `./earlier` had read" in text
    assert "went on" not in write_card(tmp_path, {"model_config": "mini"}).read_text()
    assert "went on" not in write_card(tmp_path, {"model_config": "shapes/config.json"}).read_text()
