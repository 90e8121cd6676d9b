"""This module adds a bias to attention scores by the distance between key and query, in plain PyTorch.

The bias is a table, (N, 2R + 1). It holds, for each head, the number that is added to the score of a key -R to R
columns after the query. Keys at greater distances have the number of R or -R. So no kernel needs (S, S) numbers. Such a
table represents buckets (T5, MPNet) and slopes of heads (ALiBi), with R as large as the longest sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distances(table: Tensor, columns: Tensor) -> Tensor:
    """Returns places in the table's rows for every query and key: columns (..., S) -> (..., S, S) int64."""
    radius = table.shape[1] // 2
    apart = columns[..., None, :] - columns[..., :, None]  # key minus query
    return apart.clamp(-radius, radius).long() + radius


def expand(table: Tensor, columns: Tensor) -> Tensor:
    """Returns the bias of the scores: table (N, 2R + 1), columns (S,) or (B, S) -> (N, S, S) or (B, N, S, S)."""
    places = distances(table, columns)
    expanded = table.index_select(1, places.flatten()).unflatten(1, places.shape)  # (N, ..., S, S)
    return expanded if columns.dim() == 1 else expanded.transpose(0, 1)


def of_rows(table: Tensor, columns: Tensor | None, rows: Any, n_seqs: int, length: int) -> Tensor:
    """Returns the bias for sequences of equal length, (1 or n_seqs, N, length, length).

    columns: the columns of all tokens, or None if the tokens of a sequence are neighbours. rows: the sequences' rows.
    """
    if columns is None:
        return expand(table, torch.arange(length, device=table.device))[None]
    return expand(table, columns[rows].view(n_seqs, length))


def gradient(table: Tensor, d_scores: Tensor, columns: Tensor) -> Tensor:
    """Returns the gradient of the table, (N, 2R + 1) in d_scores' dtype, from the gradient of the scores.

    d_scores: (B, N, S, S). columns: (S,) or (B, S). The order of the sums does not depend on threads.
    """
    places = distances(table, columns)
    if places.dim() == 2:
        d_scores, places = d_scores.sum(0, keepdim=True), places[None]
    one_hot_sums = d_scores.new_zeros(table.shape)
    flat = d_scores.transpose(0, 1).flatten(1)  # (N, B * S * S)
    return one_hot_sums.index_add(1, places.flatten(), flat)


def for_kernel(table: Tensor | None, columns: Tensor | None) -> Any:
    """Returns the Triton kernels' argument for a bias, or None without one."""
    if table is None:
        return None
    from fastbert_kernels.attention_bias import PositionBias

    table = table.detach() if table.requires_grad else table
    return PositionBias(table if table.is_contiguous() else table.contiguous(), columns)


def check(table: Tensor, num_heads: int, head_input: Tensor) -> None:
    """Raises ValueError for a table of another shape, or on another device than the rows of attention."""
    if table.dim() != 2 or table.shape[0] != num_heads or table.shape[1] % 2 == 0:
        expected = f"(N, 2 R + 1) with N = {num_heads}"
        raise ValueError(f"position_bias: expected shape {expected}, got {tuple(table.shape)}")
    if table.device != head_input.device:
        raise ValueError(f"position_bias: expected a tensor on {head_input.device}, got {table.device}")
