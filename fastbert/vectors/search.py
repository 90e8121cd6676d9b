"""Search finds the vectors of a matrix that are nearest to each query, exactly and in bounded memory.

README.md describes the method. Q is the number of queries, N of rows of the matrix, k of results for a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.checks import one_of, positive
from fastbert.ops import dispatch
from fastbert.vectors.corpus import BINARY, Corpus, corpus_of
from fastbert.vectors.quantize import as_floats
from fastbert.vectors.similarity import function_name

QUERIES, ROWS = 256, 32768  # scored at once, by default
SPARE = 32  # candidates kept beyond k, if k is not more: they make a second pass rare
LEAST_NORM = 1e-15  # of numbers whose squares float32 holds
GATHERED = 2**23  # float64 numbers held at once while candidates are scored anew

Hits = tuple[np.ndarray, np.ndarray]  # scores (Q, k) float64 and ids (Q, k) int64, the best first


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    *,
    top_k: int = 10,
    score: str = "cosine",
    query_chunk_size: int = QUERIES,
    corpus_chunk_size: int = ROWS,
    corpus_precision: str | None = None,
    ranges: Any = None,
    rescore: bool = True,
    rescore_multiplier: int = 4,
    rescore_embeddings: Any = None,
    device: str | torch.device | None = None,
    as_arrays: bool = False,
) -> Any:
    """Finds the top_k rows of a matrix that are nearest to each query, by "cosine" or "dot".

    query_embeddings: (Q, dim) or (dim,), corpus_embeddings: (N, dim), arrays (memory-mapped ones too), tensors or lists
    of vectors, in any floating-point dtype. Memory holds query_chunk_size x corpus_chunk_size scores and
    corpus_chunk_size rows in float32 at once. They are on `device`, by default that of the corpus, if it is a tensor,
    or of the queries.

    A corpus may be a result of `quantize_embeddings`; the default corpus_precision follows from its dtype and width. A
    corpus in "int8" or "uint8" needs the ranges of its quantisation; a step counts as its middle value. In a corpus in
    "binary" or "ubinary" the top_k * rescore_multiplier rows of least Hamming distance get a second score (rescore):
    the product of the query and the signs of the row, or the row of rescore_embeddings, (N, dim) floats, which may be
    on disk. Without rescoring, or for queries with the quantisation of the corpus, the score is
    1 - 2 * distance / bits.

    Returns a list of {"corpus_id": int, "score": float} for each query, the best first, equal scores by id; or with
    as_arrays scores (Q, k) float32 and ids (Q, k) int64, where k is top_k or the number of rows, whichever is less. A
    vector of zeros has a cosine of 0 with everything.

    Scores and order are those of float64, except for the choice of rows by a Hamming distance. Raises ValueError for
    different widths, for NaN or infinity (with the row), and for a wrong argument. Raises TypeError for a dtype that is
    not supported.
    """
    score = function_name(score)
    one_of("score", score, "cosine", "dot")
    sizes = {"top_k": top_k, "query_chunk_size": query_chunk_size, "corpus_chunk_size": corpus_chunk_size}
    for name, size in {**sizes, "rescore_multiplier": rescore_multiplier}.items():
        positive(name, size)
    torch_device = _device(corpus_embeddings, query_embeddings) if device is None else torch.device(device)
    queries, width = _matrix("query_embeddings", query_embeddings)
    corpus = corpus_of(corpus_embeddings, queries, width, corpus_precision, ranges, torch_device)
    if len(queries) == 0 or corpus.n == 0:
        scores, ids = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    elif corpus.precision in BINARY:
        rescored = None
        if rescore_embeddings is not None:
            rescored = corpus_of(rescore_embeddings, queries, width, None, None, torch_device)
            if rescored.n != corpus.n:
                rows = f"{rescored.n} rows, expected {corpus.n}"
                raise ValueError(f"rescore_embeddings: got {rows}, as in corpus_embeddings")
        scores, ids = _binary_search(
            queries, corpus, top_k, score, query_chunk_size, corpus_chunk_size,
            rescore_multiplier if rescore and queries.dtype.kind == "f" else 0, rescored,
        )  # fmt: skip
    else:
        search = _Search(corpus.queries(queries), corpus, top_k, score, query_chunk_size, corpus_chunk_size)
        scores, ids = search.run()
    if as_arrays:
        return scores.astype(np.float32), ids
    pairs = zip(scores.tolist(), ids.tolist(), strict=True)
    return [[{"corpus_id": i, "score": s} for s, i in zip(*row, strict=True)] for row in pairs]


def _device(*embeddings: Any) -> torch.device:
    return next((x.device for x in embeddings if isinstance(x, Tensor)), torch.device("cpu"))


def _matrix(name: str, embeddings: Any) -> tuple[np.ndarray, int]:
    """Returns the queries as (Q, dim) floats, or as the bytes that they are, and their width."""
    if getattr(embeddings, "ndim", 1) == 1 and len(embeddings) == 0:
        return np.zeros((0, 0), np.float32), 0
    bytes_came = str(getattr(embeddings, "dtype", "")).removeprefix("torch.") in ("int8", "uint8")
    if bytes_came:
        array = np.asarray(embeddings.cpu() if isinstance(embeddings, Tensor) else embeddings)
    else:
        array = as_floats(name, embeddings)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape (Q, dim) or (dim,), got {array.shape}")
    bad = ~np.isfinite(array).all(1)
    if bad.any():
        raise ValueError(f"{name}: row {int(bad.argmax())} is not finite")
    return array, array.shape[1]


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt((rows * rows).sum(-1))


def _product_error(dim: int, device: torch.device) -> float:
    """Returns the greatest error of a float32 product of two vectors of length 1."""
    # Products and sums, as many in a norm, and the roundings before them; TF32 rounds both operands to 11 bits.
    tf32 = 2.0**-9 if device.type == "cuda" and dispatch.tf32_allowed() else 0.0
    return (2 * dim + 8) * float(np.finfo(np.float32).eps) + tf32


class _Search:
    """A _Search compares queries with rows that stand for numbers."""

    def __init__(
        self, queries: np.ndarray, corpus: Corpus, top_k: int, score: str, query_chunk: int, corpus_chunk: int
    ) -> None:
        self.corpus, self.cosine = corpus, score == "cosine"
        self.k = min(top_k, corpus.n)
        self.kept = min(self.k + max(self.k, SPARE), corpus.n)
        self.query_chunk, self.corpus_chunk = query_chunk, corpus_chunk
        queries = queries.astype(np.float64)
        norms = _norms(queries)
        if self.cosine:
            queries = queries / np.where(norms == 0, 1.0, norms)[:, None]
            norms = np.minimum(norms, 1.0)
        self.queries = queries
        self.on_device = torch.from_numpy(queries.astype(np.float32)).to(corpus.device)
        # |float32 score - score| <= slack * the norm of the row
        self.slack = norms * _product_error(queries.shape[1], corpus.device)
        self.largest = 1.0 if self.cosine else 0.0  # norm of a row

    def run(self) -> Hits:
        """Returns the k best rows of each query."""
        first_scores, candidates = self._first_pass()
        slack = self.slack * self.largest
        scores = self._exact(candidates)
        order = np.lexsort((candidates, -scores), axis=1)[:, : self.k]
        hits = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
        if self.kept < self.corpus.n:
            # What was not kept scores at most this; where that may reach the k-th, it has to be looked at.
            reach = first_scores.min(1) + slack
            unsure = np.flatnonzero((reach >= hits[0][:, -1]) & (self.slack > 0))
            hits[0][self.slack == 0], hits[1][self.slack == 0] = 0.0, np.arange(self.k)  # queries of zeros
            if len(unsure):
                self._second_pass(unsure, hits, slack)
        return hits

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, rows in float32). For cosines rows have a length of 1, but zeros stay zeros."""
        for start in range(0, self.corpus.n, self.corpus_chunk):
            rows = self.corpus.chunk(start, min(start + self.corpus_chunk, self.corpus.n))
            norms = torch.linalg.vector_norm(rows, dim=1)
            if not bool(((norms > LEAST_NORM) & norms.isfinite()).all()):  # or squares overflow, or underflow
                norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
                bad = ~norms.isfinite()
                if bad.any():
                    raise ValueError(f"corpus_embeddings: row {start + int(bad.nonzero()[0])} is not finite")
            if self.cosine:
                rows = rows / norms.where(norms != 0, 1.0).to(rows)[:, None]
            else:
                self.largest = max(self.largest, float(norms.max()))
            yield start, rows

    def _first_pass(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the `kept` best of each query by their float32 scores, in no order: scores and ids (Q, kept)."""
        n_queries, device = len(self.queries), self.corpus.device
        best = torch.full((n_queries, self.kept), -torch.inf, dtype=torch.float32, device=device)
        ids = torch.full((n_queries, self.kept), -1, dtype=torch.int64, device=device)
        for start, rows in self._chunks():
            for q in range(0, n_queries, self.query_chunk):
                part = slice(q, q + self.query_chunk)
                values, places = (self.on_device[part] @ rows.T).topk(min(self.kept, len(rows)), sorted=False)
                values, places = torch.cat([best[part], values], 1), torch.cat([ids[part], places + start], 1)
                best[part], chosen = values.topk(self.kept, sorted=False)
                ids[part] = places.gather(1, chosen)
        if not bool(best.isfinite().all()):
            raise ValueError("query_embeddings, corpus_embeddings: their products overflow float32")
        return best.double().cpu().numpy(), ids.cpu().numpy()

    def _exact(self, ids: np.ndarray) -> np.ndarray:
        """Returns the scores of ids (Q, m) in float64."""
        scores = np.empty(ids.shape)
        at_once = max(1, GATHERED // max(1, ids.shape[1] * self.queries.shape[1]))
        for q in range(0, len(ids), at_once):
            part = slice(q, q + at_once)
            rows = self.corpus.rows(ids[part].ravel()).reshape(*ids[part].shape, -1)
            scores[part] = self._score(rows, self.queries[part][:, None])
        return scores

    def _score(self, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
        # numpy adds up every row alike, wherever it stands: equal rows have equal scores, to the bit.
        scores = (rows * queries).sum(-1)
        if self.cosine:
            norms = _norms(rows)
            scores /= np.where(norms == 0, 1.0, norms)
        return scores

    def _second_pass(self, unsure: np.ndarray, hits: Hits, slack: np.ndarray) -> None:
        """Scores in float64, for these queries, every row whose score may be among the k best."""
        for start, rows in self._chunks():
            for first in range(0, len(unsure), self.query_chunk):
                part = unsure[first : first + self.query_chunk]
                scores = (self.on_device[torch.from_numpy(part).to(rows.device)] @ rows.T).cpu().numpy()
                for i, row in zip(part.tolist(), scores, strict=True):
                    places = np.flatnonzero(row >= hits[0][i, -1] - slack[i]) + start
                    self._merge(i, places, hits)

    def _merge(self, i: int, places: np.ndarray, hits: Hits) -> None:
        """Puts those of the rows that belong there into the hits of query i."""
        at_once = max(1, GATHERED // self.queries.shape[1])
        for first in range(0, len(places), at_once):
            new = np.setdiff1d(places[first : first + at_once], hits[1][i])
            scores = np.concatenate([hits[0][i], self._score(self.corpus.rows(new), self.queries[i])])
            ids = np.concatenate([hits[1][i], new])
            order = np.lexsort((ids, -scores))[: self.k]
            hits[0][i], hits[1][i] = scores[order], ids[order]


def _binary_search(
    queries: np.ndarray, corpus: Corpus, top_k: int, score: str, query_chunk: int, corpus_chunk: int, multiplier: int,
    rescored: Corpus | None,
) -> Hits:  # fmt: skip
    """Returns the nearest rows by Hamming distance, exactly.

    multiplier: top_k times this number of rows get a second score; 0 for none.
    """
    bits = corpus.queries(queries)  # (Q, D) of -1 and 1
    n_bits = bits.shape[1]
    k = min(top_k * max(multiplier, 1), corpus.n)
    on_device = torch.from_numpy(bits.astype(np.float32)).to(corpus.device)
    keys = torch.empty(len(bits), 0, dtype=torch.int64, device=corpus.device)
    for start in range(0, corpus.n, corpus_chunk):
        rows = corpus.chunk(start, min(start + corpus_chunk, corpus.n))
        # D - 2 * distance, a whole number that float32 holds exactly; with the row, so that equal ones stay in order.
        places = corpus.n - 1 - start - torch.arange(len(rows), device=corpus.device)
        parts = []
        for q in range(0, len(bits), query_chunk):
            agreement = (on_device[q : q + query_chunk] @ rows.T).long()
            merged = torch.cat([keys[q : q + query_chunk], (agreement + n_bits) * corpus.n + places], 1)
            parts.append(merged.topk(min(k, merged.shape[1]))[0])
        keys = torch.cat(parts)
    key = keys.cpu().numpy()
    ids, scores = corpus.n - 1 - key % corpus.n, (key // corpus.n - n_bits) / n_bits
    if multiplier:
        search = _Search(queries, rescored or corpus, top_k, score, query_chunk, corpus_chunk)
        scores = search._exact(ids)
        order = np.lexsort((ids, -scores), axis=1)
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    k = min(top_k, corpus.n)
    return scores[:, :k], ids[:, :k]
