"""Mining finds the nearest wrong texts of a pair, as negatives, by exact search and in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.checks import positive
from fastbert.vectors.search import semantic_search

logger = logging.getLogger("fastbert")

QUERIES = 4096  # anchors that are searched for at once


@dataclass(frozen=True)
class Mined:
    """Negatives of N pairs, the nearest first. texts and scores: N lists of at most `n` each. scores are cosines."""

    texts: list[list[str]]
    scores: list[list[float]]

    @property
    def n_short(self) -> int:
        """Returns the number of pairs that have fewer negatives than the one that has the most."""
        most = max(map(len, self.texts), default=0)
        return sum(len(texts) < most for texts in self.texts)


def mine_negatives(
    encoder: Any,
    anchors: Sequence[str],
    positives: Sequence[str],
    *,
    n: int = 1,
    corpus: Sequence[str] | None = None,
    skip: int = 0,
    depth: int = 100,
    margin: float | None = None,
    max_score: float | None = None,
) -> Mined:
    """Finds for each pair the texts of a corpus that are nearest to its anchor and are no positive of it.

    encoder: what has `encode_query` and `encode_document`, a `SentenceEncoder` or a SentenceTransformer. anchors and
    positives: N texts each; an anchor may stand in several pairs. corpus: texts to choose from, by default the
    positives. n: negatives of a pair, at most. Of the wrong texts of an anchor, by falling cosine, the first `skip` are
    passed over, and none beyond the first `depth` is looked at. margin: the score of a negative is at most that of the
    pair's positive less this. max_score: the score of a negative, at most.

    A text counts as the anchor or as one of its positives if both are the same but for case and white space. Equal
    scores stand in the order of the corpus, so that the result depends on the arguments alone.

    Raises ValueError for numbers of texts that do not fit and for an argument out of range.
    """
    positive("n", n)
    positive("depth", depth)
    if len(anchors) != len(positives):
        raise ValueError(f"positives: got {len(positives)} texts, expected one for each of {len(anchors)} anchors")
    if not 0 <= skip < depth:
        raise ValueError(f"skip: expected 0 to {depth - 1}, less than depth, got {skip}")
    if not anchors:
        return Mined([], [])
    candidates = distinct(positives if corpus is None else corpus)
    queries, documents = distinct(anchors), distinct(positives)
    query_vectors, corpus_vectors = encoder.encode_query(queries), encoder.encode_document(candidates)
    document_vectors = None
    if margin is not None:
        document_vectors = corpus_vectors if corpus is None else encoder.encode_document(documents)

    query_rows = {text: row for row, text in enumerate(queries)}
    document_rows = {text: row for row, text in enumerate(documents)}
    pair_queries = np.array([query_rows[text] for text in anchors])
    pair_documents = np.array([document_rows[text] for text in positives])
    forbidden = _forbidden(anchors, positives, queries, candidates)
    pairs_of: list[list[int]] = [[] for _ in queries]
    for pair, query in enumerate(pair_queries.tolist()):
        pairs_of[query].append(pair)

    texts: list[list[str]] = [[] for _ in anchors]
    scores: list[list[float]] = [[] for _ in anchors]
    for start in range(0, len(queries), QUERIES):
        rows = range(start, min(start + QUERIES, len(queries)))
        beyond = max(len(forbidden[row]) for row in rows)
        cosines, ids = semantic_search(
            query_vectors[start : rows.stop], corpus_vectors, top_k=depth + beyond, as_arrays=True
        )
        for row in rows:
            ranked = [
                (float(score), int(i))
                for score, i in zip(cosines[row - start], ids[row - start], strict=True)
                if int(i) not in forbidden[row]
            ][skip:depth]
            for pair in pairs_of[row]:
                limit = np.inf if max_score is None else max_score
                if margin is not None and document_vectors is not None:
                    of_positive = _cosine(query_vectors[row], document_vectors[pair_documents[pair]])
                    limit = min(limit, of_positive - margin)
                chosen = [(score, i) for score, i in ranked if score <= limit][:n]
                texts[pair] = [candidates[i] for _, i in chosen]
                scores[pair] = [score for score, _ in chosen]
    mined = Mined(texts, scores)
    n_without = sum(not each for each in texts)
    if n_without:
        logger.warning("mine_negatives: %d of %d pairs have no text that fits", n_without, len(texts))
    return mined


def distinct(texts: Sequence[str]) -> list[str]:
    """Returns each text once, in the order of its first place."""
    return list(dict.fromkeys(texts))


def key_of(text: str) -> str:
    """Returns what two texts share that are the same but for case and white space."""
    return " ".join(text.casefold().split())


def _cosine(one: Any, other: Any) -> float:
    """The cosine of two vectors in float64, 0 for a vector of zeros, rounded to float32 as the search rounds it."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.float32(one @ other / norm)) if norm else 0.0


def _forbidden(
    anchors: Sequence[str], positives: Sequence[str], queries: list[str], candidates: list[str]
) -> list[set[int]]:
    """For each query the rows of the candidates that are the query itself, or one of its positives."""
    keys: dict[str, set[str]] = {key_of(query): {key_of(query)} for query in queries}
    for anchor, text in zip(anchors, positives, strict=True):
        keys[key_of(anchor)].add(key_of(text))
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(candidates):
        rows.setdefault(key_of(text), []).append(row)
    return [{row for key in keys[key_of(query)] for row in rows.get(key, ())} for query in queries]
