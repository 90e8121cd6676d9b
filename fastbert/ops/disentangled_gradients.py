"""This module computes gradients of disentangled attention in plain PyTorch, for traced programs.

`distances` has the forward pass.

    dV = (P M)^T dO,    dP = M * (dO V^T),    dS = P * (dP - rowsum(P * dP)),    G = scale dS
    dQ = G K + A pk,    dK = G^T Q + B pq,    dpk = A^T Q,    dpq = B^T K

P are the probabilities. M holds the factors of dropout. A is the sum of the columns of G that have the same row of
distances, B the sum of such rows of G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert.ops.distances import Positions, bias, places_of
from fastbert.ops.groups import group_by_length
from fastbert_kernels.masks import Dropout


def gradients_by_lengths(
    grad: Tensor,
    qkv: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    cu_seqlens_cpu: Tensor,
    n_buckets: int,
    max_distance: int,
    num_heads: int,
    scale: float,
    columns: Tensor | None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, (T, 3 * N * D), of keys and of queries, (2R, N * D), or () in the place of None.

    grad: the gradient of the output, (T, N * D). The probabilities are computed again, in float32 at least. The result
    is differentiable.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    head_size = qkv.shape[1] // (3 * num_heads)
    tables = [
        None if t is None else t.to(dtype).unflatten(-1, (num_heads, -1)).transpose(0, 1) for t in (keys, queries)
    ]
    wide_keys, wide_queries = (None if t is None else t.to(dtype) for t in (keys, queries))
    positions = Positions(wide_keys, wide_queries, (n_buckets, max_distance))
    out = torch.zeros_like(qkv)  # rows that belong to no sequence have no gradient
    sums = [qkv.new_zeros((), dtype=dtype) if table is None else torch.zeros_like(table) for table in tables]
    for n_seqs, length, rows in group_by_length(cu_seqlens_cpu, qkv.device)[0]:
        q, k, v = qkv[rows].to(dtype).view(n_seqs, length, 3, num_heads, head_size).permute(2, 0, 3, 1, 4)
        d_out = grad[rows].to(dtype).view(n_seqs, length, num_heads, head_size).transpose(1, 2)
        own = torch.arange(length, device=qkv.device) if columns is None else columns[rows].view(n_seqs, length)
        p = torch.softmax(q @ k.transpose(-1, -2) * scale + bias(q, k, positions, own, scale), dim=-1)
        kept, d_p = p, d_out @ v.transpose(-1, -2)
        if dropout is not None:
            places = torch.arange(qkv.shape[0], device=qkv.device)[rows].view(n_seqs, length)
            factors = masks.keep(places, length, dropout, num_heads).to(dtype) * dropout.scale
            kept, d_p = p * factors, d_p * factors
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        d_q, d_k, d_v = d_s @ k, d_s.transpose(-1, -2) @ q, kept.transpose(-1, -2) @ d_out
        at = places_of(positions.buckets, own)
        if tables[0] is not None:
            added, total = _of_distances(d_s, at, q, tables[0])
            d_q, sums[0] = d_q + added, sums[0] + total
        if tables[1] is not None:
            added, total = _of_distances(d_s.transpose(-1, -2), at.transpose(-1, -2), k, tables[1])
            d_k, sums[1] = d_k + added, sums[1] + total
        d_qkv = torch.stack([d_q, d_k, d_v]).permute(1, 3, 0, 2, 4).reshape(n_seqs * length, -1)
        out[rows] = d_qkv.to(qkv.dtype)
    d_keys, d_queries = (
        total.to(qkv.dtype) if t is None else total.transpose(0, 1).flatten(1).to(t.dtype)
        for total, t in zip(sums, (keys, queries), strict=True)
    )
    return out, d_keys, d_queries


def _of_distances(d_s: Tensor, at: Tensor, part: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q or k, (B, N, S, D), and of the table that it is multiplied by, (N, 2R, D).

    d_s: (B, N, S, S); its rows are the rows of part. at: the row of the table for each number of d_s.
    """
    by_row = d_s.new_zeros(*d_s.shape[:-1], table.shape[1]).scatter_add(-1, at.expand(d_s.shape), d_s)
    return by_row @ table, (by_row.transpose(-1, -2) @ part).sum(0)
