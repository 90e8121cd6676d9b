"""Metrics of fine-tuning equal those of scikit-learn, SciPy, seqeval and SQuAD's scripts."""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import numpy as np
import pytest

from fastbert.training.finetuning import metrics

sk = pytest.importorskip("sklearn.metrics", reason="is the reference")
KINDS = [("f1", "f1_score"), ("precision", "precision_score"), ("recall", "recall_score")]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(12))
def test_classes(seed: int) -> None:
    """Catches an average over other classes than scikit-learn's, and a confusion matrix on its side."""
    generator = np.random.default_rng(seed)
    n, c = int(generator.integers(1, 60)), int(generator.integers(2, 9))
    labels = generator.integers(0, max(1, c - seed % 3), n)  # a class or two are in no label
    p = softmax(generator.normal(size=(n, c)) + 2 * (np.arange(c) == labels[:, None]) - 9 * (np.arange(c) == seed % c))
    found, predicted = metrics.classification(labels, p), p.argmax(1)
    assert math.isclose(found["accuracy"], sk.accuracy_score(labels, predicted))
    for average in ("macro", "micro", "weighted"):
        expected = sk.f1_score(labels, predicted, average=average, zero_division=0)
        assert math.isclose(found[f"{average}_f1"], expected, rel_tol=1e-12), average
    assert math.isclose(metrics.macro_f1(labels, predicted), found["macro_f1"], rel_tol=1e-12)
    assert np.array_equal(found["confusion"], sk.confusion_matrix(labels, predicted, labels=range(c)))
    per_class = sk.precision_recall_fscore_support(labels, predicted, labels=range(c), zero_division=0)
    for row, name in zip(per_class, ("precision", "recall", "f1", "support"), strict=True):
        assert np.allclose([each[name] for each in found["per_class"]], row, rtol=1e-12), name
    assert found["examples"] == sum(each["count"] for each in found["calibration"]) == n


def test_calibration() -> None:
    """Catches a bin without its upper end, and an error that does not weigh bins by their examples."""
    p = np.array([[0.6, 0.4], [0.6, 0.4], [1.0, 0.0], [0.35, 0.65]])
    found = metrics.classification([0, 1, 0, 0], p)
    # 0.6 is 9/15, the upper end of the ninth bin: half right. 0.65 is wrong, and 1.0 right.
    assert [(round(b["low"], 3), b["accuracy"], b["count"]) for b in found["calibration"]] == [
        (0.533, 0.5, 2), (0.6, 0.0, 1), (0.933, 1.0, 1),
    ]  # fmt: skip
    assert math.isclose(found["expected_calibration_error"], (2 * 0.1 + 0.65 + 0.0) / 4, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], np.zeros((0, 2)), "probabilities: got"),
        ([0, 2], [[1, 0], [0, 1]], "labels: got"),
        ([0], [[1, 0], [0, 1]], "labels: got"),
        ([0.0, 1.0], [[1, 0], [0, 1]], "labels: got 'float64'"),
        ([0, 1], [[1, float("nan")], [0, 1]], "probabilities: got 'NaN or infinity'"),
    ],
)
def test_bad_classes(labels: Any, probabilities: Any, message: str) -> None:
    """Catches a metric of nothing, of NaN, or of labels that are numbers of other classes."""
    with pytest.raises(ValueError, match=message):
        metrics.classification(labels, probabilities)


@pytest.mark.parametrize("seed", range(8))
def test_many_labels(seed: int) -> None:
    """Catches an average over labels that differs from scikit-learn's, and a threshold that is left out."""
    generator = np.random.default_rng(seed)
    n, width = int(generator.integers(1, 40)), int(generator.integers(1, 7))
    truth = (generator.random((n, width)) < 0.3).astype(int)
    p = np.clip(0.5 * truth + generator.random((n, width)) * 0.7, 0, 1)
    found, given = metrics.multilabel(truth, p, 0.4), (p >= 0.4).astype(int)
    if width == 1:  # scikit-learn takes one column for two classes
        assert math.isclose(found["micro_f1"], sk.f1_score(truth[:, 0], given[:, 0], zero_division=0))
        return
    assert math.isclose(found["accuracy"], sk.accuracy_score(truth, given))
    for average in ("macro", "micro", "weighted", "samples"):
        expected = sk.f1_score(truth, given, average=average, zero_division=0)
        assert math.isclose(found[f"{average}_f1"], expected, rel_tol=1e-12), average
    for name, function in KINDS:
        expected = getattr(sk, function)(truth, given, average=None, zero_division=0)
        assert np.allclose([each[name] for each in found["per_class"]], expected, rtol=1e-12)
    assert math.isclose(found["hamming_loss"], sk.hamming_loss(truth, given), rel_tol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_numbers(seed: int) -> None:
    """Catches ranks that do not share ties, and a correlation that loses its precision far from zero."""
    stats = pytest.importorskip("scipy.stats", reason="is the reference")
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 6, 50) + (1e6 if seed % 2 else 0.0)
    y = 0.3 * x + generator.normal(size=50).round(seed % 3)
    found = metrics.regression(x, y)
    assert math.isclose(found["pearson"], stats.pearsonr(x, y)[0], rel_tol=1e-6)
    assert math.isclose(found["spearman"], stats.spearmanr(x, y)[0], rel_tol=1e-9)
    assert math.isclose(found["mse"], sk.mean_squared_error(x, y)) and math.isclose(
        found["mae"], sk.mean_absolute_error(x, y)
    )
    assert math.isnan(metrics.regression(x, np.ones(50))["spearman"])


# What seqeval 1.2.2 prints, as (precision, recall, F1, macro F1, weighted F1):
#     pip install --target /tmp/seqeval seqeval
#     r = seqeval.metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
#     m = r["micro avg"]; m["precision"], m["recall"], m["f1-score"], r["macro avg"]["f1-score"], ...
SEQEVAL: list[tuple[list[list[str]], list[list[str]], tuple[float, ...]]] = [
    (
        [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]],
        [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG", "O"]],
        (0.333333, 0.333333, 0.333333, 0.333333, 0.333333),
    ),
    ([["I-A", "I-A", "B-A", "I-B", "O"]], [["I-A", "I-A", "I-A", "I-B", "O"]], (0.5, 0.333333, 0.4, 0.5, 0.333333)),
    ([["B", "I", "O", "S-X", "E-X"]], [["B", "O", "I", "S-X", "I-X"]], (0.5, 0.666667, 0.571429, 0.5, 0.666667)),
    ([["B-a-b", "I-a-b", "O"]], [["B-a-b", "I-a", "O"]], (0.0, 0.0, 0.0, 0.0, 0.0)),
    ([["O", "O"]], [["B-A", "O"]], (0.0, 0.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("true", "predicted", "expected"), SEQEVAL)
def test_spans(true: list[list[str]], predicted: list[list[str]], expected: tuple[float, ...]) -> None:
    """Catches a span that begins or ends elsewhere than seqeval says, and a span that counts with one end wrong."""
    found = metrics.spans(true, predicted)
    names = ("precision", "recall", "f1", "macro_f1", "weighted_f1")
    assert np.allclose([found[name] for name in names], expected, atol=1e-6)
    spans = [[metrics.spans_of(tags) for tags in each] for each in (true, predicted)]
    assert metrics.spans(*spans) == found
    counts = metrics.span_counts(true, predicted)
    assert len(counts) == len(true) and math.isclose(metrics.f1_of_counts(counts), found["f1"])


@pytest.mark.skipif(importlib.util.find_spec("seqeval") is None, reason="seqeval is not installed")
def test_random_spans() -> None:
    """Catches a difference from seqeval on random tags, well-formed or not."""
    from seqeval.metrics import classification_report
    from seqeval.metrics.sequence_labeling import get_entities

    generator = np.random.default_rng(0)
    tags = ["O", "O", "B", "I", *(f"{p}-{t}" for p in "BIES" for t in ("A", "B-C", ""))]
    for _ in range(150):
        sizes = generator.integers(0, 9, 3)
        true, predicted = ([generator.choice(tags, size).tolist() for size in sizes] for _ in range(2))
        assert [metrics.spans_of(each) for each in true] == [get_entities(each) for each in true]
        if not any(map(metrics.spans_of, true)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = classification_report(true, predicted, output_dict=True, zero_division=0)
        found = metrics.spans(true, predicted)
        assert math.isclose(found["f1"], report["micro avg"]["f1-score"], abs_tol=1e-12)
        assert math.isclose(found["macro_f1"], report["macro avg"]["f1-score"], abs_tol=1e-12)
        assert math.isclose(found["weighted_f1"], report["weighted avg"]["f1-score"], abs_tol=1e-12)


def test_sentences_of_other_lengths() -> None:
    """Catches predictions that lost a token or a sentence and are scored nevertheless."""
    with pytest.raises(ValueError, match="1 tags in sentence 2"):
        metrics.spans([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="1 sentences"):
        metrics.spans([["O"], ["O"]], [["O"]])


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        # normalize_answer of the official script: lower, remove punctuation, remove a|an|the, fix white space.
        ("The Cat.", ["cat"], 1.0, 1.0),
        ("a  an the", ["!"], 1.0, 1.0),  # both are empty
        ("theatre", ["the atre"], 0.0, 0.0),  # articles are whole words: "theatre", "atre"
        ("U.S.A.", ["usa"], 1.0, 1.0),
        ("the black cat", ["black dog", "a black cat sat"], 0.0, 0.8),  # 2 of 2 and 2 of 3 words
        ("cat cat", ["cat"], 0.0, 2 / 3),  # a word counts as often as it is there
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("cat", ["the", "cat"], 1.0, 1.0),  # an answer that is empty after normalisation is left out
        ("고양이", ["고양이"], 1.0, 1.0),
    ],
)
def test_answers(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    """Catches a step of SQuAD's normalisation that is missing or misplaced, and a no-answer that scores wrong."""
    found = metrics.squad([prediction], [answers])
    assert (found["exact_match"], found["examples"]) == (exact, 1) and math.isclose(found["f1"], f1)


def test_parts_of_squad() -> None:
    """Catches parts with and without an answer that are mixed, and predictions for other questions."""
    found = metrics.squad({"1": "a cat", "2": "dog", "3": ""}, {"1": ["cat"], "3": [], "2": []})
    assert math.isclose(found["exact_match"], 2 / 3)
    assert (found["has_answer_f1"], found["no_answer_f1"], found["no_answer_examples"]) == (1.0, 0.5, 2)
    with pytest.raises(ValueError, match="other ids than references"):
        metrics.squad({"1": "a"}, {"2": ["a"]})
    with pytest.raises(ValueError, match="no questions"):
        metrics.squad([], [])


@pytest.mark.parametrize("seed", range(6))
def test_rankings(seed: int) -> None:
    """Catches nDCG that differs from scikit-learn's, and a recall over what is ranked in the place of what is right."""
    generator = np.random.default_rng(seed)
    gains = generator.integers(0, 4, (5, 20)) * (generator.random((5, 20)) < 0.2)
    gains[:, seed] += 1
    scores = generator.normal(size=(5, 20))
    relevant = [{i: float(g) for i, g in enumerate(row)} for row in gains]
    found = metrics.retrieval(scores, relevant, at=(1, 5, 20))
    for k in (1, 5, 20):
        assert math.isclose(found[f"ndcg@{k}"], sk.ndcg_score(gains, scores, k=k), rel_tol=1e-12), k
    order = np.argsort(-scores)
    places = [[list(o).index(i) for i in np.flatnonzero(g)] for o, g in zip(order, gains, strict=True)]
    assert math.isclose(found["mrr"], np.mean([1 / (min(row) + 1) for row in places]))
    assert math.isclose(found["recall@5"], np.mean([np.mean(np.array(row) < 5) for row in places]))
    ranked = metrics.retrieval(order[:, :5], relevant, at=(1, 5))  # the first five are all that is known
    assert math.isclose(ranked["ndcg@5"], found["ndcg@5"]) and math.isclose(ranked["recall@5"], found["recall@5"])


def test_odd_rankings() -> None:
    """Catches a query without a right document that counts as wrong, and ties that favour the right one."""
    found = metrics.retrieval(np.zeros((2, 3)), [{2}, set()], at=(1, 3))
    assert found["mrr"] == 1 / 3 and found["recall@1"] == 0 and found["queries_left_out"] == 1
    for scores, relevant in (([[0.1]], [set()]), ([[float("nan")]], [{0}]), ([[0.1]], [{0}, {0}])):
        with pytest.raises(ValueError, match="relevant|ranking"):
            metrics.retrieval(scores, relevant)


def test_intervals() -> None:
    """Catches samples that are not drawn together, a seed without effect, and an interval of another width."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=400)
    low, high = metrics.interval(np.mean, values)
    error = values.std() / math.sqrt(400)  # the bounds of a mean are 1.96 standard errors away
    assert abs(low - (values.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.2 * error
    assert metrics.interval(np.mean, values) == (low, high) != metrics.interval(np.mean, values, seed=1)
    assert metrics.interval(lambda a, b: float(np.mean([x == y for x, y in zip(a, b, strict=True)])), ["a", "b"] * 9,
                            ["a", "b"] * 9) == (1.0, 1.0)  # fmt: skip
    assert all(map(math.isnan, metrics.interval(lambda x: math.nan, values, n=5)))
    with pytest.raises(ValueError, match="samples"):
        metrics.interval(np.mean, [])
