"""Runs of fine-tuning stop, break and go on, and the folder of the result holds what it should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fork_server
import helpers
from fastbert.training import finetune
from finetune_cases import FAST, losses, moods, save_encoder

transformers = pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("accelerate", reason="Trainers need accelerate")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def fields(encoder: str, output: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run of 12 steps with three evaluations."""
    data = {"task": "classify", "model": encoder, "train": moods(), "eval": moods(24, seed=1)}
    return {**FAST, **data, "output": str(output), "evaluate_every": 4, "log_every": 1, "dropout": 0.1, **changes}


# The process kills itself when the checkpoint of step 8 is being written, before it is whole.
KILLED = """
import json, os, signal, sys
from fastbert.training.finetuning import running
from fastbert.training import finetune
seal = running.seal
def dies(folder, facts):
    if facts["step"] == 8:
        os.truncate(folder / "model.safetensors", 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, facts)
running.seal = dies
finetune(**json.loads(sys.argv[1]))
"""


def test_a_run_that_was_killed_while_it_saved(encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a torn checkpoint that is resumed from, and a resumed run that ends elsewhere than an unbroken one."""
    whole = finetune(**fields(encoder, tmp_path / "whole"))
    broken = fields(encoder, tmp_path / "broken")
    command, env = [sys.executable, "-c", KILLED, json.dumps(broken)], helpers.source_env(OMP_NUM_THREADS="1")
    done = fork_server.run(command, env=env, modules=fork_server.TRAINERS, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "broken/checkpoints/checkpoint-8").is_dir()
    shutil.move(tmp_path / "broken", tmp_path / "moved")
    resumed = finetune(**{**broken, "output": str(tmp_path / "moved"), "resume": True})
    assert "checkpoint-8 is skipped" in caplog.text
    assert len(losses(resumed)) == resumed.steps == 12
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-6)
    assert resumed.metrics == whole.metrics and resumed.best_step == whole.best_step


def test_a_full_disk(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that costs the last good checkpoint, or an error that does not name it."""
    from fastbert.training.finetuning import running

    seal = running.seal

    def fails(folder: Path, facts: dict[str, Any]) -> None:
        if facts["step"] == 8:
            raise OSError(28, os.strerror(28), str(folder))
        seal(folder, facts)

    monkeypatch.setattr(running, "seal", fails)
    with pytest.raises(OSError, match="disk is full \\(checkpoint-4 stays; --resume continues from it"):
        finetune(**fields(encoder, tmp_path / "run"))
    assert [path.name for path in running.checkpoints(tmp_path / "run/checkpoints")] == ["checkpoint-4"]
    monkeypatch.setattr(running, "seal", seal)
    assert finetune(**fields(encoder, tmp_path / "run", resume=True)).steps == 12


def test_another_run_than_the_one_to_resume(encoder: str, tmp_path: Path) -> None:
    """Catches a run that goes on with other data or settings, and one that overwrites another."""
    run = fields(encoder, tmp_path / "run", steps=4)
    finetune(**run)
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        finetune(**run)
    with pytest.raises(ValueError, match="had other settings: learning_rate"):
        finetune(**{**run, "resume": True, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match="had other settings: data"):
        finetune(**{**run, "resume": True, "train": [*moods()[:-1], {"text": "a day", "label": "good"}]})


def test_best_and_last(encoder: str, tmp_path: Path) -> None:
    """Catches a last model that is given for the best, a best one that is deleted, and a run that does not stop."""
    import torch

    # The rate is high enough to unlearn what has been learnt.
    run = fields(encoder, tmp_path / "run", evaluate_every=2, epochs=20, early_stopping=2, learning_rate=3e-2, warmup=0)
    result = finetune(**run)
    scores = {e["step"]: e["eval_accuracy"] for e in result.history if "eval_accuracy" in e}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert result.best_step == best and result.steps == best + 4 < 120
    names = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert sorted(names) == sorted(f"checkpoint-{step}" for step in (best, best + 4))
    weights = {}
    for name in ("", "last", f"checkpoints/checkpoint-{best}", f"checkpoints/checkpoint-{best + 4}"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name)
        weights[name] = model.classifier.weight.detach()
    of_root, of_last, of_best, of_newest = weights.values()
    assert torch.equal(of_root, of_best) and torch.equal(of_last, of_newest) and not torch.equal(of_root, of_last)
    assert result.metrics["accuracy"] == scores[best]


def test_the_folder_of_a_result(encoder: str, tmp_path: Path) -> None:
    """Catches a result without its metrics, card or tokenizer, and a number that JSON has no name for."""
    finetune(**fields(encoder, tmp_path / "run", steps=4, evaluate_every=None, group_by_length=True))
    facts = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    low, high = facts["intervals"]["accuracy"]
    assert low <= facts["metrics"]["accuracy"] <= high
    assert facts["labels"]["counts"].keys() == {"bad", "good"} and facts["headline"] == "accuracy"
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "accuracy" in page and "Examples that are most wrong" in page
    assert "pipeline_tag: text-classification" in card and "| labels | bad, good |" in card
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run").vocab_size > 20


def test_without_evaluation(encoder: str, tmp_path: Path) -> None:
    """Catches a run that needs data for evaluation though none is wanted."""
    result = finetune(**fields(encoder, tmp_path / "run", eval=None, eval_share=0, steps=4))
    assert result.metrics == {} and result.best_step is None
    assert "There was no evaluation" in (tmp_path / "run/README.md").read_text(encoding="utf-8")


def test_order_of_an_evaluation(encoder: str, tmp_path: Path) -> None:
    """Catches predictions that come in another order than their records where texts are grouped by length."""
    plain, grouped = (
        finetune(**fields(encoder, tmp_path / name, group_by_length=name == "grouped", epochs=4, dropout=0.0))
        for name in ("plain", "grouped")
    )
    assert min(plain.metrics["accuracy"], grouped.metrics["accuracy"]) > 0.85


def test_the_labels_of_a_head_keep_their_order(encoder: str, tmp_path: Path) -> None:
    """Catches a head whose labels are sorted anew, so that what it has learnt counts for another label."""
    run = fields(encoder, tmp_path / "first", label_order=("good", "bad"), epochs=4, dropout=0.0)
    first = finetune(**run)
    run = {**run, "model": str(first.output), "output": str(tmp_path / "second"), "label_order": ()}
    second = finetune(**{**run, "steps": 1, "learning_rate": 1e-9})
    assert transformers.AutoConfig.from_pretrained(second.output).id2label == {0: "good", 1: "bad"}
    assert second.metrics["accuracy"] == first.metrics["accuracy"] > 0.85


def test_a_datasets_dataset(encoder: str, tmp_path: Path) -> None:
    """Catches a datasets.Dataset that is not taken as it is."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    train = datasets.Dataset.from_list(moods())
    assert finetune(**fields(encoder, tmp_path / "run", train=train, steps=2)).steps == 2
