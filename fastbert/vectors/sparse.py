"""Sparse vectors over a vocabulary are rows of a sparse tensor of PyTorch in COO layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.checks import positive, positive_or_none


def largest(places: Tensor, numbers: Tensor, n: int | None) -> tuple[Tensor, Tensor]:
    """Returns the n largest numbers of a sparse vector and their ascending indices; None means all."""
    if n is None or len(numbers) <= n:
        return places, numbers
    kept = numbers.topk(n).indices.sort().values
    return places[kept], numbers[kept]


def as_rows(items: Sequence[tuple[Tensor, Tensor]], dimension: int, device: torch.device) -> Tensor:
    """Returns sparse vectors as a coalesced COO tensor (n, dimension).

    items: ascending indices and numbers, (k,) each. device: the device of the result.
    """
    counts = torch.tensor([len(places) for places, _ in items], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(items)), counts).to(device)
    none = torch.empty(0, device=device)
    columns = torch.cat([none.long(), *(places.to(device) for places, _ in items)])
    numbers = torch.cat([numbers.to(device) for _, numbers in items]) if items else none
    indices = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(indices, numbers, (len(items), dimension), is_coalesced=True, check_invariants=False)


def sparsity(embeddings: Tensor) -> dict[str, float]:
    """Returns active_dims, the mean count of nonzero numbers, and sparsity_ratio, the mean share of zeros.

    embeddings: (n, dim) or (dim,), sparse or dense. Raises TypeError and ValueError for anything else.
    """
    rows = _rows(embeddings)
    n_rows, dimension = rows.shape
    if not n_rows or not dimension:
        return {"active_dims": 0.0, "sparsity_ratio": 1.0}
    active = rows.values().numel() / n_rows
    return {"active_dims": active, "sparsity_ratio": 1.0 - active / dimension}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the products of each row with each: (n, dim) and (m, dim), sparse -> (n, m), dense.

    The matrix with fewer rows is made dense for this.
    """
    if a.shape[0] < b.shape[0]:
        return torch.sparse.mm(b, a.to_dense().T).T
    return torch.sparse.mm(a, b.to_dense().T)


def intersection(embeddings_1: Tensor, embeddings_2: Tensor) -> Tensor:
    """Returns the positive products of a vector (dim,) with a vector (dim,) or with each of (n, dim).

    The result is sparse, in the shape of the second. Raises ValueError for other shapes.
    """
    if embeddings_1.ndim != 1 or embeddings_1.shape[-1] != embeddings_2.shape[-1]:
        shapes = f"{tuple(embeddings_1.shape)} and {tuple(embeddings_2.shape)}"
        raise ValueError(f"embeddings_1, embeddings_2: got shapes {shapes}, expected (dim,) and (dim,) or (n, dim)")
    rows = _rows(embeddings_2)
    products = rows.values() * embeddings_1.to_dense()[rows.indices()[1]]
    kept = products > 0
    indices = rows.indices() if embeddings_2.ndim == 2 else rows.indices()[1:]
    return torch.sparse_coo_tensor(
        indices[:, kept], products[kept], embeddings_2.shape, is_coalesced=True, check_invariants=False
    )


def decode(embeddings: Tensor, names: Callable[[list[int]], list[str]], top_k: int | None = None) -> Any:
    """Returns (token, weight) of a vector's numbers, the highest first; a list of these lists for (n, dim).

    names: the tokens of ids. top_k: the number of tokens, None for all.
    """
    positive_or_none("top_k", top_k)
    rows = _rows(embeddings)
    counts = torch.bincount(rows.indices()[0], minlength=rows.shape[0]).tolist()
    result = []
    for places, numbers in zip(rows.indices()[1].split(counts), rows.values().split(counts), strict=True):
        order = numbers.argsort(descending=True, stable=True)[:top_k]
        result.append(list(zip(names(places[order].tolist()), numbers[order].tolist(), strict=True)))
    return result[0] if embeddings.ndim == 1 else result


def check_active(max_active_dims: int | None) -> int | None:
    """Returns the greatest count of numbers in a vector. Raises ValueError if it is not positive."""
    return None if max_active_dims is None else positive("max_active_dims", max_active_dims)


def _rows(embeddings: Tensor) -> Tensor:
    """Returns one vector or several as a coalesced COO tensor (n, dim)."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings: got {type(embeddings).__name__}, expected a tensor")
    if embeddings.ndim not in (1, 2):
        raise ValueError(f"embeddings: got {embeddings.ndim} dimensions, expected 1 or 2")
    sparse = embeddings if embeddings.layout == torch.sparse_coo else embeddings.to_sparse()
    return (sparse if sparse.ndim == 2 else sparse.unsqueeze(0)).coalesce()
