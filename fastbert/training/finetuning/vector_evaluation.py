"""This module evaluates sentence embeddings and cross-encoders, for sentence-transformers' trainers and for reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbert.training.finetuning import metrics
from fastbert.training.finetuning.mining import distinct, key_of
from fastbert.training.finetuning.vector_data import Example
from fastbert.vectors.search import semantic_search

DEPTH = 100  # depth of a ranking: a right text beyond it counts as missing
CUTS = 1, 5, 10

Scores = dict[str, Any]


class PairRetrieval:
    """The evaluation ranks the distinct positives of examples for each distinct anchor, by cosine and exact search.

    `recall@1`, `recall@5`, `recall@10`, `mrr` and `ndcg@10` use the first 100 texts of a ranking.
    """

    headline = "mrr"

    def __init__(self, examples: Sequence[Example]) -> None:
        self.queries = distinct([example.anchor for example in examples])
        self.corpus = distinct([example.positive for example in examples])
        self.corpus = distinct([*self.corpus, *(text for example in examples for text in example.negatives)])
        rows = {text: row for row, text in enumerate(self.corpus)}
        places = {text: row for row, text in enumerate(self.queries)}
        self.relevant: list[set[int]] = [set() for _ in self.queries]
        for example in examples:
            self.relevant[places[example.anchor]].add(rows[example.positive])

    def score(self, vectors: Callable[[Sequence[str], bool], np.ndarray]) -> Scores:
        """Returns the scores of a model.

        vectors: converts texts to (N, dim); its second argument is True for documents.
        """
        queries, corpus = vectors(self.queries, False), vectors(self.corpus, True)
        _, ids = semantic_search(queries, corpus, top_k=DEPTH, as_arrays=True)
        return retrieval_scores(ids, self.relevant)


class ScoredPairs:
    """The evaluation compares the cosines of scored pairs with their scores: `spearman` and `pearson`."""

    headline = "spearman"

    def __init__(self, examples: Sequence[Example]) -> None:
        self.firsts = [example.anchor for example in examples]
        self.seconds = [example.positive for example in examples]
        self.scores = np.array([example.score for example in examples], dtype=np.float64)

    def score(self, vectors: Callable[[Sequence[str], bool], np.ndarray]) -> Scores:
        """Returns the scores of a model; `vectors` as in `PairRetrieval.score`."""
        firsts, seconds = (
            np.asarray(vectors(t, d), np.float64) for t, d in ((self.firsts, False), (self.seconds, True))
        )
        norms = np.linalg.norm(firsts, axis=1) * np.linalg.norm(seconds, axis=1)
        cosines = (firsts * seconds).sum(1) / np.where(norms == 0, 1.0, norms)
        return correlation_scores(self.scores, cosines)


class LabelledTexts:
    """The evaluation ranks all other texts for each labelled text, by cosine and exact search.

    `map@r` is from Musgrave, Belongie and Lim (2020): the mean over the first R places of the precision at each right
    text, and 0 at a wrong one. R is the number of other texts of the class, here at most 100. `nearest` is the share of
    texts whose nearest text has the same class. `mrr` is the mean reciprocal rank of the first right text. Texts
    without another text of their class are not evaluated.
    """

    headline = "map@r"

    def __init__(self, examples: Sequence[Example]) -> None:
        classes = {example.anchor: example.label for example in examples}
        self.texts, self.labels = list(classes), np.unique(list(classes.values()), return_inverse=True)[1]
        if np.bincount(self.labels).max(initial=0) < 2:
            raise ValueError("eval: no class has two texts; nothing could be ranked")

    def score(self, vectors: Callable[[Sequence[str], bool], np.ndarray]) -> Scores:
        """Returns the scores of a model; `vectors` as in `PairRetrieval.score`."""
        values = vectors(self.texts, False)
        counts = np.bincount(self.labels)[self.labels] - 1
        _, ids = semantic_search(values, values, top_k=DEPTH + 1, as_arrays=True)
        rows = [row[row != i][: ids.shape[1] - 1] for i, row in enumerate(ids)]
        right = np.stack([self.labels[row] == self.labels[i] for i, row in enumerate(rows)])[counts > 0]
        n_right = np.minimum(counts[counts > 0], DEPTH)
        shares = right.cumsum(1) / np.arange(1, right.shape[1] + 1)
        within = np.arange(right.shape[1]) < n_right[:, None]
        precision = (shares * right * within).sum(1) / n_right
        first = np.where(right.any(1), 1.0 / (right.argmax(1) + 1), 0.0)
        return {
            "map@r": float(precision.mean()), "nearest": float(right[:, 0].mean()), "mrr": float(first.mean()),
            "map@r_interval": metrics.interval(np.mean, precision),
        }  # fmt: skip


class TeacherVectors:
    """The evaluation compares vectors with a teacher's: `negative_mse`, where greater is better, and `cosine`."""

    headline = "negative_mse"

    def __init__(self, examples: Sequence[Example]) -> None:
        self.texts = [example.anchor for example in examples] + [e.positive for e in examples if e.positive]
        repeated = [e.vector for e in examples] + [e.vector for e in examples if e.positive]
        self.targets = np.asarray(repeated, np.float64)

    def score(self, vectors: Callable[[Sequence[str], bool], np.ndarray]) -> Scores:
        """Returns the scores of a model; `vectors` as in `PairRetrieval.score`.

        If the model's vectors are narrower, the teacher's vectors are truncated.
        """
        values = np.asarray(vectors(self.texts, False), np.float64)
        targets = self.targets[:, : values.shape[1]]
        norms = np.linalg.norm(values, axis=1) * np.linalg.norm(targets, axis=1)
        cosines = (values * targets).sum(1) / np.where(norms == 0, 1.0, norms)
        return {"negative_mse": -float(((values - targets) ** 2).mean()), "cosine": float(cosines.mean())}


class RankedLists:
    """The evaluation ranks the texts of each list by a cross-encoder's scores: `mrr`, `ndcg@10` and recalls.

    lists: for each query its texts and their relevance; a text with a relevance above 0 is right. Lists without a right
    text, or without a wrong one, are omitted because they give no information. Among equal scores, right texts rank
    after wrong ones.
    """

    headline = "mrr"

    def __init__(self, lists: Sequence[tuple[str, Sequence[str], Sequence[float]]]) -> None:
        self.lists = [each for each in lists if any(r > 0 for r in each[2]) and not all(r > 0 for r in each[2])]

    def score(self, predict: Callable[[list[tuple[str, str]]], np.ndarray]) -> Scores:
        """Returns the scores of a model. predict: returns scores of pairs of texts, (N,)."""
        values = iter(predict([(query, text) for query, texts, _ in self.lists for text in texts]).tolist())
        longest = max(len(texts) for _, texts, _ in self.lists)
        ids = np.full((len(self.lists), longest), -1)
        for row, (_, texts, relevances) in enumerate(self.lists):
            order = np.lexsort((relevances, [-next(values) for _ in texts]))
            ids[row, : len(order)] = order
        return retrieval_scores(ids, [{i for i, r in enumerate(rels) if r > 0} for _, _, rels in self.lists])


class PredictedScores:
    """The evaluation compares a cross-encoder's scores of pairs with their given scores: `spearman` and `pearson`."""

    headline = "spearman"

    def __init__(self, examples: Sequence[Example]) -> None:
        self.pairs = [(example.anchor, example.positive) for example in examples]
        self.scores = np.array([example.score for example in examples], dtype=np.float64)

    def score(self, predict: Callable[[list[tuple[str, str]]], np.ndarray]) -> Scores:
        """Returns the scores of a model; `predict` as in `RankedLists.score`."""
        return correlation_scores(self.scores, predict(self.pairs))


def lists_of(
    examples: Sequence[Example], n_candidates: int, miner: Any = None
) -> list[tuple[str, list[str], list[float]]]:
    """Makes a list for each anchor: its scored texts, or its positives and negatives.

    Pairs without negatives get wrong texts from the other positives, up to n_candidates texts in all. With a miner they
    are the nearest by its vectors; otherwise they are the next ones in the order of the examples.
    """
    lists: dict[str, dict[str, float]] = {}
    for example in examples:
        texts = lists.setdefault(example.anchor, {})
        if example.kind == "lists":
            assert isinstance(example.score, tuple)
            texts.update(zip(example.documents, example.score, strict=True))
        elif example.kind == "scored":
            assert isinstance(example.score, float)
            texts[example.positive] = example.score
        else:
            texts.update({text: 0.0 for text in example.negatives if text not in texts})
            texts[example.positive] = 1.0
    if examples and examples[0].kind == "pairs" and not any(example.negatives for example in examples):
        corpus = distinct([example.positive for example in examples])
        for row, (texts, others) in enumerate(
            zip(lists.values(), _others(list(lists), corpus, miner, n_candidates), strict=True)
        ):
            rights = {key_of(text) for text in texts}
            order = others if others is not None else (corpus[(row + i) % len(corpus)] for i in range(len(corpus)))
            for text in order:
                if len(texts) >= n_candidates:
                    break
                if key_of(text) not in rights:
                    texts.setdefault(text, 0.0)
    return [(anchor, list(texts), list(texts.values())) for anchor, texts in lists.items()]


def _others(anchors: list[str], corpus: list[str], miner: Any, n: int) -> list[list[str] | None]:
    """Returns for each anchor the nearest texts of the corpus, by a miner; None for each anchor without a miner."""
    if miner is None:
        return [None] * len(anchors)
    _, ids = semantic_search(miner.encode_query(anchors), miner.encode_document(corpus), top_k=2 * n, as_arrays=True)
    return [[corpus[i] for i in row] for row in ids.tolist()]


def retrieval_scores(ids: np.ndarray, relevant: Sequence[set[int]]) -> Scores:
    """Returns recalls, MRR with its interval, and nDCG of rankings.

    ids: (Q, k) int, the best first, -1 after the end of a ranking. relevant: the right ids of each query.
    """
    scores = metrics.retrieval(ids, relevant, at=CUTS)
    hits = np.array([np.isin(row, list(wanted)) for row, wanted in zip(ids, relevant, strict=True) if wanted])
    reciprocal = np.where(hits.any(1), 1.0 / (hits.argmax(1) + 1), 0.0)
    return {**scores, "mrr_interval": metrics.interval(np.mean, reciprocal)}


def correlation_scores(truth: np.ndarray, values: np.ndarray) -> Scores:
    """Returns the Spearman correlation with its interval, and the Pearson correlation, of scores (N,) and (N,)."""
    scores = metrics.regression(truth, values)
    interval = metrics.interval(metrics.spearman, truth, np.asarray(values, np.float64))
    return {"spearman": scores["spearman"], "pearson": scores["pearson"], "spearman_interval": interval}


def evaluator_of(score: Callable[[Any], Scores], headline: str) -> Any:
    """Makes an evaluator for a trainer of sentence-transformers. score: takes a model, returns numbers by name."""
    return _evaluator_class()(score, headline)


@functools.cache
def _evaluator_class() -> type:
    from sentence_transformers.evaluation import SentenceEvaluator

    class Evaluator(SentenceEvaluator):
        def __init__(self, score: Callable[[Any], Scores], headline: str) -> None:
            super().__init__()
            self.score, self.primary_metric = score, headline

        def __call__(self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1) -> Scores:
            return {name: value for name, value in self.score(model).items() if isinstance(value, float)}

    return Evaluator
