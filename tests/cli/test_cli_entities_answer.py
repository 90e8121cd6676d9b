"""The subcommands entities and answer print what the pipelines give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli_cases import fails
from fastbert import BertForQuestionAnswering, BertForTokenClassification, EntityRecognizer, QuestionAnswerer
from fastbert.cli.main import main
from helpers import tiny_bert

TEXTS = ["Ada lives in London", "a river is wide and slow, a river is wide", "서울에 갔다"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny random models, tagger and reader."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("heads")
    config, tokenizer = tiny_bert(TEXTS * 2, 90, num_hidden_layers=1)
    BertForQuestionAnswering(config).save_pretrained(path / "reader")
    config.id2label = {0: "O", 1: "B-X", 2: "I-X"}
    tagger = BertForTokenClassification(config)
    torch.nn.init.constant_(tagger.classifier.bias[1:], 1.0)
    tagger.save_pretrained(path / "tagger")
    for name in ("reader", "tagger"):
        tokenizer.save_pretrained(path / name)
    return path


def test_entities(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches texts apart from their entities, an option that does nothing, and escaped Korean."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    argv = ["--model", str(heads / "tagger"), "--device", "cpu", "--max-length", "12", "--stride", "3"]
    expected = EntityRecognizer.from_pretrained(
        heads / "tagger", device="cpu", strategy="first", max_length=12, stride=3
    )(TEXTS)
    assert main(["entities", "--file", str(file), "--field", "body", "--strategy", "first", *argv]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines == [{"text": text, "entities": some} for text, some in zip(TEXTS, expected, strict=True)]
    assert "서울에" in out and any(expected)
    assert main(["entities", *TEXTS, "--strategy", "first", "--lines", *argv]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(int(row[0]), row[1], int(row[3]), int(row[4]), row[5]) for row in rows] == [
        (i, each["entity_group"], each["start"], each["end"], each["word"])
        for i, some in enumerate(expected, start=1)
        for each in some
    ]
    assert main(["entities", TEXTS[0], "--strategy", "none", "--lines", *argv]) == 0


def test_answer(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches questions apart from their contexts, an option that does nothing, and a file that is cut."""
    file, book = tmp_path / "questions.jsonl", tmp_path / "book.txt"
    pairs = [("who?", TEXTS[0]), ("wide?", TEXTS[1])]
    file.write_text("".join(json.dumps({"question": q, "context": c}) + "\n" for q, c in pairs))
    book.write_text("\n".join(TEXTS), encoding="utf-8")
    model = ["--model", str(heads / "reader"), "--device", "cpu"]
    options = ["--top-k", "3", "--answer-length", "4", "--no-answer", "--threshold", "0", "--stride", "5"]
    ours = QuestionAnswerer.from_pretrained(
        heads / "reader", device="cpu", top_k=3, max_answer_length=4, no_answer=True, threshold=0.0, stride=5
    )
    assert main(["answer", "--file", str(file), *model, *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = ours([q for q, _ in pairs], [c for _, c in pairs])
    assert lines == [{"question": q, "answers": some} for (q, _), some in zip(pairs, expected, strict=True)]
    assert main(["answer", "who?", "wide?", "--context-file", str(book), "--lines", *model, *options]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    context = book.read_text(encoding="utf-8")
    expected = ours(["who?", "wide?"], [context, context])
    assert [(int(row[0]), int(row[2]), int(row[3])) for row in rows] == [
        (i, each["start"], each["end"]) for i, some in enumerate(expected, start=1) for each in some
    ]


def test_wrong_calls(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches results of random weights, a bad line without its number, and questions without a context."""
    other = heads / "reader"
    assert "has no token-classification head" in fails(capsys, "entities", "a", "--model", str(other))
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "context": "b"}\n{"question": "a"}\n')
    assert main(["answer", "--file", str(file), "--model", str(other), "--device", "cpu"]) == 1
    assert "line 2: expected a JSON object with strings under 'question' and 'context'" in capsys.readouterr().err
    for argv in (["answer", "a"], ["answer", "--context", "b"], ["answer", "a", "--context", "b", "--threshold", "1"]):
        with pytest.raises(SystemExit):
            main([*argv, "--model", str(other)])
    with pytest.raises(SystemExit):
        main(["entities", "--model", str(other)])
