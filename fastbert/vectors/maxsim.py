"""MaxSim compares texts that have a vector for each token (Khattab and Zaharia, "ColBERT", 2020).

score(query, document) = sum over i of max over j of q_i . d_j
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.checks import positive
from fastbert.ops import packing

TOKEN_SIMILARITIES = ("maxsim", "meanmaxsim")  # their names in sentence-transformers
# Products of tokens, and numbers of the vectors that they are made of, in memory at once.
CHUNK_ELEMENTS = 100_000_000
# The score of a document without a token, as in sentence-transformers: below that of every other one.
EMPTY_DOCUMENT = -1e9


def maxsim(
    queries: Any, documents: Any, *, length_normalize: bool = False, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Scores each query with each document: n and m of them -> (n, m), in float32, or float64 where that comes.

    queries, documents: lists of (tokens, dim) tensors or arrays, or one (n, tokens, dim), or one (tokens, dim). They
    are not padded: the tokens of a block of documents are packed. The scores are on the documents' device.
    length_normalize: divides each score by the number of the query's tokens ("meanmaxsim"). chunk_elements: the
    greatest number of products in memory, but at least those of one query and one document.

    A document without tokens scores -1e9 before any division. Raises ValueError for vectors of different lengths.
    """
    firsts, seconds = _as_list("queries", queries), _as_list("documents", documents)
    positive("chunk_elements", chunk_elements)
    device = seconds[0].device if seconds else firsts[0].device if firsts else torch.device("cpu")
    dtype = _dtype(firsts, seconds)
    scores = torch.zeros(len(firsts), len(seconds), dtype=dtype, device=device)
    if not firsts or not seconds:
        return scores
    dim = _check_dimension(firsts, seconds)
    longest = max(max(map(len, firsts)), 1)
    for start, end in _runs([len(d) for d in seconds], max(chunk_elements // (longest + dim), 1)):
        block = torch.cat([document.to(device, dtype) for document in seconds[start:end]])  # (tokens, dim)
        lengths = [len(document) for document in seconds[start:end]]
        offsets = packing.from_lengths(lengths, device).cu_seqlens.long()
        budget = max((chunk_elements - block.numel()) // max(len(block) + dim, 1), 1)
        for first, last in _runs([len(q) for q in firsts], budget):
            tokens = torch.cat([query.to(device, dtype) for query in firsts[first:last]])
            best = _best(tokens @ block.T, offsets)  # (query tokens, documents)
            parts = best.split([len(query) for query in firsts[first:last]])
            scores[first:last, start:end] = torch.stack([part.sum(0) for part in parts])
    return _finished(scores, firsts, torch.tensor([[len(d) == 0 for d in seconds]], device=device), length_normalize)


def maxsim_pairwise(queries: Any, documents: Any, *, length_normalize: bool = False) -> Tensor:
    """Scores each query with its own document: n and n of them -> (n,). Arguments and errors are those of `maxsim`."""
    firsts, seconds = _as_list("queries", queries), _as_list("documents", documents)
    if len(firsts) != len(seconds):
        raise ValueError(f"documents: got {len(seconds)} for {len(firsts)} queries, expected as many")
    if not firsts:
        return torch.zeros(0)
    _check_dimension(firsts, seconds)
    dtype, device = _dtype(firsts, seconds), seconds[0].device
    scores = [
        (query.to(device, dtype) @ document.to(device, dtype).T).amax(1).sum()
        if len(document)
        else torch.zeros((), dtype=dtype, device=device)
        for query, document in zip(firsts, seconds, strict=True)
    ]
    empty = torch.tensor([[len(document) == 0] for document in seconds], device=device)
    return _finished(torch.stack(scores)[:, None], firsts, empty, length_normalize)[:, 0]


def _best(products: Tensor, offsets: Tensor) -> Tensor:
    """Returns the highest product of each query token in each document, (query tokens, documents)."""
    return torch.segment_reduce(products.T.contiguous(), "max", offsets=offsets, axis=0, unsafe=True).T


def _finished(scores: Tensor, queries: Sequence[Tensor], empty: Tensor, length_normalize: bool) -> Tensor:
    scores = scores.masked_fill(empty, EMPTY_DOCUMENT)
    if length_normalize:
        lengths = torch.tensor([max(len(query), 1) for query in queries], device=scores.device, dtype=scores.dtype)
        scores = scores / lengths[:, None]
    return scores


def _runs(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of runs of items with at most that many tokens, or of one item."""
    first = size = 0
    for i, n in enumerate(lengths):
        if i > first and size + n > budget:
            yield first, i
            first, size = i, 0
        size += n
    yield first, len(lengths)


def _as_list(name: str, vectors: Any) -> list[Tensor]:
    items = [vectors] if getattr(vectors, "ndim", 3) == 2 else list(vectors)
    tensors = [torch.as_tensor(item) for item in items]
    for i, tensor in enumerate(tensors):
        if tensor.ndim != 2:
            raise ValueError(f"{name}[{i}]: got {tensor.ndim} dimensions, expected (tokens, dim)")
    return tensors


def _check_dimension(queries: Sequence[Tensor], documents: Sequence[Tensor]) -> int:
    sizes = {tensor.shape[1] for tensor in (*queries, *documents)}
    if len(sizes) > 1:
        raise ValueError(f"documents: got vectors of {sorted(sizes)} numbers, expected one length")
    return sizes.pop()


def _dtype(*sides: Sequence[Tensor]) -> torch.dtype:
    """Returns float32, or float64 if some vectors have it; scores in float16 would be equal too often."""
    return torch.float64 if any(t.dtype == torch.float64 for side in sides for t in side) else torch.float32
