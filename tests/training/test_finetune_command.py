"""`fastbert finetune` takes a file, and `fastbert classify` its result."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import finetune as command
from fastbert.cli.main import main
from fastbert.training.finetuning.options import HELP, ONLY, add_arguments, settings_of
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import TASKS
from finetune_cases import moods, save_encoder

pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("accelerate", reason="Trainers need accelerate")
NEEDED = {"task": "classify", "model": "m", "train": "t.csv", "output": "o"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options of data in CSV, whose columns have other names."""
    for name, rows in (("train", moods()), ("eval", moods(24, seed=1))):
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["review", "stars"])
            writer.writerows((row["text"], row["label"]) for row in rows)
    data = ["--train", str(tmp_path / "train.csv"), "--eval", str(tmp_path / "eval.csv")]
    return [*data, "--columns", "text=review", "label=stars", "--output", str(tmp_path / "out"), "--no-progress"]


def test_train_and_use(encoder: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command whose result `fastbert classify` cannot read or reads otherwise."""
    options = ["--model", encoder, "--epochs", "5", "--batch-size", "16", "--learning-rate", "5e-3"]
    options += ["--precision", "fp32", "--dropout", "0", "--device", "cpu"]
    assert main(["finetune", "classify", *files, *options]) == 0
    assert "accuracy\t" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert facts["metrics"]["accuracy"] > 0.85 and set(facts["calls"]) == {"fastbert"}
    texts = ["great lovely film", "the awful sad room"]
    assert main(["classify", *texts, "--top-k", "1", "--model", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["good", "bad"]


def test_dry_run(encoder: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dry run that trains, writes, or says nothing of labels, lengths, truncation, steps or time."""
    assert main(["finetune", "classify", *files, "--model", encoder, "--dry-run", "--max-length", "8"]) == 0
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    counts = dict(each.split(": ") for each in shown["counts"].split(", "))
    assert sum(map(int, counts.values())) == 96 == int(shown["records of training"])
    lengths = [len(row["text"].split()) + 2 for row in moods()]
    assert shown["tokens of an input, by percentile"].endswith(f"100: {max(lengths)}")
    assert int(shown["truncated"]) == sum(length > 8 for length in lengths) > 0
    assert shown["steps"] == "9" and float(shown["seconds of training"]) > 0
    assert int(shown["tokens of a step"]) == round(32 * sum(min(n, 8) for n in lengths) / 96)
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_line(
    encoder: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an error in a file without the line, or with another than an editor shows."""
    with open(tmp_path / "eval.csv", "a", encoding="utf-8", newline="") as file:
        file.write("the film,odd\n")
    assert main(["finetune", "classify", *files, "--model", encoder]) == 1
    assert "eval.csv, line 26: label 'odd' is not among those of the training data" in capsys.readouterr().err


@pytest.mark.parametrize("task", list(TASKS))
def test_what_must_be_given(task: str) -> None:
    """Catches an option that a run can do without and that must be given, or whose default is not the settings'."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, task)
    settings = settings_of(parser.parse_args(["--model", "m", "--train", "t.csv", "--output", "o"]))
    assert settings == FinetuneSettings(**{**NEEDED, "task": task})


def test_every_field_has_an_option() -> None:
    """Catches a field of the settings that the command line lacks, and a task without a line in its help."""
    names = [name for options in HELP.values() for name in options]
    fields = {field.name for field in dataclasses.fields(FinetuneSettings)} - {"task"}
    assert sorted(names) == sorted(fields) and ONLY.keys() <= fields
    assert command.TASKS.keys() == TASKS.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 3}, "train: expected a path or an iterable of dicts, got int"),
        ({"columns": ["text"]}, "columns: expected NAME=COLUMN, got 'text'"),
        ({"epochs": 0.0}, "epochs: expected a number from"),
        ({"lora": 0}, "lora: expected an int of at least 1"),
        ({"lora": 4, "freeze_encoder": True}, "lora: its adapters are in the encoder"),
        ({"early_stopping": 1, "eval_share": 0.0}, "early_stopping: expected data for evaluation"),
        ({"label_order": ("a", "a")}, "label_order: a label is named twice"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_settings_that_no_run_can_have(changes: dict[str, Any], message: str) -> None:
    """Catches a setting that fails late, or under another name."""
    with pytest.raises((ValueError, TypeError), match=message):
        FinetuneSettings(**{**NEEDED, **changes})
