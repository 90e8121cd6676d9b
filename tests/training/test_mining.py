"""Mined negatives are the nearest wrong texts, as a search over the whole matrix of scores finds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastbert.training.finetuning import mining
from fastbert.training.finetuning.mining import key_of, mine_negatives
from vector_cases import Fixed


def case(seed: int, n: int = 60, dim: int = 8) -> tuple[Fixed, list[str], list[str]]:
    """Pairs with anchors that have several positives, positives of several anchors, and texts that differ in case."""
    rng = np.random.default_rng(seed)
    anchors = [f"Anchor {i % (2 * n // 3)}" for i in range(n)]
    positives = [f"text {rng.integers(n)}" for _ in range(n)]
    positives[3], positives[7] = "Text  1", "anchor 7"
    texts = {*anchors, *positives, "more 1", "more 2"}
    return Fixed({text: rng.normal(size=dim).astype(np.float32) for text in sorted(texts)}), anchors, positives


def oracle(encoder: Fixed, anchors: list[str], positives: list[str], corpus: list[str], n: int, skip: int, depth: int,
           margin: float | None, max_score: float | None) -> list[list[str]]:  # fmt: skip
    def cosine(one: str, other: str) -> float:
        a, b = (encoder.vectors[text].astype(np.float64) for text in (one, other))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    negatives = []
    for anchor, positive in zip(anchors, positives, strict=True):
        right = {key_of(p) for a, p in zip(anchors, positives, strict=True) if key_of(a) == key_of(anchor)}
        wrong = [text for text in corpus if key_of(text) not in right | {key_of(anchor)}]
        wrong = sorted(wrong, key=lambda text: -cosine(anchor, text))[skip:depth]
        if margin is not None:
            wrong = [text for text in wrong if cosine(anchor, text) <= cosine(anchor, positive) - margin]
        if max_score is not None:
            wrong = [text for text in wrong if cosine(anchor, text) <= max_score]
        negatives.append(wrong[:n])
    return negatives


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"n": 1, "skip": 0, "depth": 100, "margin": None, "max_score": None},
        {"n": 4, "skip": 3, "depth": 9, "margin": None, "max_score": None},
        {"n": 5, "skip": 0, "depth": 30, "margin": 0.1, "max_score": None},
        {"n": 5, "skip": 1, "depth": 30, "margin": 0.0, "max_score": 0.3},
    ],
)
@pytest.mark.parametrize("with_corpus", [False, True])
def test_against_the_whole_matrix(seed: int, options: Any, with_corpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a positive among the negatives, ranks that are off, a filter that lets pass, and a window's edge."""
    monkeypatch.setattr(mining, "QUERIES", 7)
    encoder, anchors, positives = case(seed)
    corpus = [*dict.fromkeys(positives), "more 1", "more 2"] if with_corpus else None
    mined = mine_negatives(encoder, anchors, positives, corpus=corpus, **options)
    expected = oracle(encoder, anchors, positives, corpus or list(dict.fromkeys(positives)), **options)
    assert mined.texts == expected
    assert [len(scores) for scores in mined.scores] == [len(texts) for texts in mined.texts]
    assert mined == mine_negatives(encoder, anchors, positives, corpus=corpus, **options)


def test_equal_scores_stand_in_the_order_of_the_corpus() -> None:
    """Catches negatives that depend on chance where texts are equally near."""
    vector = np.ones(4, np.float32)
    encoder = Fixed({text: vector for text in ("a", "p", "z", "y", "x")})
    assert mine_negatives(encoder, ["a"], ["p"], corpus=["z", "p", "y", "x"], n=2).texts == [["z", "y"]]


def test_nothing_fits(caplog: pytest.LogCaptureFixture) -> None:
    """Catches pairs without negatives that nobody is told of, and an error for no pairs."""
    encoder, anchors, positives = case(0)
    mined = mine_negatives(encoder, anchors, positives, max_score=-1.0)
    assert mined.texts == [[]] * len(anchors) and mined.n_short == 0
    assert "60 of 60 pairs have no text that fits" in caplog.text
    assert mine_negatives(encoder, [], []).texts == []


@pytest.mark.parametrize(
    ("options", "message"), [({"skip": 5, "depth": 5}, "skip"), ({"n": 0}, "n: got 0"), ({"depth": 0}, "depth: got 0")]
)
def test_arguments(options: dict[str, int], message: str) -> None:
    """Catches an argument out of range that is taken, and numbers of texts that differ."""
    encoder, anchors, positives = case(0)
    with pytest.raises(ValueError, match=message):
        mine_negatives(encoder, anchors, positives, **options)
    with pytest.raises(ValueError, match="positives: got 59 texts"):
        mine_negatives(encoder, anchors, positives[1:])
