"""The subcommands similarity, fill-mask, next-sentence and classify print what the models give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cli_cases import TEXTS, encode, fails
from fastbert import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    Tokenizer,
)
from fastbert.cli.main import main


def test_similarity(models: SimpleNamespace, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a cosine that is none, and a search that loses lines, their numbers or their order."""
    assert main(["similarity", TEXTS[0], TEXTS[4], "--model", models.sentence, "--device", "cpu"]) == 0
    vectors = encode(models, TEXTS)
    cosines = vectors @ vectors[0]
    assert float(capsys.readouterr().out) == pytest.approx(cosines[4], abs=2e-6)

    argv = ["similarity", TEXTS[0], "--file", str(text_file), "--top-k", "4", "--model", models.sentence]
    assert main([*argv, "--device", "cpu"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    assert rows[0][1:] == ["1", TEXTS[0]]
    best = np.argsort(-cosines, kind="stable")[:4]
    np.testing.assert_allclose([float(row[0]) for row in rows], cosines[best], atol=2e-6)
    assert all(TEXTS[int(row[1]) - 1] == row[2] for row in rows)


def test_fill_mask(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mask left out, probabilities that are not those of the logits, and tokens in the wrong order."""
    text = "a [MASK] is [MASK]"
    assert main(["fill-mask", text, "--top-k", "3", "--model", models.mlm, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[MASK] 1 of 2" and lines[4] == "[MASK] 2 of 2" and len(lines) == 8
    model, tokenizer = BertForMaskedLM.from_pretrained(models.mlm), Tokenizer.from_pretrained(models.mlm)
    encoding = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**encoding).logits[0].softmax(-1)
    for place, shown in ((2, lines[1:4]), (4, lines[5:8])):
        values, ids = probabilities[place].topk(3)
        assert [line.split("\t")[1] for line in shown] == tokenizer.convert_ids_to_tokens(ids)
        np.testing.assert_allclose([float(line.split("\t")[0]) for line in shown], values, atol=2e-6)
    assert "expected [MASK] in it" in fails(capsys, "fill-mask", "a river", "--model", models.mlm)
    long = "fish " * 50 + "[MASK]"
    assert main(["fill-mask", long, "--model", models.mlm, "--device", "cpu"]) == 1, "cut away"
    assert "within the 24 tokens that are read" in capsys.readouterr().err


def test_next_sentence(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the two labels swapped, and sentences not encoded as a pair."""
    assert main(["next-sentence", TEXTS[0], TEXTS[2], "--model", models.nsp, "--device", "cpu"]) == 0
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    encoding = Tokenizer.from_pretrained(models.nsp)([TEXTS[0]], [TEXTS[2]], return_tensors="pt")
    assert encoding.token_type_ids.max() == 1
    with torch.no_grad():
        p = BertForNextSentencePrediction.from_pretrained(models.nsp)(**encoding).logits.softmax(-1)[0, 0].item()
    assert float(shown["p_is_next"]) == pytest.approx(p, abs=2e-6)
    assert shown["is_next"] == str(p > 0.5)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_classify(
    models: SimpleNamespace, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str | None
) -> None:
    """Catches labels apart from their probabilities, padding that changes them, and a softmax where none belongs."""
    model = BertForSequenceClassification.from_pretrained(models.classifier)
    tokenizer = Tokenizer.from_pretrained(models.classifier)
    model.config.problem_type = problem
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(["classify", "--file", str(text_file), "--model", folder, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TEXTS)
    for text, line in zip(TEXTS, lines, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer([text], return_tensors="pt")).logits[0]
        values = {None: logits.softmax(-1), "regression": logits}.get(problem, logits.sigmoid()).tolist()
        labels, numbers = line.split("\t")[::2], [float(x) for x in line.split("\t")[1::2]]
        expected = dict(zip(("bad", "fair", "good"), values, strict=True))
        assert labels == (list(expected) if problem == "regression" else sorted(expected, key=lambda x: -expected[x]))
        np.testing.assert_allclose(numbers, [expected[label] for label in labels], atol=1e-5)
    assert main(["classify", TEXTS[0], "fish", "--top-k", "1", "--model", folder, "--device", "cpu"]) == 0
    assert [line.count("\t") for line in capsys.readouterr().out.splitlines()] == [1, 1]


@pytest.mark.parametrize(
    ("argv", "head"),
    [
        (["fill-mask", "a [MASK]"], "masked-language-model"),
        (["next-sentence", "a", "b"], "next-sentence"),
        (["classify", "a"], "classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_head_is_refused(
    models: SimpleNamespace, capsys: pytest.CaptureFixture[str], argv: list[str], head: str
) -> None:
    """Catches results of random weights."""
    assert f"has no {head} head: it lacks " in fails(capsys, *argv, "--model", models.sentence)
