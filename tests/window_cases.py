"""The tests of attention within a window share what judges it, and columns with holes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops.dropout import keep
from fastbert_kernels.masks import Dropout


def within(
    qkv: Tensor,
    lengths: list[int],
    num_heads: int,
    window: int,
    columns: Tensor | None = None,
    dropout: Dropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each text alone, with an (S, S) mask. A key's column of dropout is its place in the text."""
    outs, first_row = [], 0
    columns = torch.cat([torch.arange(n, device=qkv.device) for n in lengths]) if columns is None else columns
    for part, places in zip(qkv.split(lengths), columns.split(lengths), strict=True):
        q, k, v = part.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        far = (places[:, None] - places[None]).abs() > window
        weights = torch.softmax(scores.masked_fill(far, -torch.inf), -1)
        if dropout is not None:
            rows = torch.arange(first_row, first_row + len(part), device=qkv.device)
            kept = keep(rows[None], len(part), dropout, num_heads)[0]
            weights = weights * (kept.to(weights.dtype) * dropout.scale)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
        first_row += len(part)
    return torch.cat(outs)


def gradients_within(qkv: Tensor, grad: Tensor, *arguments: object, **named: object) -> tuple[Tensor, Tensor]:
    """What `within` gives, and the gradient of qkv by autograd."""
    leaf = qkv.detach().clone().requires_grad_()
    out = within(leaf, *arguments, **named)  # type: ignore[arg-type]
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def holes(lengths: list[int]) -> Tensor:
    """(T,) int32 columns that ascend in each text, some of them left out."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([torch.randint(1, 4, (n,), generator=generator).cumsum(0) for n in lengths]).int()
