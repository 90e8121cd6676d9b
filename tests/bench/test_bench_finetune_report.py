"""The report on fine-tuning makes its table from tiny stand-in data, without a network."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("accelerate", reason="Trainers need accelerate")
pytest.importorskip("sentence_transformers", reason="embeddings are trained by it")
pytest.importorskip("sklearn", reason="baselines are scikit-learn's")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetune_child  # noqa: E402
import finetune_parts  # noqa: E402
import finetune_report  # noqa: E402
from finetune_job import Job  # noqa: E402
from public_text import Unavailable  # noqa: E402

import vector_cases  # noqa: E402
from finetune_cases import moods, save_encoder, sentence  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LABELS = {"good": "ham", "bad": "spam"}


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU these tests run in a process where Triton interprets; nothing here runs a Triton kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"), positions=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Mapping[str, Path]]:
    """Stands in for public_data.data_files; ko-en cannot be had."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def records(name: str, n: int) -> list[dict[str, Any]]:
        if name in ("wordnet-classes", "spam"):
            return [{**each, "label": LABELS[each["label"]]} for each in moods(n, seed=n)]
        texts = [f"{sentence(['great', 'sad'], draw)} {'yes ' * (i % 7)}no {'film ' * (i // 7)}" for i in range(n)]
        if name == "wordnet-pairs":
            return [{"anchor": text, "positive": text.split()[0] + " day" * i} for i, text in enumerate(texts)]
        if name == "lee":
            return [{"sentence1": a, "sentence2": b, "score": i / n}
                    for i, (a, b) in enumerate(zip(texts, texts[1:] + texts[:1], strict=True))]  # fmt: skip
        answers = [{"text": ["no"], "answer_start": [text.index(" no ") + 1]} for text in texts]
        return [{"id": str(i), "question": "is the day fine ?", "context": text, "answers": answers[i]}
                for i, text in enumerate(texts)]  # fmt: skip

    def data_files(name: str) -> Mapping[str, Path]:
        if name == "ko-en":
            raise Unavailable("ko-en: there is no network")
        if name == "names-en":
            names = [("great", "B-a"), ("sad", "B-b"), ("the", "O"), ("film", "O")]
            rows = [names[i % 2 :] + names[: i % 3] for i in range(40)]
            lines = (json.dumps({"tokens": [w for w, _ in row], "labels": [x for _, x in row]}) + "\n" for row in rows)
            (folder / "names.jsonl").write_text("".join(lines), encoding="utf-8")
            return dict.fromkeys(("train", "eval"), folder / "names.jsonl")
        paths = {part: folder / f"{name}.{part}.jsonl" for part in ("train", "eval")}
        for part, path in paths.items():
            if not path.exists():
                lines = (json.dumps(each) + "\n" for each in records(name, 40 if part == "train" else 12))
                path.write_text("".join(lines), encoding="utf-8")
        return paths

    return data_files


def in_this_process(arguments: list[str], threads: int) -> dict[str, Any]:
    """The child's work, without the seconds that a new process takes."""
    vector_cases.reset_precision()
    record = finetune_child.timed([*arguments, "--device", "cpu"])
    assert record["status"] == 0
    return record


def test_a_table_of_all_parts(
    encoder: str, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a part that cannot be run, a row without its numbers, and a part without data that stops the others."""
    monkeypatch.setattr(finetune_parts, "COMPARED", {"wordnet-classes": (8, 64, 2)})
    (tmp_path / "text").write_text("\n".join(f"{i} " + "a long day of film " * 9 for i in range(9)), encoding="utf-8")
    monkeypatch.setattr(finetune_parts, "text_file", lambda name: tmp_path / "text")
    options: dict[str, Any] = {"quick": True, "run_command": in_this_process, "files": files}
    others = [name for name in finetune_report.PARTS if name != "spam"]
    assert finetune_report.report(others, tmp_path, encoder, **options) == 0, capsys.readouterr().err
    assert finetune_report.report(["spam"], tmp_path, encoder, **options) == 0  # beside those of before
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: len(part["rows"]) for name, part in parts.items()} == {
        "classes": 1, "embed": 3, "qa": 2, "accelerate": 3, "ko-en": 0, "spam": 1, "tokens": 1,
    }  # fmt: skip
    assert parts["ko-en"]["left_out"] == "ko-en: there is no network"
    for part in parts.values():
        for row in part["rows"]:
            assert row["missed_by"] >= 0 and row["training_seconds"] > 0 and row["steps"] > 0
            assert row["command"].startswith("fastbert finetune ") and str(tmp_path) not in row["command"]
    same = parts["accelerate"]["rows"][0]
    assert same["value"] <= 1e-4 and same["reached"] and len(same["curve"]) == 2
    page = (tmp_path / "results.md").read_text()
    assert page.count("| classify, ") == 2 and "Left out: ko-en: there is no network" in page
    for folder in ("classes", "spam", "embed", "qa", "tokens", "accelerate/wordnet-classes-on"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == {"metrics.json", "report.html"}


def test_bars(tmp_path: Path) -> None:
    """Catches a bar that counts as reached from the wrong side, and a distance to it with the wrong sign."""
    job = Job("classes", 1.0, tmp_path, tmp_path, "model", 1)
    for value, bar, lower, strict in ((0.5, 0.6, False, True), (0.6, 0.6, False, True), (0.6, 0.6, False, False),
                                      (0.5, 0.6, True, True), (0.7, 0.6, True, True)):  # fmt: skip
        job.row("t", "d", "m", value, baseline=("b", 0.1), bar=bar, lower=lower, strict=strict)
    assert [row["reached"] for row in job.rows] == [False, False, True, True, False]
    assert [row["missed_by"] for row in job.rows] == pytest.approx([0.1, 0.0, 0.0, 0.0, 0.1])
    assert job.rows[0]["baseline"] == "b"


def test_steps_fill_the_time(tmp_path: Path) -> None:
    """Catches a run that is longer than its time or its epochs, and a probe that counts the first slow steps."""
    asked: list[list[str]] = []

    def run_command(arguments: list[str], threads: int) -> dict[str, Any]:
        asked.append(arguments)
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir()
        for file in ("metrics.json", "report.html"):
            (output / file).write_text("{}")
        return {"step_seconds": [9.0, 9.0, *[0.5] * 6], "training_seconds": 1, "seconds": 1, "peak_bytes": 1}

    job = Job("classes", 100.0, tmp_path, tmp_path / "kept", "model", 1, run_command=run_command)
    for epochs in (100, 2):
        job.train("classify", [{"text": "a"}] * 20, [{"text": "b"}], batch_size=10, epochs=epochs, options=[])
    steps = [int(arguments[arguments.index("--steps") + 1]) for arguments in asked]
    assert steps == [8, 150, 8, 4]
    assert (tmp_path / "kept/classes/metrics.json").exists()


def test_most_frequent_labels() -> None:
    """Catches a baseline that gives a word its last label, or one to a word that training has not."""
    train = [{"tokens": ["a", "a", "b", "a"], "labels": ["O", "B-x", "B-y", "B-x"]}]
    found = finetune_parts.most_frequent(train, [{"tokens": ["b", "a", "c"], "labels": ["O"] * 3}])
    assert found == [["B-y", "B-x", "O"]]


def test_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a baseline of questions that takes another word than the nearest, or the punctuation with it."""
    import numpy as np

    vectors = {"a dog": [1.0, 0.0], "cats": [0.0, 1.0], "chase": [0.5, 0.5], "hounds": [3.0, 0.1]}
    monkeypatch.setattr(finetune_parts, "encode", lambda model, texts: np.array([vectors[text] for text in texts]))
    found = finetune_parts.guesses("model", [{"question": "a dog", "context": "cats chase hounds."}])
    assert [each[0] for each in found.values()] == ["cats chase hounds.", "hounds", "hounds"]


def test_what_a_reader_of_a_mail_sees_comes_first():
    """Catches a header that is lost or cut where it goes on in a second line, and mail without headers."""
    mail = "Received: from a\n\tby b\nSubject: one\n two\nDate: x\nFrom: me\n\nHello,\n\nSubject: no"
    read = finetune_parts.as_read(mail)
    assert read == "Subject: one\n two\nFrom: me\n\nHello,\n\nSubject: no\n\nReceived: from a\n\tby b\nDate: x"
    assert finetune_parts.as_read("just text").strip() == "just text"
