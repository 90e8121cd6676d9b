"""The task qa: answers at tokens, in each window that holds them, lost answers by name, and answers that are learnt."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from fastbert import BertModel, QuestionAnswerer
from fastbert.training.finetuning.qa import NOWHERE, place_of
from fastbert.training.finetuning.records import Record, RecordError
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import task_of
from helpers import tiny_bert

COLOURS, THINGS = ["red", "green", "blue", "dark grey"], ["car", "boat", "house", "tree"]


def example(rng: random.Random, lost: bool = False) -> dict[str, Any]:
    """A question, and a context in which the colour behind "is" is the answer, or where there is no "is"."""
    things = [f"the {rng.choice(COLOURS)} {thing}" for thing in rng.sample(THINGS, 2)]
    colour = rng.choice(COLOURS)
    context = f"{things[0]} {'.' if lost else 'is'} {colour} . {things[1]} ."
    answers = [] if lost else [{"text": colour, "answer_start": len(things[0]) + 4}]
    return {"question": f"the {rng.choice(THINGS)}", "context": context, "answers": answers}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder and its tokenizer."""
    import torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    config, tokenizer = tiny_bert([*COLOURS, *THINGS, "the is .", "서울은 크다"] * 3, 80, max_position_embeddings=64)
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def featured(base: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[Any, list[Record], list[Any]]:
    import transformers

    task, some = task_of("qa"), [Record(row, f"record {i}") for i, row in enumerate(rows, start=1)]
    chosen = FinetuneSettings(**{
        "task": "qa", "model": str(base), "train": [], "output": "unused", "max_length": 64, **fields,
    })  # fmt: skip
    task.prepare(some, chosen)
    return task, some, task.features(some, transformers.AutoTokenizer.from_pretrained(base), chosen)


def logits_of(features: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(N, S) logits of starts and of ends that are those of the labels."""
    width = max(len(feature["input_ids"]) for feature in features)
    start, end = np.zeros((2, len(features), width), np.float32)
    for i, feature in enumerate(features):
        start[i, feature["start_positions"]] = end[i, feature["end_positions"]] = 5.0 + (feature["start_positions"] > 0)
    return start, end


@pytest.mark.parametrize("max_length", [64, 20])
def test_answers_are_at_their_tokens(base: Path, max_length: int) -> None:
    """Catches an answer at other tokens, one that no window holds, and a window without it that has one."""
    rng = random.Random(0)
    rows = [example(rng, lost=i % 4 == 3) for i in range(12)]
    rows.append({"question": "크", "context": "the car . " * 6 + "서울은 크다 " + "the boat . " * 6,
                 "answers": [{"text": "서울은", "answer_start": 60}]})  # fmt: skip
    task, some, features = featured(base, rows, max_length=max_length, stride=4)
    assert all(len(feature["input_ids"]) <= max_length for feature in features)
    assert task.may_have_none and {feature["record"] for feature in features} == set(range(13))
    answers = task.predictions(logits_of(features), features, some)
    assert answers == [row["answers"][0]["text"] if row["answers"] else "" for row in rows]
    scores = task.score(answers, some)
    assert scores["exact_match"] == scores["f1"] == 1.0 and scores["no_answer_examples"] == 3


def test_lost_answers_are_counted_and_named(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches training on an answer that is not there, one at a wrong start that is given up, and silence."""
    rows = [
        {"question": "a", "context": "the car is red", "answers": {"text": ["blue"], "answer_start": [3]}},
        {"question": "a", "context": "red car , the car is red", "answers": {"text": ["red"], "answer_start": [19]}},
        {"question": "a", "context": "the car is red", "answers": "car"},
        {"question": "a", "context": "the car is red", "answers": {"text": ["blue", "red"], "answer_start": [0, 11]}},
    ]
    with caplog.at_level(logging.WARNING, "fastbert"):
        task, some, features = featured(base, rows)
    assert "1 of 4 records are not in their context, and the records are left out: record 1" in caplog.text
    assert [place_of(record) for record in some] == [None, (21, 24), (4, 7), (11, 14)]
    assert [feature["record"] for feature in features] == [1, 2, 3]
    import transformers

    other = [Record(some[0].values, "record 1")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    (evaluated,) = task.features(other, tokenizer, task.settings)
    assert evaluated["start_positions"] == NOWHERE
    with pytest.raises(ValueError, match="none of 1 records has an answer that is in its context"):
        featured(base, rows[:1])


def test_no_answer_has_a_threshold(base: Path) -> None:
    """Catches an empty answer where every training record has one, and a threshold of other numbers."""
    rows = [example(random.Random(i)) for i in range(2)]
    for more, threshold, expected in (([], 0.0, False), (rows, 0.0, True), (rows, 11.0, False), (rows, 9.0, True)):
        none = [{**row, "answers": []} for row in more]
        task, some, features = featured(base, [*rows, *none], no_answer_threshold=threshold)
        start, end = np.zeros((2, len(features), 64), np.float32)
        start[:, 0] = end[:, 0] = 5.0  # 10 more than any answer
        assert [answer == "" for answer in task.predictions((start, end), features, some)][:2] == [expected] * 2


def test_bad_records_of_answers(base: Path) -> None:
    """Catches a question that leaves no room, and a record without a context, that pass without their place."""
    good = example(random.Random(0))
    with pytest.raises(RecordError, match="record 2: question: its 80 tokens leave no room in 64"):
        featured(base, [good, {**good, "question": "car " * 80}])
    with pytest.raises(RecordError, match="record 2: no column 'context'"):
        featured(base, [good, {"question": "a", "answers": []}])


def test_training_learns_to_answer(base: Path, tmp_path: Path) -> None:
    """Catches a run that does not learn, and a result that fastbert cannot use."""
    from fastbert.training.finetuning.finetune import finetune

    rng = random.Random(2)
    for name, n in (("train", 400), ("eval", 60)):
        qas = [example(rng, lost=i % 3 == 2) for i in range(n)]
        paragraphs = [{"context": x["context"], "qas": [{"id": f"{name}{i}", **x}]} for i, x in enumerate(qas)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    result = finetune(
        task="qa", model=str(base), train=str(tmp_path / "train.json"), eval=str(tmp_path / "eval.json"),
        output=str(tmp_path / "out"), epochs=5, batch_size=16, learning_rate=3e-3, device="cpu", progress=False,
        answer_length=4, dropout=0.0,
    )  # fmt: skip
    assert result.metrics["has_answer_f1"] > 0.9 and result.metrics["no_answer_f1"] > 0.9, result.metrics
    reader = QuestionAnswerer.from_pretrained(result.output, device="cpu", no_answer=True, max_answer_length=4)
    asked = [
        ("the car", "the red boat is dark grey . the blue tree ."),
        ("the car", "the red boat . blue . the tree ."),
    ]
    assert [answers[0]["answer"] for answers in reader(*zip(*asked, strict=True))] == ["dark grey", ""]
