"""The task tokens: labels at the first tokens of words, in one window each, and spans that are learnt."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from fastbert import BertModel, EntityRecognizer
from fastbert.training.finetuning.records import Record, RecordError
from fastbert.training.finetuning.schemes import as_iob2, scheme_of
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import task_of
from helpers import tiny_bert

NAMES = ["ada lovelace", "grace hopper", "kim", "alan turing"]
PLACES = ["paris", "new york", "seoul"]


def sentence(rng: random.Random) -> tuple[list[str], list[str]]:
    """Words and labels: names stand behind "mr", places behind "in"."""
    words, labels = ["today"], ["O"]
    for _ in range(rng.randint(1, 3)):
        marker, kind, some = rng.choice([("mr", "PER", NAMES), ("in", "LOC", PLACES)])
        found = rng.choice(some).split()
        words += [marker, *found]
        labels += ["O", f"B-{kind}", *[f"I-{kind}"] * (len(found) - 1)]
    return [*words, "went"], [*labels, "O"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder and its tokenizer, whose vocabulary splits long words."""
    import torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    texts = [*NAMES, *PLACES, "today mr in went", "서울에서 부산까지 가는 철수"] * 3
    config, tokenizer = tiny_bert(texts, 110, initializer_range=0.1, max_position_embeddings=64)
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def settings(base: Path, **fields: Any) -> FinetuneSettings:
    return FinetuneSettings(**{"task": "tokens", "model": str(base), "train": [], "output": "unused", **fields})


def records(rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(row, f"record {i}") for i, row in enumerate(rows, start=1)]


def featured(base: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[Any, list[Record], list[Any]]:
    import transformers

    task, some = task_of("tokens"), records(rows)
    chosen = settings(base, **{"max_length": 64, **fields})
    task.prepare(some, chosen)
    return task, some, task.features(some, transformers.AutoTokenizer.from_pretrained(base), chosen)


def logits_of(features: list[Any], n_labels: int) -> np.ndarray:
    """(N, S, C) logits that give every labelled column its label and every other one class 1."""
    width = max(len(feature["input_ids"]) for feature in features)
    logits = np.zeros((len(features), width, n_labels), np.float32)
    for row, feature in zip(logits, features, strict=True):
        for column, label in enumerate(feature["labels"]):
            row[column, max(label, 0) if label >= 0 else 1] = 1.0
    return logits


@pytest.mark.parametrize("max_length", [64, 16, 9])
def test_no_label_is_lost_or_doubled(base: Path, max_length: int) -> None:
    """Catches a label that no window or two windows have, and one at another token than a word's first."""
    rng = random.Random(0)
    rows = [dict(zip(("tokens", "labels"), sentence(rng), strict=True)) for _ in range(6)]
    long = {name: [x for row in rows for x in row[name]] for name in ("tokens", "labels")}
    task, some, features = featured(base, [*rows, long], max_length=max_length, stride=3)
    assert all(len(feature["input_ids"]) <= max_length for feature in features)
    counted = [word for feature in features if feature["record"] == 6 for _, word in feature["words"]]
    assert sorted(counted) == list(range(len(long["tokens"])))
    n_labels = sum(label >= 0 for feature in features for label in feature["labels"])
    assert n_labels == sum(len(record.values["tokens"]) for record in some)
    predicted = task.predictions(logits_of(features, len(task.labels)), features, some)
    assert predicted == [record.values["labels"] for record in some]
    scores = task.score(predicted, some)
    assert scores["f1"] == scores["token_accuracy"] == 1.0 and task.interval(predicted, some) == (1.0, 1.0)


def test_rows_are_those_of_the_tokenizer(base: Path) -> None:
    """Catches training on other ids than inference sees, and labels beside the first pieces."""
    import transformers

    words, labels = ["today", "mr", "Lovelaceada", "went", "!"], ["O", "O", "B-PER", "O", "O"]
    task, _, (feature,) = featured(base, [{"tokens": words, "labels": labels}])
    encoding = transformers.AutoTokenizer.from_pretrained(base)(" ".join(words))
    assert feature["input_ids"] == encoding["input_ids"] and feature["token_type_ids"] == encoding["token_type_ids"]
    numbers = encoding.word_ids()
    first = [i > 0 and n is not None and n != numbers[i - 1] for i, n in enumerate(numbers)]
    assert [label >= 0 for label in feature["labels"]] == first and sum(first) == 5
    assert task.labels[feature["labels"][np.flatnonzero(first)[2]]] == "B-PER"


def test_spans_in_texts(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches spans at other characters, and Korean names whose particles are taken along."""
    rows = [
        {"text": "Today mr Ada  Lovelace, in Paris.", "spans": [
            {"start": 9, "end": 22, "label": "PER"}, {"start": 27, "end": 32, "label": "LOC"}]},
        {"text": "today", "spans": []},
    ]  # fmt: skip
    task, some, features = featured(base, rows)
    assert "begin or end" not in caplog.text and task.pieces is False
    predicted = task.predictions(logits_of(features, len(task.labels)), features, some)
    assert predicted == [[("PER", 9, 22), ("LOC", 27, 32)], []] and task.score(predicted, some)["f1"] == 1.0
    korean = [{"text": "철수 서울에서 부산까지", "spans": [{"start": 3, "end": 5, "label": "LOC"}]}]
    with caplog.at_level(logging.WARNING, "fastbert"):
        task, some, features = featured(base, korean)
    assert task.pieces and "1 of 1 begin or end within words" in caplog.text
    (spans,) = task.predictions(logits_of(features, len(task.labels)), features, some)
    assert [korean[0]["text"][start:end] for _, start, end in spans][0].startswith("서울")


def test_schemes() -> None:
    """Catches IOB1, IOBES and BILOU read as IOB2, tags that are taken for spans, and a mixture that passes."""
    expected = ["B-A", "I-A", "B-A", "O", "B-B", "I-B", "I-B"]
    written = {
        "IOB2": expected,
        "IOB1": ["I-A", "I-A", "B-A", "O", "I-B", "I-B", "I-B"],
        "IOBES": ["B-A", "E-A", "S-A", "O", "B-B", "I-B", "E-B"],
        "BILOU": ["B-A", "L-A", "U-A", "O", "B-B", "I-B", "L-B"],
    }
    for name, labels in written.items():
        (record,) = records([{"tokens": list("abcdefg"), "labels": labels}])
        assert scheme_of([labels], [record]) == name and as_iob2(labels, name, record) == expected
    some = records([{}, {}])
    tags = [["NN", "X-Y"], ["VB", "O"]]
    assert scheme_of(tags, some) == "plain" and as_iob2(tags[0], "plain", some[0]) == tags[0]
    for sequences, message in (
        ([["B-A", "O"], ["O", "I-A"]], r"record 2: labels: a span begins with I-, .* in record 1 with B-"),
        ([["B-A"], ["NOUN"]], "record 2: labels: got 'NOUN', expected O or a prefix and a type, as 'B-A' in record 1"),
        ([["O"], ["B", "I"]], "record 2: labels: got 'B', a prefix without a type"),
        ([["S-A"], ["U-A"]], "record 2: .*IOBES .* and of BILOU"),
    ):
        with pytest.raises(RecordError, match=message):
            scheme_of(sequences, some)


def test_bad_records(base: Path) -> None:
    """Catches a record that trains on something else than it says, or an error without its place."""
    good = {"tokens": ["mr", "kim"], "labels": ["O", "B-PER"]}
    for bad, message in (
        ({"tokens": ["a", "b"], "labels": ["O"]}, "record 2: got 1 labels for 2 tokens"),
        ({"tokens": "a b", "labels": ["O"]}, "record 2: tokens: got 'a b', expected a list of str"),
        ({"text": "ab", "spans": [{"start": 1, "end": 3, "label": "X"}]}, "record 2: spans: got 1 to 3"),
        ({"text": "ab", "spans": [{"start": 0, "end": 2}]}, "record 2: spans: got .* expected start, end and label"),
        ({"text": "abc", "spans": [{"start": 0, "end": 2, "label": "X"}, {"start": 1, "end": 3, "label": "X"}]},
         "record 2: spans: .* overlap"),
    ):  # fmt: skip
        with pytest.raises(RecordError, match=message):
            featured(base, [good, bad])
    with pytest.raises(ValueError, match="no record has a span"):
        featured(base, [{"tokens": ["a"], "labels": ["O"]}])
    task, _, _ = featured(base, [good])
    import transformers

    unseen = records([{"tokens": ["a"], "labels": ["B-ORG"]}])
    with pytest.raises(RecordError, match="record 1: 'B-ORG' is not among the types of training: PER"):
        task.features(unseen, transformers.AutoTokenizer.from_pretrained(base), settings(base, max_length=64))


def test_training_learns_a_rule(base: Path, tmp_path: Path) -> None:
    """Catches a run that does not learn, does not window, or whose result fastbert and transformers cannot use."""
    from fastbert.training.finetuning.finetune import finetune

    rng = random.Random(1)
    for name, n in (("train", 160), ("eval", 40)):
        lines = []
        for _ in range(n):
            lines += [*(f"{word}\t{label}" for word, label in zip(*sentence(rng), strict=True)), ""]
        (tmp_path / f"{name}.conll").write_text("\n".join(lines))
    result = finetune(
        task="tokens", model=str(base), train=str(tmp_path / "train.conll"), eval=str(tmp_path / "eval.conll"),
        output=str(tmp_path / "out"), epochs=4, batch_size=8, learning_rate=3e-3, max_length=16, stride=4, device="cpu",
        progress=False,
    )  # fmt: skip
    assert result.metrics["f1"] > 0.95, result.metrics
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["1"] == "B-LOC"
    text = "today mr ada lovelace in new york went"
    found = EntityRecognizer.from_pretrained(result.output, strategy="first", device="cpu")(text)
    assert [(each["entity_group"], each["word"]) for each in found] == [("PER", "ada lovelace"), ("LOC", "new york")]


def test_tags_are_learnt_and_used(base: Path, tmp_path: Path) -> None:
    """Catches tags that are scored as spans, and a tagger whose words run together or are cut in pieces."""
    from fastbert.training.finetuning.finetune import finetune

    tag = {"B": "NAME", "I": "NAME", "O": "WORD"}
    rng, rows = random.Random(1), []
    for _ in range(120):
        words, labels = sentence(rng)
        pairs = zip(words, labels, strict=True)
        tags = ["MARK" if word in ("mr", "in") else tag[label[0]] for word, label in pairs]
        rows.append({"tokens": words, "labels": tags})
    result = finetune(
        task="tokens", model=str(base), train=rows[:100], eval=rows[100:], output=str(tmp_path / "out"), epochs=3,
        batch_size=8, learning_rate=3e-3, max_length=16, stride=4, device="cpu", progress=False,
        class_weights={"MARK": 2.0},
    )  # fmt: skip
    assert result.metrics["token_accuracy"] > 0.95 and result.metrics["macro_f1"] > 0.9, result.metrics
    assert "f1" not in result.metrics and result.metrics["per_type"].keys() == {"NAME", "MARK", "WORD"}
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert facts["headline"] == "token_accuracy" and facts["labels"]["scheme"] == "plain"
    assert facts["peak_bytes"]["host"] > 0 and 0 < facts["seconds_of_a_step"] < facts["seconds_of_steps"]
    cut = facts["truncated"]["train"]
    assert cut["texts"] == 100 and cut["windows"] >= 100 + cut["texts in windows"] and cut["texts in windows"] > 0
    assert "What was cut" in (tmp_path / "out/report.html").read_text()
    text = "today mr lovelace kim went"
    found = EntityRecognizer.from_pretrained(result.output, device="cpu")(text)
    assert [(each["word"], each["entity_group"]) for each in found] == [
        ("today", "WORD"), ("mr", "MARK"), ("lovelace", "NAME"), ("kim", "NAME"), ("went", "WORD"),
    ]  # fmt: skip


def test_tag_scores_are_those_of_scikit_learn() -> None:
    """Catches a mean over tags that nothing has, and an accuracy over sentences in the place of words."""
    sklearn = pytest.importorskip("sklearn.metrics", reason="is the reference")
    from fastbert.training.finetuning import tag_metrics

    rng, names = random.Random(0), ["A", "B", "C", "never"]
    true = [rng.choices(names[:3], k=rng.randint(0, 9)) for _ in range(40)]
    got = [[rng.choice([tag, *names[:3]]) for tag in tags] for tags in true]
    flat, guessed = sum(true, []), sum(got, [])
    scores = tag_metrics.tags(true, got, names)
    assert scores["token_accuracy"] == pytest.approx(sklearn.accuracy_score(flat, guessed))
    for name in ("macro", "weighted"):
        assert scores[f"{name}_f1"] == pytest.approx(sklearn.f1_score(flat, guessed, average=name))
    assert "never" not in scores["per_type"] and scores["tokens"] == len(flat)
    assert tag_metrics.share_of_counts(tag_metrics.tag_counts(true, got)) == pytest.approx(scores["token_accuracy"])
    with pytest.raises(ValueError, match="2 tags in sentence 1"):
        tag_metrics.tag_counts([["A"]], [["A", "B"]])


def test_weights_of_labels(base: Path) -> None:
    """Catches a type whose weight is of its B- alone, labels that do not count, and a name without a label."""
    import torch
    import transformers

    rows = [{"tokens": ["mr", "ada", "lovelace"], "labels": ["O", "B-PER", "I-PER"]}]
    logits, labels = torch.randn(1, 3, 3), torch.tensor([[0, 1, -100]])
    each = torch.nn.functional.cross_entropy(logits[0], labels[0].clamp(min=0), reduction="none")
    output = transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    for given, weights in (
        ({"PER": 3.0}, (1, 3)),
        ({"PER": 3.0, "B-PER": 0.5, "O": 0.25}, (0.25, 0.5)),
        ("balanced", (1, 1)),
    ):
        task, _, _ = featured(base, rows, class_weights=given)
        loss = task.loss(settings(base, class_weights=given))
        assert torch.allclose(loss(output, labels), (weights[0] * each[0] + weights[1] * each[1]) / 2)
    with pytest.raises(
        ValueError, match=r"class_weights: \['LOC'\] are no classes; there are \['O', 'B-PER', 'I-PER'\]"
    ):
        featured(base, rows, class_weights="LOC=2")
