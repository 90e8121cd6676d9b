"""This module has the scores of words with one tag each, as pure functions.

`metrics` has those of spans and classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert.checks import expect
from fastbert.training.finetuning.metrics import confusion_matrix, of_confusion


def tags(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, Any]:
    """Returns token_accuracy and F1 scores of words with one tag each, as scikit-learn does over all words.

    true, predicted: one list of tags per sentence. names: all tags. macro_f1 is the mean over tags that are in either;
    per_type has a dict for each of these. Raises ValueError if the number of sentences or of tags differs, or without
    words.
    """
    rows = tag_counts(true, predicted)
    expect(bool(rows.sum()), "true", "no words", "at least one")
    number = {name: i for i, name in enumerate(names)}
    truth, got = (np.array([number[tag] for sentence in some for tag in sentence]) for some in (true, predicted))
    scores, per_class = of_confusion(confusion_matrix(truth, got, len(names)))
    seen = sorted({*truth.tolist(), *got.tolist()})
    return {
        "token_accuracy": scores.pop("accuracy"),
        **{name: score for name, score in scores.items() if name != "micro_f1"},
        "sentences": len(rows),
        "tokens": len(truth),
        "per_type": {names[i]: per_class[i] for i in seen},
    }


def tag_counts(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns (N, 2) int64 for N sentences: the number of words with the right tag, and of all words."""
    expect(len(true) == len(predicted), "predicted", f"{len(predicted)} sentences", f"{len(true)}, as in true")
    for number, (t, p) in enumerate(zip(true, predicted, strict=True), start=1):
        expect(len(t) == len(p), "predicted", f"{len(p)} tags in sentence {number}", f"{len(t)}, as in true")
    rows = [(sum(a == b for a, b in zip(t, p, strict=True)), len(t)) for t, p in zip(true, predicted, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 2)


def share_of_counts(counts: np.ndarray) -> float:
    """Returns the share of right words over all sentences of `tag_counts`, (N, 2)."""
    right, words = counts.sum(0)
    return float(right / words) if words else 0.0
