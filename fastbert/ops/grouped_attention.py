"""This module holds attention and its gradients in plain PyTorch, for groups of equal length and for padded batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.ops import tracing
from fastbert.ops.groups import Group, group_by_length
from fastbert.ops.packing import PackedBatch
from fastbert.ops.position_bias import expand, gradient, of_rows
from fastbert.ops.window import near


def attend_in_groups(
    qkv: torch.Tensor,
    groups: list[Group],
    ungroup: torch.Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes attention, (T, 3 * N * D) -> (T, N * D). groups, ungroup: the results of `group_by_length`."""
    hidden_size = qkv.shape[1] // 3
    if not groups:
        return qkv[:, :hidden_size].clone()
    outs = []
    for n_seqs, length, rows in groups:
        part = qkv[rows] if isinstance(rows, slice) else qkv.index_select(0, rows)
        part = part.view(n_seqs, length, 3, num_heads, hidden_size // num_heads)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (sequences, N, length, D)
        bias = None if table is None else of_rows(table, columns, rows, n_seqs, length)
        out = _attend(q, k, v, None, scale, dropout_p, bias)
        outs.append(out.transpose(1, 2).reshape(n_seqs * length, hidden_size))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = out if ungroup is None else out.index_select(0, ungroup)
    # The last rows belong to no sequence and are zeros.
    return out if out.shape[0] == qkv.shape[0] else F.pad(out, (0, 0, 0, qkv.shape[0] - out.shape[0]))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax(scale * q k^T + bias) v over valid keys. q, k, v: (B, N, S, D). valid: (B, 1, 1, S) bool."""
    if not tracing.differentiated():
        mask = valid
        if bias is not None:
            bias = bias.to(q.dtype)
            mask = bias if valid is None else bias.masked_fill(~valid, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ v


def attend_in_place(
    qkv: torch.Tensor,
    batch: PackedBatch,
    num_heads: int,
    scale: float | None,
    dropout_p: float,
    table: torch.Tensor | None,
    window: int | None = None,
) -> torch.Tensor:
    """Computes attention of a `packing.in_place` batch, with masked padding: (B * S, 3 * N * D) -> (B * S, N * D)."""
    assert batch.valid is not None
    qkv = qkv.reshape(batch.batch_size, batch.padded_length, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, N, S, D)
    # A row without tokens attends to all of its padding. Its result is finite, and is cleared later.
    valid = batch.valid | ~batch.valid.any(1, keepdim=True)
    bias, seen, columns = None, valid[:, None, None, :], torch.arange(batch.padded_length, device=qkv.device)
    if table is not None:
        bias = expand(table, columns)[None]
    if window is None:
        out = _attend(q, k, v, seen, scale, dropout_p, bias)
    else:  # A query at padding without a key in its window attends to itself; its result is 0, as in transformers.
        seen = seen & near(columns, columns, window)
        reached = seen.any(-1, keepdim=True)
        out = _attend(q, k, v, seen | near(columns, columns, 0) & ~reached, scale, dropout_p, bias)
        out = torch.where(reached, out, 0.0)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attend_by_lengths(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes attention of sequences with these offsets. table, columns: as in `ops.varlen_attention`."""
    groups = group_by_length(cu_seqlens_cpu, qkv.device)
    return attend_in_groups(qkv, *groups, num_heads, scale, table=table, columns=columns)


def gradients_by_lengths(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of qkv, (T, 3 * N * D), and of the table, (N, 2R + 1), or of shape () without one.

    The probabilities P are computed again, in float32 at least.

    dV = P^T dO,    dS = P * (dO V^T - rowsum(P * dO V^T)),    dQ = scale dS K,    dK = scale dS^T Q
    """
    head_size = qkv.shape[1] // (3 * num_heads)
    compute_dtype = torch.promote_types(qkv.dtype, torch.float32)
    out = torch.zeros_like(qkv)  # rows that belong to no sequence have no gradient
    d_table = qkv.new_zeros(() if table is None else table.shape, dtype=compute_dtype)
    for n_seqs, length, rows in group_by_length(cu_seqlens_cpu, qkv.device)[0]:
        part = qkv[rows].to(compute_dtype).view(n_seqs, length, 3, num_heads, head_size)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (sequences, N, length, D)
        d_out = grad[rows].to(compute_dtype).view(n_seqs, length, num_heads, head_size).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) * scale
        if table is not None:
            scores = scores + of_rows(table.to(compute_dtype), columns, rows, n_seqs, length)
        p = torch.softmax(scores, dim=-1)
        d_p = d_out @ v.transpose(-1, -2)
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True))
        if table is not None:
            places = torch.arange(length, device=qkv.device) if columns is None else columns[rows].view(n_seqs, length)
            d_table = d_table + gradient(table, d_s, places)
        d_s = d_s * scale
        d_qkv = torch.stack([d_s @ k, d_s.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out])
        out[rows] = d_qkv.permute(1, 3, 0, 2, 4).reshape(n_seqs * length, -1).to(qkv.dtype)
    return out, d_table if table is None else d_table.to(table.dtype)
