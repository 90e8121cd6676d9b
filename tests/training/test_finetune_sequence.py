"""Heads for whole texts learn toy problems, and refuse records that they cannot take, with the place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.training import finetune
from finetune_cases import BAD, FAST, GOOD, losses, moods, save_encoder, sentence

transformers = pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("accelerate", reason="Trainers need accelerate")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def run(encoder: str, tmp_path: Path) -> Any:
    """Fine-tunes the tiny encoder in a folder of its own."""
    folders = iter(range(100))

    def trained(task: str, train: Any, **changes: Any) -> Any:
        output = str(tmp_path / f"run{next(folders)}")
        return finetune(**{**FAST, "task": task, "model": encoder, "train": train, "output": output, **changes})

    return trained


def test_classes_of_texts(run: Any) -> None:
    """Catches a head that does not learn, labels in the wrong order, or a result that transformers cannot read."""
    result = run("classify", moods(160), eval=moods(40, seed=1), epochs=3)
    assert result.metrics["accuracy"] > 0.9
    pipe = transformers.pipeline("text-classification", model=str(result.output), device="cpu")
    assert [each["label"] for each in pipe(["great lovely film", "the awful sad room"])] == ["good", "bad"]
    config = transformers.AutoConfig.from_pretrained(result.output)
    assert config.id2label == {0: "bad", 1: "good"} and config.architectures == ["BertForSequenceClassification"]


def test_pairs(run: Any) -> None:
    """Catches a second text that is left out: what one text says alone decides nothing here."""
    draw, data = random.Random(0), []
    for _ in range(240):
        first, second = draw.choice([GOOD, BAD]), draw.choice([GOOD, BAD])
        pair = {"text": " ".join(draw.choices(first, k=3)), "text_pair": " ".join(draw.choices(second, k=3))}
        data.append({**pair, "label": "same" if first is second else "other"})
    result = run("classify", data, epochs=12, eval_share=0.2)
    assert result.metrics["accuracy"] > 0.8


def test_several_labels(run: Any) -> None:
    """Catches labels that exclude one another, and cells whose labels are not split."""
    draw, data = random.Random(0), []
    for _ in range(160):
        kinds = draw.choice([("good",), ("bad",), ("good", "bad"), ()])
        words = [w for kind in kinds for w in draw.choices(GOOD if kind == "good" else BAD, k=2)]
        cell = ", ".join(kinds) or None  # as a table has them
        data.append({"text": " ".join([*words, "the", "film"]), "labels": cell if len(data) % 2 else kinds})
    result = run("multilabel", data, epochs=8, class_weights="balanced")
    assert result.metrics["micro_f1"] > 0.9
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.output)
    assert model.config.problem_type == "multi_label_classification"


def test_numbers(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches targets that are cast to whole numbers, and whole numbers that pass without a word."""
    draw = random.Random(0)
    counts = [draw.randint(0, 4) for _ in range(160)]
    data = [{"text": " ".join(["great"] * n + ["awful"] * (4 - n)), "label": 0.25 * n} for n in counts]
    result = run("regress", data, epochs=8)
    assert result.metrics["pearson"] > 0.9 and result.metrics["mse"] < 0.03
    assert "whole numbers" not in caplog.text
    run("regress", [{**row, "label": str(int(4 * row["label"]))} for row in data], steps=1)
    assert "all are whole numbers, 5 different ones" in caplog.text


def test_choices(run: Any) -> None:
    """Catches choices whose order is lost between the data and the logits."""
    draw, data = random.Random(0), []
    for i in range(160):
        right = draw.randint(0, 2)
        choices = [sentence(GOOD if j == right else BAD, draw) for j in range(3)]
        data.append({"question": "the film ?", "choices": choices, "label": choices[right] if i % 2 else right})
    result = run("choice", data, epochs=6)
    assert result.metrics["accuracy"] > 0.9
    assert transformers.AutoModelForMultipleChoice.from_pretrained(result.output).config.num_hidden_layers == 2


def test_accelerated_or_not(run: Any) -> None:
    """Catches an accelerated run whose losses leave those of the model's own code (dropout 0, fp32)."""
    ours, theirs = (
        run("classify", moods(), accelerate=on, log_every=1, eval=moods(24, seed=1)) for on in (True, False)
    )
    assert len(losses(ours)) == ours.steps == 12
    calls = [json.loads((each.output / "metrics.json").read_text())["calls"] for each in (ours, theirs)]
    assert set(calls[0]) == {"fastbert"} and calls[0]["fastbert"] > 12 and calls[1] == {}
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4, atol=2e-5)
    assert abs(ours.metrics["expected_calibration_error"] - theirs.metrics["expected_calibration_error"]) < 1e-3


def test_frozen_encoder(run: Any, encoder: str) -> None:
    """Catches an encoder that is trained though it is frozen, and a head that is not."""
    result = run("classify", moods(), freeze_encoder=True)
    before = transformers.AutoModel.from_pretrained(encoder).state_dict()
    after = transformers.AutoModel.from_pretrained(result.output).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("pooler"))
    assert losses(result)[-1] < 0.75


def test_adapters_are_merged(run: Any, encoder: str) -> None:
    """Catches adapters that are lost on saving, or a folder that needs PEFT to be read."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    result = run("classify", moods(160), lora=4, epochs=4, eval=moods(40, seed=1), learning_rate=1e-2)
    assert result.metrics["accuracy"] > 0.9
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        result.output, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.output)
    rows = moods(40, seed=1)
    logits = model.eval()(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    right = [model.config.id2label[int(i)] == row["label"] for i, row in zip(logits.argmax(-1), rows, strict=True)]
    assert np.mean(right) == result.metrics["accuracy"]
    before = transformers.AutoModel.from_pretrained(encoder).state_dict()
    after = transformers.AutoModel.from_pretrained(result.output).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("query" in name for name in changed) and not any("embeddings" in name for name in changed)


def test_weights_of_classes(encoder: str) -> None:
    """Catches weights that do not make rare classes count as much as frequent ones."""
    from fastbert.training.finetuning.records import read_records
    from fastbert.training.finetuning.settings import FinetuneSettings
    from fastbert.training.finetuning.tasks import task_of

    rows = [{"text": "a film", "label": "often"}] * 9 + [{"text": "a day", "label": "rarely"}]
    settings = FinetuneSettings(task="classify", model=encoder, train=rows, output="", class_weights="balanced")
    task = task_of("classify")
    assert task.prepare(read_records(rows), settings)["counts"] == {"often": 9, "rarely": 1}
    loss: Any = task.loss(settings)
    logits = torch.randn(10, 2, dtype=torch.float64)
    labels = torch.tensor([0] * 9 + [1])
    each = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)
    assert torch.allclose(loss(output, labels), (each[:9].mean() + each[9]) / 2)
    # Of two batches of an update, each gives its share.
    first = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits[:4])
    second = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits[4:])
    parts = loss(first, labels[:4], num_items_in_batch=10) + loss(second, labels[4:], num_items_in_batch=10)
    assert torch.allclose(parts, loss(output, labels))


GIVEN = {"text": "a film", "label": "good"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("classify", {"text": "a film"}, "record 1: "),
        ("classify", {"text": "a film", "label": 0.5}, "record 1: label 0.5 is a number with a fraction"),
        ("classify", {"text": None, "label": "good"}, "record 1: column 'text' is empty"),
        ("classify", {"text": " ", "label": "good"}, "record 1: text: the text is empty"),
        ("classify", {**GIVEN, "text_pair": "a day"}, "record 2: .*'text_pair'"),
        ("regress", GIVEN, "record 1: label is '.*', expected a finite number"),
        ("regress", {"text": "a film", "label": float("inf")}, "record 1: label is inf, expected a finite number"),
        ("multilabel", {"text": "a film", "labels": {"good": 1}}, "record 1: labels is a dict"),
        ("choice", GIVEN, "record 1: choices: expected a list of two or more, got None"),
    ],
)
def test_records_that_no_task_can_take(run: Any, task: str, row: dict[str, Any], message: str) -> None:
    """Catches an error of a record that does not say which one, or a record that is taken for something else."""
    with pytest.raises(ValueError, match=message):
        run(task, [row, *moods()], eval=moods(8), steps=1)


def test_a_label_seen_only_in_evaluation(run: Any) -> None:
    """Catches a label of the evaluation that training has not, which would be counted as another one."""
    with pytest.raises(
        ValueError, match=r"record 9: label 'odd' is not among those of the training data: 'bad', 'good'"
    ):
        run("classify", moods(), eval=[*moods(8), {"text": "a film", "label": "odd"}])


def test_a_class_with_one_example(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a class of one example of which nobody is told."""
    run("classify", [*moods(), {"text": "a film", "label": "odd"}], eval=moods(8), steps=1)
    assert "1 classes have one record each: 'odd'" in caplog.text
