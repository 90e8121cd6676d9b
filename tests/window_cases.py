"""The tests of attention within a window share what judges it, and columns with holes."""

from __future__ import annotations

import torch
from torch import Tensor


def within(qkv: Tensor, lengths: list[int], num_heads: int, window: int, columns: Tensor | None = None) -> Tensor:
    """Attention of each text alone, with an (S, S) mask."""
    outs = []
    columns = torch.cat([torch.arange(n) for n in lengths]) if columns is None else columns
    for part, places in zip(qkv.split(lengths), columns.split(lengths), strict=True):
        q, k, v = part.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        far = (places[:, None] - places[None]).abs() > window
        weights = torch.softmax(scores.masked_fill(far, -torch.inf), -1)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def holes(lengths: list[int]) -> Tensor:
    """(T,) int32 columns that ascend in each text, some of them left out."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([torch.randint(1, 4, (n,), generator=generator).cumsum(0) for n in lengths]).int()
