"""Tests of pooling share lengths and the plain PyTorch that they compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LENGTHS = [3, 0, 1, 70, 0, 17, 2]


def eager_pool(hidden: Tensor, lengths: Sequence[int], mode: str, normalize: bool) -> Tensor:
    """Plain PyTorch in the input's dtype, a sequence at a time, as sentence-transformers computes it."""
    rows = []
    for x in hidden.split(list(lengths)):
        n = x.shape[0]
        if n == 0:
            rows.append(hidden.new_zeros(hidden.shape[1]))
            continue
        weights = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)[:, None]
        rows.append(
            {
                "cls": lambda x=x: x[0],
                "last": lambda x=x: x[-1],
                "mean": lambda x=x: x.sum(0) / x.shape[0],
                "mean_sqrt_len": lambda x=x: x.sum(0) / x.shape[0] ** 0.5,
                "weighted_mean": lambda x=x, w=weights: (x * w).sum(0) / w.sum(),
                "max": lambda x=x: x.max(0).values,
            }[mode]()
        )
    pooled = torch.stack(rows)
    if normalize:  # 1e-12 is 0 in fp16, so rows of zeros would become NaN
        norm = pooled.norm(dim=-1, keepdim=True)
        pooled = torch.where(norm > 0, pooled / norm, 0)
    return pooled
