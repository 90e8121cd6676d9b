"""Similarity compares two vectors by one of four functions."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checks import one_of

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def function_name(function: Any) -> Any:
    """Returns the name of a similarity function, which comes as a str or as a member of an enum."""
    return function.value if isinstance(function, Enum) else function


def similarity_matrix(a: Any, b: Any, name: str) -> Tensor:
    """Compares each vector with each: (n, dim) and (m, dim) -> (n, m).

    name: "cosine", "dot", or "euclidean" and "manhattan", which are distances with their sign changed.
    """
    one_of("similarity_fn_name", name, *SIMILARITIES)
    x, y = as_matrix(a), as_matrix(b)
    if name == "cosine":
        return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    if name == "dot":
        return x @ y.T
    return -torch.cdist(x, y, p=2.0 if name == "euclidean" else 1.0)


def pairwise_similarity(a: Any, b: Any, name: str) -> Tensor:
    """Compares each vector with its partner: (n, dim) and (n, dim) -> (n,)."""
    one_of("similarity_fn_name", name, *SIMILARITIES)
    x, y = as_matrix(a), as_matrix(b)
    if x.shape != y.shape:
        raise ValueError(f"embeddings2: expected shape {tuple(x.shape)}, as embeddings1, got {tuple(y.shape)}")
    if name == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if name in ("cosine", "dot"):
        return (x * y).sum(1)
    return -torch.linalg.vector_norm(x - y, ord=2.0 if name == "euclidean" else 1.0, dim=1)


def as_matrix(vectors: Any) -> Tensor:
    """Returns one vector or several, in any form, as (n, dim) in float32, or in float64 for a float64 input."""
    if isinstance(vectors, (list, tuple)) and vectors and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    matrix = torch.as_tensor(np.asarray(vectors) if isinstance(vectors, (list, tuple)) else vectors)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    return matrix[None] if matrix.dim() == 1 else matrix
