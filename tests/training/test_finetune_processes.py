"""Two processes of torchrun fine-tune as one does with batches of twice the size, and leave one result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finetune_cases
import fork_server
import pretraining_cases
import vector_cases
from fastbert.cli.main import main
from vector_cases import PAIRS

pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# Sums of gradients have another order on two processes; losses are about 1.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vector_cases.save_encoder(tmp_path_factory.mktemp("encoder"))


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def both(output: Path, batch_size: int, *options: str, as_a_user: bool = False) -> tuple[Path, Path, str]:
    """The results of a command of `fastbert finetune`, by one process and by two; and what the two have printed."""
    common = [*options, "--device", "cpu", "--no-progress", "--precision", "fp32", "--log-every", "1"]
    one, two = output / "one", output / "two"
    vector_cases.reset_precision()
    assert main(["finetune", *common, "--batch-size", str(2 * batch_size), "--output", str(one)]) == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastbert"]
    command = [*start, "finetune", *common, "--batch-size", str(batch_size), "--output", str(two)]
    env = pretraining_cases.environment()
    if as_a_user:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    else:
        done = fork_server.run(command, env=env, modules=fork_server.TRAINERS, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two, done.stdout


def test_embed(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches negatives of one process alone, and results or lines that are written twice."""
    options = ["embed", "--model", encoder, "--train", written(tmp_path / "train.jsonl", PAIRS)]
    options += ["--eval", str(tmp_path / "train.jsonl"), "--epochs", "2", "--learning-rate", "3e-3"]
    one, two, printed = both(tmp_path, 6, *options)
    check_vectors(one, two, printed)
    capsys.readouterr()
    texts = tmp_path / "texts.txt"
    texts.write_text("balo demu\nfina gosa\n")
    assert main(["embed", str(texts), "--model", str(two), "--output", str(tmp_path / "vectors.npy")]) == 0


def test_rerank(encoder: str, tmp_path: Path) -> None:
    """Catches processes that mine other negatives, or that score pairs otherwise than one does."""
    options = ["rerank", "--model", encoder, "--train", written(tmp_path / "train.jsonl", PAIRS), "--miner", encoder]
    options += ["--eval", str(tmp_path / "train.jsonl"), "--epochs", "2", "--learning-rate", "3e-3"]
    check_vectors(*both(tmp_path, 8, *options, "--mine-negatives", "1"))


def check_vectors(one: Path, two: Path, printed: str) -> None:
    """Two processes have the curve, the scores and the files of one, and speak once."""
    facts = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    ours, theirs = ([loss for _, loss in each["losses"]] for each in facts)
    assert len(ours) >= 8 and theirs == pytest.approx(ours, abs=TOLERANCE)
    assert facts[1]["after"]["mrr"] == pytest.approx(facts[0]["after"]["mrr"], abs=0.02)
    assert facts[1]["data"] == facts[0]["data"] and facts[1]["steps"] == facts[0]["steps"]
    assert printed.count("mrr: ") == 1 and printed.count("metrics.json and report.html") == 1


def test_classify(tmp_path: Path) -> None:
    """Catches a head that two processes or accumulated batches train otherwise, and lines that are printed twice."""
    encoder = finetune_cases.save_encoder(tmp_path / "encoder")
    train = written(tmp_path / "train.jsonl", finetune_cases.moods())
    options = ["classify", "--model", encoder, "--train", train, "--dropout", "0", "--learning-rate", "5e-3"]
    options += ["--eval", written(tmp_path / "eval.jsonl", finetune_cases.moods(25, seed=1)), "--epochs", "3"]
    one, two, printed = both(tmp_path, 8, *options, as_a_user=True)
    facts = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    states = [
        json.loads((folder / "checkpoints/checkpoint-18/trainer_state.json").read_text()) for folder in (one, two)
    ]
    ours, theirs = ([line["loss"] for line in each["log_history"] if "loss" in line] for each in states)
    assert len(ours) == 18 and theirs == pytest.approx(ours, abs=TOLERANCE)
    scores = [{name: value for name, value in each["metrics"].items() if isinstance(value, float)} for each in facts]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert printed.count("accuracy\t") == 1 and printed.count("model\t") == 1
    vector_cases.reset_precision()
    parts = ["--batch-size", "8", "--accumulate", "2", "--device", "cpu", "--no-progress", "--precision", "fp32"]
    assert main(["finetune", *options, *parts, "--log-every", "1", "--output", str(tmp_path / "parts")]) == 0
    state = json.loads((tmp_path / "parts/checkpoints/checkpoint-18/trainer_state.json").read_text())
    assert [line["loss"] for line in state["log_history"] if "loss" in line] == pytest.approx(ours, abs=TOLERANCE)


def test_tokens(tmp_path: Path) -> None:
    """Catches batches with few words that count as much in an update as those with many."""
    encoder = finetune_cases.save_encoder(tmp_path / "encoder")
    texts = [row["text"].split() for row in finetune_cases.moods(48)]
    rows = [
        {
            "tokens": words[: 1 + 5 * (i % 2)],
            "labels": ["B-W" if "o" in word else "O" for word in words[: 1 + 5 * (i % 2)]],
        }
        for i, words in enumerate(texts)
    ]
    train = written(tmp_path / "train.jsonl", rows)
    options = ["tokens", "--model", encoder, "--train", train, "--eval-share", "0", "--dropout", "0", "--epochs", "2"]
    one, two, _ = both(tmp_path, 4, *options, "--learning-rate", "5e-3")
    vector_cases.reset_precision()
    parts = ["--batch-size", "4", "--accumulate", "2", "--device", "cpu", "--no-progress", "--precision", "fp32"]
    assert main(["finetune", *options, "--learning-rate", "5e-3", *parts, "--log-every", "1",
                 "--output", str(tmp_path / "parts")]) == 0  # fmt: skip
    curves = []
    for folder in (one, two, tmp_path / "parts"):
        state = json.loads((folder / "checkpoints/checkpoint-12/trainer_state.json").read_text())
        curves.append([line["loss"] for line in state["log_history"] if "loss" in line])
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], abs=TOLERANCE)
    assert curves[2] == pytest.approx(curves[0], abs=TOLERANCE)
