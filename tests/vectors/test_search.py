"""Semantic search gives the order of a float64 brute force, whatever the chunks, the dtype and the ties."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastbert
from fastbert.vectors import search
from fastbert.vectors.corpus import Corpus
from fastbert.vectors.quantize import quantize_embeddings
from fastbert.vectors.search import semantic_search

CHUNKS: tuple[dict[str, int], ...] = ({}, {"query_chunk_size": 3, "corpus_chunk_size": 7}, {"corpus_chunk_size": 1})


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def brute(queries: Any, corpus: Any, k: int, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids by float64, equal scores by id."""
    a, b = (np.asarray(x, np.float64) for x in (queries, corpus))
    scores = (a[:, None] * b[None]).sum(-1)
    if score == "cosine":
        norms = [np.sqrt((x * x).sum(-1)) for x in (a, b)]
        scores = scores / np.where(norms[0] == 0, 1, norms[0])[:, None] / np.where(norms[1] == 0, 1, norms[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def check(queries: Any, corpus: Any, k: int, score: str, numbers: Any = None, **options: Any) -> None:
    scores, ids = semantic_search(queries, corpus, top_k=k, score=score, as_arrays=True, **options)
    expected, order = brute(queries, corpus if numbers is None else numbers, k, score)
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    assert np.array_equal(ids, order)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("k", [1, 10, 60, 1000])
def test_order_of_a_brute_force(k: int, score: str, chunks: dict[str, int]) -> None:
    """Catches rows lost between chunks, ids that count from a chunk, and a top_k beyond the corpus."""
    check(random(8, 13), random(60, 13, seed=1) * 3, k, score, **chunks)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_equal_scores_stand_by_id(score: str, chunks: dict[str, int]) -> None:
    """Catches ties beyond what a first pass keeps that stand in another order than the corpus."""
    corpus = np.repeat(random(3, 9), 100, axis=0)[np.random.default_rng(0).permutation(300)]
    corpus[::17] = 0
    queries = np.concatenate([random(4, 9, seed=2), np.zeros((1, 9), np.float32), -corpus[:1]])
    for k in (1, 5, 150, 299):
        check(queries, corpus, k, score, **chunks)
    check(queries, np.zeros((50, 9), np.float32), 4, score, **chunks)


def test_near_ties_have_the_order_of_float64() -> None:
    """Catches an order by float32 scores where they are all but equal, and rows that they push out of the best."""
    base = random(1, 64)
    corpus = base + 1e-5 * random(500, 64, seed=1)
    for score in ("cosine", "dot"):
        check(np.concatenate([base, random(2, 64, seed=3)]), corpus, 10, score, corpus_chunk_size=37)


@given(st.data())
def test_small_whole_numbers(data: st.DataObject) -> None:
    """Catches any wrong place among many ties, for random sizes and chunks."""
    n, dim = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1000))
    numbers = np.random.default_rng(seed).integers(-1, 2, (n + 3, dim)).astype(np.float32)
    chunks = {"query_chunk_size": data.draw(st.integers(1, 4)), "corpus_chunk_size": data.draw(st.integers(1, 40))}
    check(numbers[:3], numbers[3:], data.draw(st.integers(1, 50)), "dot", **chunks)


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_a_coarser_first_pass_finds_the_same(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that a less exact product, as in TF32, puts behind the ones kept, and that stay lost."""
    right, looks = Corpus.chunk, []
    second = search._Search._second_pass
    monkeypatch.setattr(Corpus, "chunk", lambda self, *at: right(self, *at).bfloat16().float())
    monkeypatch.setattr(search, "_product_error", lambda dim, device: 2.0**-7)
    monkeypatch.setattr(search._Search, "_second_pass", lambda *args: (looks.append(1), second(*args)))
    corpus = random(1, 24) + 0.02 * random(3000, 24, seed=1)
    check(random(6, 24, seed=2), corpus, 10, score, corpus_chunk_size=700)
    assert looks


def test_the_second_look_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bound on float32's error so wide that every search goes through the matrix twice."""
    looks: list[int] = []
    monkeypatch.setattr(search._Search, "_second_pass", lambda self, unsure, *args: looks.extend(unsure))
    corpus = random(5000, 32, seed=1)
    for score in ("cosine", "dot"):
        check(random(50, 32), corpus, 10, score)
    assert not looks


def test_numbers_whose_squares_overflow() -> None:
    """Catches a row taken for infinite, and tiny or huge numbers whose cosine is lost."""
    corpus = random(60, 13, seed=1)
    check(random(3, 13), corpus * np.float32(1e25), 5, "cosine")
    check(random(3, 13) * np.float32(1e-25), corpus * np.float32(1e-25), 5, "cosine")


@pytest.mark.parametrize(
    "kind", ["memmap", "fortran", "big endian", "float64", "float16", "tensor", "float16 tensor", "bfloat16"]
)
def test_kinds_of_corpus(kind: str, tmp_path: Path) -> None:
    """Catches a kind of matrix that is not read, is read as a whole, or is compared in 16 bits."""
    corpus: Any = random(60, 13, seed=1)
    if kind == "memmap":
        np.save(tmp_path / "corpus.npy", corpus)
        corpus = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    elif kind == "fortran":
        corpus = np.asfortranarray(corpus)
    elif kind == "big endian":
        corpus = corpus.astype(">f4")
    elif kind in ("float16", "float64"):
        corpus = corpus.astype(kind)
    else:
        corpus = torch.from_numpy(corpus).to(getattr(torch, "float32" if kind == "tensor" else kind.split()[0]))
    numbers = corpus.double().numpy() if isinstance(corpus, torch.Tensor) else corpus
    check(random(8, 13), corpus, 10, "cosine", numbers, corpus_chunk_size=16)


def test_memory_is_bounded_by_the_chunks() -> None:
    """Catches a corpus that is converted as a whole before it is searched."""

    class Rows:
        """A matrix that says how many of its rows are asked for at once."""

        shape, dtype, largest = (1000, 8), np.dtype(np.float32), 0
        values = random(1000, 8, seed=1)

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, which: Any) -> np.ndarray:
            self.largest = max(self.largest, len(self.values[which]))
            return self.values[which]

    rows = Rows()
    scores, ids = semantic_search(random(2, 8), rows, top_k=3, corpus_chunk_size=100, as_arrays=True)
    assert np.array_equal(ids, brute(random(2, 8), rows.values, 3, "cosine")[1])
    assert rows.largest == 100


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("options", [{}, {"query_chunk_size": 2, "corpus_chunk_size": 7}], ids=str)
def test_results_of_sentence_transformers(score: str, options: dict[str, int]) -> None:
    """Catches another form of result than theirs, or another order or score."""
    from sentence_transformers import util

    queries, corpus = random(5, 13), random(60, 13, seed=1)
    function = {"cosine": util.cos_sim, "dot": util.dot_score}[score]
    expected = util.semantic_search(queries, corpus, top_k=7, score_function=function)
    ours = semantic_search(queries, torch.from_numpy(corpus), top_k=7, score=score, **options)
    assert [[hit["corpus_id"] for hit in hits] for hits in ours] == [
        [h["corpus_id"] for h in hits] for hits in expected
    ]
    for hits, theirs in zip(ours, expected, strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in theirs]
        assert [list(hit) for hit in hits] == [["corpus_id", "score"]] * 7
        assert all(type(hit["corpus_id"]) is int and type(hit["score"]) is float for hit in hits)
        np.testing.assert_allclose([h["score"] for h in hits], [h["score"] for h in theirs], rtol=1e-5, atol=1e-6)
    one = semantic_search(queries[0], corpus, top_k=7, score=score)
    assert len(one) == 1 and [h["corpus_id"] for h in one[0]] == [h["corpus_id"] for h in ours[0]]
    assert fastbert.semantic_search is semantic_search


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_quantised_corpus(precision: str, score: str) -> None:
    """Catches levels without their offset or range, and queries quantised as well that are compared otherwise."""
    floats, queries = random(300, 16, seed=1) + 0.7, random(6, 16)
    floats[:, 3] = 0.25
    ranges = np.stack([floats.min(0), floats.max(0)])
    corpus = quantize_embeddings(floats, precision, ranges)
    step = np.where(ranges[1] == ranges[0], 0, (ranges[1] - ranges[0]).astype(np.float64) / 255)
    numbers = (corpus.astype(np.float64) + (128 if precision == "int8" else 0)) * step + ranges[0] + step / 2
    assert np.abs(numbers - floats).max() <= 0.5001 * step.max()
    for rows in (corpus, torch.from_numpy(corpus)):
        check(queries, rows, 10, score, numbers, ranges=ranges, corpus_chunk_size=70)
    whole = quantize_embeddings(queries, precision, ranges)
    scores, ids = semantic_search(
        whole, corpus, top_k=5, score=score, corpus_precision=precision, ranges=ranges, as_arrays=True
    )
    lifted = (whole.astype(np.float64) + (128 if precision == "int8" else 0)) * step + ranges[0] + step / 2
    assert np.array_equal(ids, brute(lifted, numbers, 5, score)[1])
    check(whole, corpus, 5, "dot", corpus.astype(np.float64), corpus_precision=precision)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dim", [16, 13])
@pytest.mark.parametrize("options", [{}, {"query_chunk_size": 2, "corpus_chunk_size": 31}], ids=str)
def test_binary_corpus(precision: str, dim: int, options: dict[str, Any]) -> None:
    """Catches bits in another order, padding bits that count, ties of distances in disorder, and rescoring left out."""
    floats, queries = random(300, dim, seed=1), random(6, dim)
    corpus, signs = quantize_embeddings(floats, precision), np.where(floats > 0, 1.0, -1.0)
    distances = (np.where(queries > 0, 1, -1)[:, None] != signs[None]).sum(-1)
    order = np.argsort(distances, axis=1, kind="stable")
    arguments: dict[str, Any] = {"top_k": 8, "as_arrays": True, **options}
    scores, ids = semantic_search(queries, corpus, rescore=False, **arguments)
    assert np.array_equal(ids, order[:, :8])
    np.testing.assert_allclose(scores, 1 - 2 * np.take_along_axis(distances, order[:, :8], 1) / dim, rtol=1e-6)
    packed = quantize_embeddings(queries, precision)
    _, same = semantic_search(packed, torch.from_numpy(corpus), corpus_precision=precision, **arguments)
    assert np.array_equal(same, order[:, :8])
    for rows, more in ((signs, {}), (floats, {"rescore_embeddings": floats})):
        scores, ids = semantic_search(queries, corpus, rescore_multiplier=3, **arguments, **more)
        for q in range(len(queries)):
            candidates = np.sort(order[q, :24])
            expected, places = brute(queries[q : q + 1], rows[candidates], 8, "cosine")
            assert np.array_equal(ids[q], candidates[places[0]])
            np.testing.assert_allclose(scores[q], expected[0], rtol=1e-6, atol=1e-7)


def test_binary_finds_what_floats_find() -> None:
    """Catches candidates that have nothing to do with the neighbours, which agreement with itself would not show."""
    floats = random(500, 64, seed=1)
    queries = floats[:20] + 0.3 * random(20, 64, seed=2)
    ranked = semantic_search(queries, quantize_embeddings(floats, "ubinary"), top_k=1, rescore_embeddings=floats)
    assert [hits[0]["corpus_id"] for hits in ranked] == list(range(20))


@pytest.mark.parametrize("corpus", [[], np.zeros((0, 4), np.float32), torch.zeros(0, 4), np.zeros((0, 4), np.int8)])
def test_nothing_to_find(corpus: Any) -> None:
    """Catches a crash over an empty corpus or no queries."""
    assert semantic_search(random(3, 4), corpus) == [[], [], []]
    scores, ids = semantic_search(random(3, 4), corpus, as_arrays=True)
    assert scores.shape == ids.shape == (3, 0)
    assert semantic_search([], random(3, 4)) == [] == semantic_search(np.zeros((0, 4), np.float32), random(3, 4))


def bad() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    corpus, q = random(30, 4), random(2, 4)
    broken = corpus.copy()
    broken[25, 1], broken[27, 1] = np.nan, np.inf
    yield {"corpus_embeddings": broken}, ValueError, "corpus_embeddings: row 25 is not finite"
    yield {"query_embeddings": broken}, ValueError, "query_embeddings: row 25 is not finite"
    yield {"query_embeddings": random(2, 5)}, ValueError, "query_embeddings: got 5 columns for a corpus of 4 columns"
    yield {"query_embeddings": random(2, 2, 4)}, ValueError, r"query_embeddings: expected shape \(Q, dim\)"
    yield {"corpus_embeddings": corpus[0]}, ValueError, r"corpus_embeddings: expected shape \(N, dim\)"
    yield {"corpus_embeddings": corpus.astype(np.int32)}, TypeError, "corpus_embeddings: got int32"
    yield {"corpus_embeddings": corpus.astype(np.int8)}, ValueError, "ranges: needed for float queries"
    yield {"corpus_embeddings": corpus, "ranges": corpus[:2]}, ValueError, "ranges: not for a corpus of .* 'float32'"
    yield {"corpus_precision": "ubinary"}, TypeError, "got float32 for precision 'ubinary', expected uint8"
    yield {"query_embeddings": q.astype(np.int8)}, TypeError, "query_embeddings: got int8 for a corpus of precision"
    one = np.zeros((30, 1), np.uint8)
    yield {"corpus_embeddings": one, "query_embeddings": q[:, :1]}, ValueError, "corpus_precision: needed where"
    yield {"corpus_embeddings": one, "query_embeddings": random(2, 9)}, ValueError, "a corpus of 1 bytes of signs"
    yield {"corpus_embeddings": one, "rescore_embeddings": corpus[:5]}, ValueError, "rescore_embeddings: got 5 rows"
    yield {"corpus_embeddings": corpus * 1e38, "score": "dot", "query_embeddings": q * 1e20}, ValueError, "overflow"
    yield {"score": "euclidean"}, ValueError, "score: got 'euclidean'"
    for name in ("top_k", "query_chunk_size", "corpus_chunk_size", "rescore_multiplier"):
        yield {name: 0}, ValueError, f"{name}: got 0, expected a positive whole number"


@pytest.mark.parametrize(("arguments", "kind", "message"), list(bad()), ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Catches NaN that is ranked in silence, and errors from inside that do not name the argument."""
    with pytest.raises(kind, match=message):
        semantic_search(**{"query_embeddings": random(2, 4), "corpus_embeddings": random(30, 4), **arguments})


def test_signature_has_the_names_of_sentence_transformers() -> None:
    """Catches an argument of util.semantic_search that cannot be passed by its name."""
    from sentence_transformers import util

    ours = inspect.signature(semantic_search).parameters
    assert set(inspect.signature(util.semantic_search).parameters) - {"score_function"} <= set(ours)
