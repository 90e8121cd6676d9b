"""Entities have their places in the text, the numbers of transformers' pipeline, and no seams between windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from family_text_cases import make_folders
from fastbert import BertForTokenClassification, EntityRecognizer
from fastbert.pipelines.entities import STRATEGIES, are_tags, group
from fastbert.text.overlap import overlapping, owners
from helpers import tiny_bert

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = [
    "Ada Lovelace was born in London, near the river Thames.",
    "서울에서 만난 김철수 씨는 부산으로 갔다.",
    'He said: "Paris isn\'t far." — café São Paulo 中国人',
    "",
    " ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random token classifier and its tokenizer."""
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(TEXTS[:3], 120, max_position_embeddings=64)
    config.id2label = dict(enumerate(LABELS))
    path = tmp_path_factory.mktemp("tagger")
    BertForTokenClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_entities_are_those_of_transformers(folder: Path) -> None:
    """Catches a strategy of another meaning, a score of other tokens, and places that are not the text's."""
    from transformers import pipeline

    theirs = pipeline("token-classification", model=str(folder), device="cpu")
    theirs.model.double()  # float32 would differ by what the random weights magnify
    for strategy in STRATEGIES:
        recognizer = EntityRecognizer.from_pretrained(
            folder, strategy=strategy, device="cpu", dtype="float64", ignore_labels=()
        )
        for text, found in zip(TEXTS, recognizer(TEXTS), strict=True):
            expected = theirs(text, aggregation_strategy=strategy, ignore_labels=[]) if text.strip() else []
            names = ("entity", "entity_group", "start", "end", "index")
            assert [[each.get(name) for name in names] for each in found] == [
                [each.get(name) for name in names] for each in expected
            ]
            scores = [[each["score"] for each in some] for some in (found, expected)]
            np.testing.assert_allclose(*scores, rtol=2e-7)
            assert strategy == "none" or all(each["word"] == text[each["start"] : each["end"]] for each in found)


def test_entities_of_every_family(tmp_path: Path) -> None:
    """Catches words of byte-level or Unigram tokens that are cut elsewhere than in transformers' pipeline."""
    import transformers

    for name, folder in make_folders(tmp_path).items():
        config = transformers.AutoConfig.from_pretrained(folder)
        config.max_position_embeddings, config.id2label = 90, {0: "O", 1: "B-X", 2: "I-X"}
        path = str(tmp_path / f"{name}-tagger")
        transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
        theirs = transformers.pipeline("token-classification", model=path, device="cpu")
        theirs.model.double()
        for strategy in ("none", "first"):
            recognizer = EntityRecognizer.from_pretrained(
                path, strategy=strategy, device="cpu", dtype="float64", ignore_labels=()
            )
            for text in TEXTS[:3]:
                expected = theirs(text, aggregation_strategy=strategy, ignore_labels=[])
                found = recognizer(text)
                places = [[(each["start"], each["end"]) for each in some] for some in (found, expected)]
                assert places[0] == places[1], (name, strategy)
                scores = [[each["score"] for each in some] for some in (found, expected)]
                np.testing.assert_allclose(*scores, rtol=2e-7)


def test_ignored_labels(folder: Path) -> None:
    """Catches O among the entities, and a label that cannot be left out."""
    text = " ".join(TEXTS)[:150]
    everything = EntityRecognizer.from_pretrained(folder, device="cpu", ignore_labels=())(text)
    entities = EntityRecognizer.from_pretrained(folder, device="cpu")(text)
    assert entities == [each for each in everything if each["entity_group"] != "O"] != everything
    places = EntityRecognizer.from_pretrained(folder, device="cpu", ignore_labels=("O", "PER"))(text)
    assert places == [each for each in entities if each["entity_group"] != "PER"]


def grouped(rows: list[tuple[str, int, int, bool]], strategy: str) -> list[tuple[str, int, int]]:
    """The entities of tokens (label, start, end, whether a word begins) whose labels are nearly certain."""
    scores = np.full((len(rows), len(LABELS)), 0.01)
    for i, (label, *_) in enumerate(rows):
        scores[i, LABELS.index(label)] = 0.96 - 0.1 * i
    places, starts = np.array([row[1:3] for row in rows]), np.array([row[3] for row in rows])
    found = group(scores, places, starts, dict(enumerate(LABELS)), strategy)
    return [(each["entity_group"], each["start"], each["end"]) for each in found if each["entity_group"] != "O"]


def test_groups_by_hand() -> None:
    """Catches two neighbours run together at a B-, and a word whose pieces disagree cut in two."""
    rows = [("B-PER", 0, 3, True), ("I-PER", 4, 8, True), ("B-PER", 9, 12, True), ("B-LOC", 12, 15, False)]
    assert grouped(rows, "simple") == [("PER", 0, 8), ("PER", 9, 12), ("LOC", 12, 15)]
    for strategy in ("first", "average", "max"):
        assert grouped(rows, strategy) == [("PER", 0, 8), ("PER", 9, 15)]
    assert grouped([("I-LOC", 0, 2, False), ("I-LOC", 2, 4, True)], "first") == [("LOC", 0, 4)], "no B- at all"


def test_tags_by_hand() -> None:
    """Catches two words of one tag run together, a word cut in pieces, and a tag that loses what is before a dash."""
    labels, starts = ["NN", "VB-x"], np.array([True, False, True, True])
    places = np.array([[0, 2], [2, 4], [5, 7], [8, 9]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.3, 0.7]])
    found = {s: group(scores, places, starts, labels, s, has_tags=True) for s in ("first", "simple")}
    assert [(each["entity_group"], each["start"], each["end"]) for each in found["first"]] == [
        ("NN", 0, 4), ("NN", 5, 7), ("VB-x", 8, 9),
    ]  # fmt: skip
    assert [each["entity_group"] for each in found["simple"]] == ["NN", "VB-x", "NN", "VB-x"]
    assert are_tags(["NN", "VB"]) and not any(map(are_tags, (["NN", "O"], ["B-A", "I-A"], ["LABEL_0", "LABEL_1"])))


def test_windows_lose_and_double_nothing(folder: Path) -> None:
    """Catches a token that no window or two windows give, and a window that is not the text around it."""
    text = " ".join(TEXTS[:3] * 5)
    recognizer = EntityRecognizer.from_pretrained(
        folder, strategy="none", device="cpu", ignore_labels=(), max_length=24, stride=7
    )
    found = recognizer(text)
    (tokens,) = recognizer.tokenizer.encode_with_offsets(text)
    assert [each["index"] for each in found] == list(range(1, len(tokens.ids) + 1))
    assert [(each["start"], each["end"]) for each in found] == [tuple(place) for place in tokens.offsets.tolist()]
    spans = overlapping(len(tokens.ids), 22, 7, tokens.starts_of_words())
    first, last = spans[1]
    ids = [recognizer.tokenizer.cls_token_id, *tokens.ids[first:last], recognizer.tokenizer.sep_token_id]
    with torch.no_grad():
        scores = recognizer.model(torch.tensor([ids])).logits[0, 1:-1].softmax(-1)
    own = np.flatnonzero(owners(spans, len(tokens.ids), tokens.starts_of_words()) == 1)
    assert len(own) > 5
    np.testing.assert_allclose([found[i]["score"] for i in own], scores.max(-1).values[own - first], atol=2e-6)
    for strategy in STRATEGIES[1:]:
        recognizer.strategy = strategy
        places = [(each["start"], each["end"]) for each in recognizer(text)]
        assert all(a[1] <= b[0] for a, b in zip(places, places[1:], strict=False)), "in order, none twice"
        assert "".join(text[i:j] for i, j in places).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("seed", range(20))
def test_overlapping_windows(seed: int) -> None:
    """Catches a gap, an endless loop, a word cut without need, and a token counted where its word is not whole."""
    random = np.random.default_rng(seed)
    n, capacity = int(random.integers(0, 90)), int(random.integers(1, 20))
    stride = int(random.integers(0, capacity))
    starts = random.random(n) < 0.4
    for begins in (None, starts):
        spans = overlapping(n, capacity, stride, begins)
        assert spans[0][0] == 0 and spans[-1][1] == n
        assert all(0 < last - first <= capacity for first, last in spans) or n == 0
        assert all(a[0] < b[0] <= a[1] for a, b in zip(spans, spans[1:], strict=False))
        own = owners(spans, n, begins)
        assert all(spans[w][0] <= i < spans[w][1] for i, w in enumerate(own.tolist()))
    words = np.cumsum(starts)
    for word in np.unique(words):
        (places,) = np.nonzero(words == word)
        if any(first <= places[0] and places[-1] < last for first, last in spans):
            assert len(set(own[places])) == 1
    assert owners([(0, 6), (4, 10)], 10).tolist() == [0] * 5 + [1] * 5


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    """Catches a stride without progress, more tokens than positions, and an unknown strategy, that pass."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stride": 62}, "stride: got 62, expected 0 to 61"),
        ({"max_length": 65}, "max_length: got 65, expected at most 64"),
        ({"max_length": 2}, "max_length: leaves room for 0 tokens"),
        ({"strategy": "last"}, "strategy: got 'last'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            EntityRecognizer.from_pretrained(folder, device="cpu", **arguments)
    with pytest.raises(TypeError, match=r"texts\[1\]: got int"):
        EntityRecognizer.from_pretrained(folder, device="cpu")(["a", 1])  # type: ignore[list-item]
