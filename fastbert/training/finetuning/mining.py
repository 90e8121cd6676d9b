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

QUERIES = 4096  # number of anchors per search


@dataclass(frozen=True)
class Mined:
    """A `Mined` holds the negatives of N pairs, the nearest first.

    texts and scores: N lists of at most `n` each. scores are cosines.
    """

    texts: list[list[str]]
    scores: list[list[float]]

    @property
    def n_short(self) -> int:
        """Returns the number of pairs that have fewer negatives than the pair with the most negatives."""
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
    """Finds for each pair the texts of a corpus that are nearest to its anchor and are not its positives.

    encoder: a `SentenceEncoder`, a SentenceTransformer, or another object with `encode_query` and `encode_document`.
    anchors and positives: N texts each; an anchor may be in several pairs. corpus: the candidate texts, by default the
    positives. n: the maximum number of negatives of a pair. The wrong texts of an anchor are ordered by descending
    cosine; the first `skip` are skipped, and only the first `depth` are used. margin: the score of a negative is at
    most the score of the pair's positive minus the margin. max_score: the maximum score of a negative.

    A text counts as the anchor or as one of its positives if they differ only in case and white space. Equal scores are
    in the order of the corpus, so that the result depends only on the arguments.

    Raises ValueError for different numbers of texts and for an argument out of range.
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
    """Returns each distinct text once, in the order of the first occurrences."""
    return list(dict.fromkeys(texts))


def key_of(text: str) -> str:
    """Returns a key that is equal for two texts that differ only in case and white space."""
    return " ".join(text.casefold().split())


def _cosine(one: Any, other: Any) -> float:
    """Returns the cosine of two vectors in float64, 0 for a zero vector, rounded to float32 as in the search."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.float32(one @ other / norm)) if norm else 0.0


def _forbidden(
    anchors: Sequence[str], positives: Sequence[str], queries: list[str], candidates: list[str]
) -> list[set[int]]:
    """Returns for each query the rows of the candidates that are the query itself, or one of its positives."""
    keys: dict[str, set[str]] = {key_of(query): {key_of(query)} for query in queries}
    for anchor, text in zip(anchors, positives, strict=True):
        keys[key_of(anchor)].add(key_of(text))
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(candidates):
        rows.setdefault(key_of(text), []).append(row)
    return [{row for key in keys[key_of(query)] for row in rows.get(key, ())} for query in queries]
