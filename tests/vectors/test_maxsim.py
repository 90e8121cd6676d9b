"""MaxSim scores are those of the formula and of sentence-transformers, in blocks of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util.similarity import maxsim as theirs
from sentence_transformers.util.similarity import maxsim_pairwise as theirs_pairwise

from fastbert import maxsim
from fastbert.vectors.maxsim import EMPTY_DOCUMENT, maxsim_pairwise


def ragged(lengths: list[int], seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=generator).to(dtype) for n in lengths]


QUERIES, DOCUMENTS = [3, 1, 7], [4, 9, 0, 1, 2, 6]


@pytest.mark.parametrize("chunk_elements", [1, 40, 100, 10**8])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_blocks(chunk_elements: int, length_normalize: bool) -> None:
    """Catches a document that is lost, or scored by its neighbour's tokens, at the edge of a block."""
    queries, documents = ragged(QUERIES, 0), ragged(DOCUMENTS, 1)
    got = maxsim(queries, documents, length_normalize=length_normalize, chunk_elements=chunk_elements)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            expected = sum(max(float(q @ d) for d in document) for q in query) if len(document) else EMPTY_DOCUMENT
            expected /= len(query) if length_normalize else 1
            assert float(got[i, j]) == pytest.approx(expected, rel=1e-5)
    expected = theirs(queries, documents, length_normalize=length_normalize)
    torch.testing.assert_close(got, expected)
    pairs = maxsim_pairwise(queries, documents[:3], length_normalize=length_normalize)
    torch.testing.assert_close(pairs, theirs_pairwise(queries, documents[:3], length_normalize=length_normalize))
    torch.testing.assert_close(pairs, got[:, :3].diagonal())


def test_forms() -> None:
    """Catches an array, one text alone, a padded batch or a half that is refused or scored in half precision."""
    queries, documents = ragged([4, 4], 0), ragged([6, 6, 6], 1)
    expected = maxsim(queries, documents)
    cases: list[tuple[Any, Any]] = [
        (torch.stack(queries), torch.stack(documents)),
        ([query.numpy() for query in queries], np.stack([document.numpy() for document in documents])),
    ]
    for firsts, seconds in cases:
        torch.testing.assert_close(maxsim(firsts, seconds), expected)
    torch.testing.assert_close(maxsim(queries[0], documents), expected[:1])
    halves = maxsim(ragged([4, 4], 0, torch.bfloat16), ragged([6, 6, 6], 1, torch.bfloat16))
    assert halves.dtype == torch.float32 and (halves - expected).abs().max() < 0.2
    assert maxsim(ragged([2], 0, torch.float64), documents).dtype == torch.float64
    assert maxsim([], documents).shape == (0, 3) and maxsim(queries, []).shape == (2, 0)
    with pytest.raises(ValueError, match=r"documents: got vectors of \[5, 6\] numbers"):
        maxsim(queries, [torch.zeros(2, 6)])
    with pytest.raises(ValueError, match=r"queries\[0\]: got 1 dimensions"):
        maxsim([torch.zeros(5)], documents)
