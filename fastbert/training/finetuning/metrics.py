"""Metrics are pure functions of NumPy arrays. Their results equal those of scikit-learn, seqeval and SQuAD's scripts.

All scores are shares from 0 to 1. A ratio with a zero denominator is 0, as with zero_division=0 of scikit-learn. The
results are dicts of floats, ints and lists, as JSON values.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.checks import expect

BINS = 15  # number of bins of the calibration
Span = tuple[str, int, int]  # type, first token, last token (inclusive)


# Classes


def classification(labels: Any, probabilities: Any) -> dict[str, Any]:
    """Returns accuracy, F1 scores, calibration and the confusion matrix of a classifier with one label per example.

    labels: (N,) ints. probabilities: (N, C) floats; the class with the greatest one is the prediction, the first if
    several are equal. macro_f1 and weighted_f1 cover the classes that are a label or a prediction, as in scikit-learn.
    per_class has a dict for each of the C classes; confusion is (C, C), with a row for each true class.
    expected_calibration_error uses 15 bins of equal width; calibration has the bins that are not empty.

    Raises ValueError for no examples, shapes that do not match, labels outside of the classes, and probabilities that
    are not finite.
    """
    truth, p = _classes(labels, probabilities)
    predicted = p.argmax(1)
    confusion = confusion_matrix(truth, predicted, p.shape[1])
    bins = calibration(p.max(1), predicted == truth)
    scores, per_class = of_confusion(confusion)
    return {
        **scores,
        "expected_calibration_error": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(truth),
        "examples": len(truth),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "calibration": bins,
    }


def of_confusion(confusion: np.ndarray) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns the scores of (C, C), and those of each class. Means are over classes that are labels or predictions."""
    hits, support, n_predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall, f1 = _scores(hits, n_predicted, support)
    seen = (support + n_predicted) > 0
    share = float(_ratio(hits.sum(), support.sum()))
    scores = {"accuracy": share, "macro_f1": float(f1[seen].mean()), "micro_f1": share,
              "weighted_f1": float((f1 * support).sum() / support.sum()),
              "macro_precision": float(precision[seen].mean()), "macro_recall": float(recall[seen].mean())}  # fmt: skip
    return scores, _per_class(precision, recall, f1, support)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts the predictions of each class: (N,), (N,) -> (C, C) int64, with a row for each true class."""
    return np.bincount(labels * n_classes + predicted, minlength=n_classes * n_classes).reshape(n_classes, n_classes)


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the mean F1 of the classes in (N,) labels and predictions, which are ints >= 0."""
    confusion = confusion_matrix(labels, predicted, int(max(labels.max(), predicted.max())) + 1)
    support, n_predicted = confusion.sum(1), confusion.sum(0)
    f1 = _scores(np.diag(confusion), n_predicted, support)[2]
    return float(f1[(support + n_predicted) > 0].mean())


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Returns mean confidence, accuracy and count of each bin that has examples.

    A bin is (low, high]; the first includes 0. confidence: (N,) floats from 0 to 1. right: (N,) bools.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    table = []
    for k in np.unique(place).tolist():
        inside = place == k
        means = {"confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())}
        table.append({"low": k / bins, "high": (k + 1) / bins, **means, "count": int(inside.sum())})
    return table


def multilabel(labels: Any, probabilities: Any, threshold: float = 0.5) -> dict[str, Any]:
    """Returns F1 scores of a classifier with any number of labels per example.

    labels: (N, L) of 0 and 1. probabilities: (N, L) floats; a label with at least the threshold is predicted. accuracy
    is the share of examples whose labels are all right. samples_f1 is the mean F1 of the examples; it is 0 for an
    example with neither true nor predicted labels, as in scikit-learn. Raises ValueError as `classification` does.
    """
    truth, p = np.asarray(labels), np.asarray(probabilities, np.float64)
    expect(p.ndim == 2 and p.size > 0, "probabilities", p.shape, "an array (N, L) that is not empty")
    expect(truth.shape == p.shape, "labels", truth.shape, f"an array {p.shape}, as probabilities")
    expect(bool(np.isin(truth, (0, 1)).all()), "labels", "other values", "0 and 1")
    expect(bool(np.isfinite(p).all()), "probabilities", "NaN or infinity", "finite numbers")
    truth = truth.astype(bool)
    predicted = p >= threshold
    hits, n_given, support = (truth & predicted).sum(0), predicted.sum(0), truth.sum(0)
    precision, recall, f1 = _scores(hits, n_given, support)
    micro = _scores(hits.sum(), n_given.sum(), support.sum())
    each = _scores((truth & predicted).sum(1), predicted.sum(1), truth.sum(1))[2]
    return {
        "accuracy": float((truth == predicted).all(1).mean()),
        "macro_f1": float(f1.mean()),
        "micro_f1": float(micro[2]),
        "weighted_f1": float(_ratio((f1 * support).sum(), support.sum())),
        "samples_f1": float(each.mean()),
        "micro_precision": float(micro[0]),
        "micro_recall": float(micro[1]),
        "hamming_loss": float((truth != predicted).mean()),
        "examples": len(truth),
        "per_class": _per_class(precision, recall, f1, support),
    }


def _classes(labels: Any, probabilities: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, p = np.asarray(labels), np.asarray(probabilities, np.float64)
    expect(p.ndim == 2 and p.size > 0, "probabilities", p.shape, "an array (N, C) that is not empty")
    expect(truth.shape == p.shape[:1], "labels", truth.shape, f"an array ({len(p)},)")
    expect(truth.dtype.kind in "iu", "labels", str(truth.dtype), "ints")
    expect(bool(np.isfinite(p).all()), "probabilities", "NaN or infinity", "finite numbers")
    low, high = int(truth.min()), int(truth.max())
    expect(low >= 0 and high < p.shape[1], "labels", (low, high), f"numbers of the {p.shape[1]} classes")
    return truth.astype(np.int64), p


def _ratio(above: Any, below: Any) -> np.ndarray:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _scores(hits: Any, n_predicted: Any, n_true: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns precision, recall and F1 from counts."""
    hits = np.asarray(hits)
    return _ratio(hits, n_predicted), _ratio(hits, n_true), _ratio(2 * hits, np.add(n_predicted, n_true))


def _per_class(precision: np.ndarray, recall: np.ndarray, f1: np.ndarray, support: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for p, r, f, s in zip(precision, recall, f1, support, strict=True)
    ]


# Numbers


def regression(labels: Any, values: Any) -> dict[str, Any]:
    """Returns Pearson's and Spearman's correlations, and mean squared and absolute errors, of (N,) and (N,) floats.

    A correlation is NaN if the labels or the values are all equal. Ties get their mean rank. Raises ValueError for
    shapes that do not match and for numbers that are not finite.
    """
    truth, got = np.asarray(labels, np.float64), np.asarray(values, np.float64)
    expect(truth.ndim == 1 and truth.size > 0, "labels", truth.shape, "an array (N,) that is not empty")
    expect(got.shape == truth.shape, "values", got.shape, f"an array {truth.shape}")
    for name, array in (("labels", truth), ("values", got)):
        expect(bool(np.isfinite(array).all()), name, "NaN or infinity", "finite numbers")
    return {
        "pearson": pearson(truth, got),
        "spearman": spearman(truth, got),
        "mse": float(((truth - got) ** 2).mean()),
        "mae": float(np.abs(truth - got).mean()),
        "examples": len(truth),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the linear correlation of (N,) and (N,); NaN if one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    dx, dy = x - x.mean(), y - y.mean()
    return float(np.clip((dx / np.linalg.norm(dx)) @ (dy / np.linalg.norm(dy)), -1, 1))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the correlation of the ranks of (N,) and (N,); NaN if one of them is constant."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


# Spans of tokens


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Returns the spans of one sentence's tags, as seqeval's get_entities and conlleval do.

    Tags are "O", or B-, I-, E- or S- with a type ("_" if there is none). An I- that continues no span begins one.
    """
    spans: list[Span] = []
    before, type_before, start = "O", "", 0
    for i, whole in enumerate([*tags, "O"]):
        tag, kind = whole[:1] or "O", whole[1:].split("-", maxsplit=1)[-1] or "_"
        changed = type_before != kind
        if before in "ES" or (before in "BI" and tag in "BSO") or (before not in "O." and changed):
            spans.append((type_before, start, i - 1))
        if tag in "BS" or (before in "ESO" and tag in "EI") or (tag not in "O." and changed):
            start = i
        before, type_before = tag, kind
    return spans


def spans(true: Sequence[Sequence[Any]], predicted: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Returns strict precision, recall and F1 of spans: both ends and the type must match, as in seqeval's default.

    true, predicted: one list per sentence, of tags in the form of IOB2, or of spans from `spans_of`. precision, recall
    and f1 count all spans equally; macro_f1 is the mean over the types, and weighted_f1 the mean weighted by support.
    per_type has a dict for each type in either. Raises ValueError if the number of sentences or of tags differs.
    """
    pairs = list(_span_pairs(true, predicted))
    counts = {kind: np.zeros(3, np.int64) for kind in sorted({span[0] for t, p in pairs for span in t | p})}
    for t, p in pairs:
        for place, several in enumerate((t & p, p, t)):
            for span in several:
                counts[span[0]][place] += 1
    table = np.array(list(counts.values()), np.int64).reshape(-1, 3)
    precision, recall, f1 = _scores(*table.T)
    whole = _scores(*table.sum(0))
    support = table[:, 2]
    return {
        "precision": float(whole[0]),
        "recall": float(whole[1]),
        "f1": float(whole[2]),
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        "weighted_f1": float(_ratio((f1 * support).sum(), support.sum())),
        "sentences": len(pairs),
        "spans": int(support.sum()),
        "per_type": dict(zip(counts, _per_class(precision, recall, f1, support), strict=True)),
    }


def span_counts(true: Sequence[Sequence[Any]], predicted: Sequence[Sequence[Any]]) -> np.ndarray:
    """Returns (N, 3) int64 for N sentences: the numbers of right, predicted and true spans.

    For a confidence interval over sentences: ``interval(f1_of_counts, span_counts(true, predicted))``.
    """
    rows = [(len(t & p), len(p), len(t)) for t, p in _span_pairs(true, predicted)]
    return np.array(rows, np.int64).reshape(-1, 3)


def f1_of_counts(counts: np.ndarray) -> float:
    """Returns the F1 over all sentences of `span_counts`, (N, 3)."""
    return float(_scores(*counts.sum(0))[2])


def _span_pairs(true: Sequence[Sequence[Any]], predicted: Sequence[Sequence[Any]]) -> Iterable[tuple[set, set]]:
    expect(len(true) == len(predicted), "predicted", f"{len(predicted)} sentences", f"{len(true)}, as in true")
    for number, pair in enumerate(zip(true, predicted, strict=True), start=1):
        t, p = pair
        if t and p and isinstance(t[0], str) and isinstance(p[0], str):
            expect(len(t) == len(p), "predicted", f"{len(p)} tags in sentence {number}", f"{len(t)}, as in true")
        yield tuple(set(spans_of(s)) if len(s) and isinstance(s[0], str) else set(s) for s in pair)  # type: ignore[misc]


# Answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_answer(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation, English articles and double spaces, as SQuAD does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns exact match and F1 of each question, (N,) and (N,) float64: the best over its reference answers.

    A question without a reference has no answer; the right prediction is then "", as in SQuAD 2.
    """
    expect(len(predictions) == len(references), "predictions", len(predictions), f"{len(references)}, as references")
    exact, f1 = np.zeros(len(predictions)), np.zeros(len(predictions))
    for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        got = normalized_answer(prediction)
        wanted = [answer for answer in map(normalized_answer, answers) if answer] or [""]
        exact[i] = max(float(got == answer) for answer in wanted)
        f1[i] = max(_overlap(got.split(), answer.split()) for answer in wanted)
    return exact, f1


def squad(
    predictions: Sequence[str] | Mapping[str, str], references: Sequence[Sequence[str]] | Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Returns exact match and F1 of answers, as SQuAD's scripts do, but as shares from 0 to 1.

    predictions: a text for each question, "" for no answer. references: its right answers, an empty list for no answer.
    Both are lists in the same order, or dicts with the same ids. If some questions have no answer, has_answer_... and
    no_answer_... are the scores of the two parts. Raises ValueError for no questions, and if ids or lengths differ.
    """
    if isinstance(references, Mapping):
        assert isinstance(predictions, Mapping), "predictions: expected a dict, as references"
        missing = sorted(set(references) ^ set(predictions))
        expect(not missing, "predictions", f"other ids than references, among them {missing[:3]}", "the same")
        predictions, references = [predictions[key] for key in references], list(references.values())
    expect(len(references) > 0, "references", "no questions", "at least one")
    exact, f1 = squad_each(predictions, references)  # type: ignore[arg-type]
    answered = np.array([any(map(normalized_answer, answers)) for answers in references])
    scores: dict[str, Any] = {"exact_match": float(exact.mean()), "f1": float(f1.mean()), "examples": len(exact)}
    for name, part in (("has_answer", answered), ("no_answer", ~answered)):
        if part.any() and not part.all():
            scores[f"{name}_exact_match"] = float(exact[part].mean())
            scores[f"{name}_f1"] = float(f1[part].mean())
            scores[f"{name}_examples"] = int(part.sum())
    return scores


def _overlap(got: list[str], wanted: list[str]) -> float:
    """Returns the F1 of two bags of words; if one is empty, 1.0 if both are, else 0.0."""
    if not got or not wanted:
        return float(got == wanted)
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted))


# Rankings


def retrieval(
    ranking: Any, relevant: Sequence[Collection[int] | Mapping[int, float]], *, at: Sequence[int] = (1, 5, 10, 100)
) -> dict[str, Any]:
    """Returns recall@k, MRR and nDCG@k of rankings.

    ranking: (Q, D) floats are scores, the greatest first, and the first of equal ones first; (Q, K) ints are numbers of
    documents, best first. relevant: the numbers of the relevant documents of each query, or their gains by number.
    recall@k is the share of a query's relevant documents among its first k. mrr uses the first relevant document; it is
    0 if the ranking has none. ndcg@k uses the gains unchanged, divided by log2(1 + rank).

    Queries without a relevant document are omitted and counted. Raises ValueError if none is left.
    """
    order = np.asarray(ranking)
    expect(order.ndim == 2 and order.shape[1] > 0, "ranking", order.shape, "an array (Q, D) with D from 1 on")
    expect(len(relevant) == len(order), "relevant", f"{len(relevant)} queries", f"{len(order)}, as in ranking")
    if order.dtype.kind not in "iu":
        expect(not bool(np.isnan(order).any()), "ranking", "NaN", "scores")
        order = np.argsort(-order, axis=1, kind="stable")
    rows = [row for query, wanted in zip(order, relevant, strict=True) if (row := _ranked(query, wanted, at))]
    expect(bool(rows), "relevant", "no relevant documents for any query", "at least one")
    means = np.array(rows).mean(0)
    names = ["mrr", *(f"recall@{k}" for k in at), *(f"ndcg@{k}" for k in at)]
    left_out = len(order) - len(rows)
    return {**dict(zip(names, means.tolist(), strict=True)), "queries": len(rows), "queries_left_out": left_out}


def _ranked(query: np.ndarray, wanted: Collection[int] | Mapping[int, float], at: Sequence[int]) -> list[float]:
    """Returns MRR, recall and nDCG at each k of one query; an empty list if no document is relevant."""
    gains = (
        {k: float(g) for k, g in wanted.items() if g > 0} if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
    )
    if not gains:
        return []
    got = np.zeros(len(query))
    for place in np.flatnonzero(np.isin(query, list(gains))):
        got[place] = gains[int(query[place])]
    ideal = np.array(sorted(gains.values(), reverse=True))
    places = np.flatnonzero(got)
    first = 1.0 / (places[0] + 1) if len(places) else 0.0
    recall = [float(np.count_nonzero(got[:k])) / len(gains) for k in at]
    return [first, *recall, *(_discounted(got[:k]) / _discounted(ideal[:k]) for k in at)]


def _discounted(gains: np.ndarray) -> float:
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


# Confidence


def interval(statistic: Callable[..., float], *samples: Any, n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a statistic, from its percentiles over n samples with replacement.

    samples: arrays or lists of N examples each, which are drawn together; the statistic gets lists as lists. Draws with
    a NaN statistic are omitted; if all are NaN, the interval is (NaN, NaN). Raises ValueError for no examples and for
    different lengths.
    """
    expect(bool(samples) and len(samples[0]) > 0, "samples", "no examples", "at least one")
    size = len(samples[0])
    expect(all(len(s) == size for s in samples), "samples", [len(s) for s in samples], "samples of one length")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(n):
        drawn = generator.integers(0, size, size)
        values.append(statistic(*(s[drawn] if isinstance(s, np.ndarray) else [s[i] for i in drawn] for s in samples)))
    kept = np.array([value for value in values if not math.isnan(value)])
    if not len(kept):
        return math.nan, math.nan
    low, high = np.percentile(kept, (2.5, 97.5))
    return float(low), float(high)
