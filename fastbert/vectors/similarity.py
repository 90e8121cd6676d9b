"""How alike two vectors are, by one of four functions."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checks import one_of

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def function_name(given: Any) -> Any:
    """The name of a similarity function: a str as it came, and what a member of an enum stands for."""
    return given.value if isinstance(given, Enum) else given


def similarity_matrix(a: Any, b: Any, name: str) -> Tensor:
    """(n, dim) and (m, dim) -> (n, m). name: "cosine", "dot", or a distance with its sign changed."""
    one_of("similarity_fn_name", name, *SIMILARITIES)
    x, y = as_matrix(a), as_matrix(b)
    if name == "cosine":
        return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    if name == "dot":
        return x @ y.T
    return -torch.cdist(x, y, p=2.0 if name == "euclidean" else 1.0)


def pairwise_similarity(a: Any, b: Any, name: str) -> Tensor:
    """(n, dim) and (n, dim) -> (n,): each with its fellow."""
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
    """A vector, or several as an array, a tensor or a list, -> (n, dim) float32, or float64 where that came."""
    if isinstance(vectors, (list, tuple)) and vectors and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    matrix = torch.as_tensor(np.asarray(vectors) if isinstance(vectors, (list, tuple)) else vectors)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    return matrix[None] if matrix.dim() == 1 else matrix
