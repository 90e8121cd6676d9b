"""A dry run of vectors and of cross-encoders says what a run would do, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vector_cases
from fastbert.cli.main import main
from vector_cases import PAIRS

pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vector_cases.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    return str(path)


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """What a dry run prints, by name."""
    vector_cases.reset_precision()
    assert main(["finetune", *options, "--dry-run", "--device", "cpu", "--no-progress"]) == 0
    printed = [line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line]
    return {line[0]: line[1] for line in printed}


def n_words(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def test_embed(encoder: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dry run that writes, or whose lengths, truncation, steps or tokens are not those of the data."""
    output = tmp_path / "out"
    options = ["--model", encoder, "--train", pairs, "--eval", pairs, "--output", str(output), "--batch-size", "6"]
    facts = shown(capsys, "embed", *options, "--max-length", "4", "--epochs", "2")
    lengths = [n_words(text) + 2 for pair in PAIRS for text in (pair["anchor"], pair["positive"])]
    cut = [min(length, 4) for length in lengths]
    assert facts["loss"] == "mnrl" and facts["training"].startswith(f"records: {len(PAIRS)}")
    assert facts["tokens of an input, by percentile"].endswith(f"100: {max(lengths)}")
    assert facts["inputs that were counted"] == str(len(lengths)) and facts["longest input that is read"] == "4"
    assert facts["of these truncated"] == str(sum(length > 4 for length in lengths))
    assert facts["tokens of a step"] == str(round(12 * sum(cut) / len(cut)))
    assert float(facts["seconds of training"]) == pytest.approx(
        int(facts["steps"]) * float(facts["seconds of a step"]), rel=1e-2
    )
    assert not output.exists()
    vector_cases.reset_precision()
    assert main(["finetune", "embed", *options, "--epochs", "2", "--device", "cpu", "--no-progress"]) == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == int(facts["steps"])


@pytest.mark.parametrize("loss", ["bce", "lambda"])
def test_rerank(encoder: str, pairs: str, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches pairs that are counted as two inputs, or a list that counts as one."""
    options = ["--model", encoder, "--train", pairs, "--eval", pairs, "--miner", encoder, "--mine-negatives", "1"]
    facts = shown(capsys, "rerank", *options, "--loss", loss, "--output", str(tmp_path / "out"))
    right = [n_words(pair["anchor"], pair["positive"]) + 3 for pair in PAIRS]
    assert int(facts["inputs that were counted"]) == 2 * len(right)  # a wrong text for each right one
    assert int(facts["tokens of an input, by percentile"].rpartition(": ")[2]) >= max(right)
    assert int(facts["steps"]) >= 1 and float(facts["seconds of a step"]) > 0
    assert not (tmp_path / "out").exists()
