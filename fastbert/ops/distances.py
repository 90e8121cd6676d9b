"""This module holds the tables of distances of disentangled attention, and this attention in differentiable PyTorch.

`fastbert.ops.disentangled` has the formula and chooses the kernels.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert.ops import tracing
from fastbert.ops.attention_plan import LONGEST_IS_BOUND, tiles_of
from fastbert.ops.dropout import Drop
from fastbert.ops.groups import group_by_length
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import Dropout

# Up to this number of tokens a CUDA graph multiplies all rows of distances that its longest sequence may need. To find
# the needed rows on the device takes longer.
FEW_TOKENS = 128


class Positions(NamedTuple):
    """Holds the vectors for distances in one layer.

    keys: (2R, N * D), multiplied by queries (content to position), or None. queries: (2R, N * D), multiplied by keys
    (position to content), or None. buckets: the arguments of `rows_of_distances`.
    """

    keys: Tensor | None
    queries: Tensor | None
    buckets: tuple[int, int]


@functools.cache
def rows_of_distances(n_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Returns the row, 0 to 2R - 1, of each distance from -M to M. Greater distances have the row of M or -M.

    n_buckets: R, the number of buckets on either side. Buckets 0 to R / 2 hold one distance each; the others grow with
    the logarithm of the distance up to max_distance. With n_buckets -1 each distance below max_distance has its own
    bucket, and R is max_distance. The logarithm is computed in float32 as in the published code, because it decides the
    bucket at an edge.
    """
    if n_buckets <= 0:
        return (*range(2 * max_distance), 2 * max_distance - 1)
    middle, radius = n_buckets // 2, 2 * max_distance
    while True:
        size = torch.arange(radius + 1, dtype=torch.float32, device="cpu")
        scale = torch.log(torch.tensor((max_distance - 1) / middle, device="cpu"))
        far = torch.ceil(torch.log(size.clamp(min=1) / middle) / scale * (middle - 1)) + middle
        bucket = torch.where(size <= middle, size, far).long()
        both = torch.cat([-bucket[1:].flip(0), bucket])
        rows = (both + n_buckets).clamp(0, 2 * n_buckets - 1).tolist()
        if rows[0] == 0 and rows[-1] == 2 * n_buckets - 1:
            # The table ends, on either side, at the distance from which on the row does not change.
            reach = max(rows[radius:].index(rows[-1]), rows[radius::-1].index(rows[0]))
            return tuple(rows[radius - reach : radius + reach + 1])
        radius *= 2


@functools.cache
def runs_of_distances(n_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Returns how many distances before each one have the same row. Within a row these numbers differ."""
    groups = itertools.groupby(rows_of_distances(n_buckets, max_distance))
    return tuple(i for _, group in groups for i, _ in enumerate(group))


_kept_on: dict[Any, Tensor] = {}


def rows_on(buckets: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns `rows_of_distances` on a device, (2M + 1,)."""
    return _on(rows_of_distances, buckets, device, dtype)


def runs_on(buckets: tuple[int, int], device: torch.device) -> Tensor:
    """Returns `runs_of_distances` on a device, (2M + 1,) int32."""
    return _on(runs_of_distances, buckets, device, torch.int32)


def _on(numbers: Any, buckets: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    key = numbers, buckets, device, dtype
    kept = _kept_on.get(key)
    if kept is not None:
        return kept
    values = numbers(*buckets)
    if torch.compiler.is_compiling() or tracing.observed() is not None or device.type == "meta":
        return torch.tensor(values, device=device, dtype=dtype)
    with torch.inference_mode(False):  # autograd cannot keep inference tensors
        _kept_on[key] = tensor = torch.tensor(values, device=device, dtype=dtype)
    return tensor


def bias(q: Tensor, k: Tensor, positions: Positions, columns: Tensor, scale: float) -> Tensor:
    """Returns the sum of the two scaled terms of distances, (B, N, S, S), in the dtype of q. q, k: (B, N, S, D).

    columns: the columns of the tokens, (S,) or (B, S).
    """
    rows, n_heads = places_of(positions.buckets, columns), q.shape[1]
    shape = q.shape[0], n_heads, q.shape[2], q.shape[2]
    total: Any = 0
    for part, other, places in ((q, positions.keys, rows), (k, positions.queries, rows.transpose(-1, -2))):
        if other is not None:
            by_row = part @ other.unflatten(-1, (n_heads, -1)).permute(1, 2, 0)  # (B, N, S, 2R)
            term = by_row.gather(-1, places.expand(shape))
            term = term.to(torch.promote_types(term.dtype, torch.float32))
            total = total + (term if part is q else term.transpose(-1, -2))
    return (total * scale).to(q.dtype)


def places_of(buckets: tuple[int, int], columns: Tensor) -> Tensor:
    """Returns the row of distances of each pair of tokens, (1 or B, 1, S, S). columns: (S,) or (B, S)."""
    table = rows_on(buckets, columns.device)
    radius = table.shape[0] // 2
    apart = (columns[..., :, None] - columns[..., None, :]).long().clamp(-radius, radius) + radius
    rows = table.index_select(0, apart.flatten()).view(apart.shape)  # (S, S) or (B, S, S)
    return rows[None, None] if columns.dim() == 1 else rows[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Positions,
    columns: Tensor,
    valid: Tensor | None,
    scale: float,
    dropout: Tensor | float,
) -> Tensor:
    """Computes attention for sequences of equal length, (B, N, S, D) each.

    valid: (B, 1, 1, S) bool, the keys that are tokens. dropout: the factors of the probabilities, (B, N, S, S), or the
    probability of PyTorch's dropout.
    """
    added = bias(q, k, positions, columns, scale)
    differentiated = tracing.differentiated() or (torch.is_grad_enabled() and added.requires_grad)
    if differentiated or isinstance(dropout, Tensor):
        scores = q @ k.transpose(-1, -2) * scale + added
        if valid is not None:
            scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
        p = torch.softmax(scores, dim=-1)
        return (p * dropout if isinstance(dropout, Tensor) else F.dropout(p, dropout)) @ v
    if valid is not None:
        added = added.masked_fill(~valid, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, added, dropout_p=dropout, scale=scale)


def attend_in_place(
    qkv: Tensor, batch: PackedBatch, num_heads: int, positions: Positions, scale: float, dropout_p: float
) -> Tensor:
    """Computes attention of a `packing.in_place` batch, with masked padding: (B * S, 3 * N * D) -> (B * S, N * D)."""
    assert batch.valid is not None
    qkv = qkv.reshape(batch.batch_size, batch.padded_length, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    valid = batch.valid | ~batch.valid.any(1, keepdim=True)  # the result of a row without tokens is cleared later
    columns = torch.arange(batch.padded_length, device=qkv.device)
    out = attend(q, k, v, positions, columns, valid[:, None, None, :], scale, dropout_p)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attend_by_lengths(
    qkv: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    cu_seqlens_cpu: Tensor,
    n_buckets: int,
    max_distance: int,
    num_heads: int,
    scale: float,
    columns: Tensor | None,
    dropout: Drop = None,
) -> Tensor:
    """Computes attention of packed rows, (T, 3 * N * D) -> (T, N * D). columns: (T,), None if tokens are neighbours."""
    hidden_size, outs = qkv.shape[1] // 3, []
    groups, ungroup = group_by_length(cu_seqlens_cpu, qkv.device)
    if not groups:
        return qkv[:, :hidden_size].clone()
    for n_seqs, length, rows in groups:
        part = qkv[rows] if isinstance(rows, slice) else qkv.index_select(0, rows)
        q, k, v = part.view(n_seqs, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (sequences, N, length, D)
        places = torch.arange(length, device=qkv.device) if columns is None else columns[rows].view(n_seqs, length)
        drops: Tensor | float = 0.0 if dropout is None or isinstance(dropout, Dropout) else dropout
        if isinstance(dropout, Dropout):
            own_rows = torch.arange(qkv.shape[0], device=qkv.device)[rows].view(n_seqs, length)
            drops = masks.keep(own_rows, length, dropout, num_heads).to(q.dtype) * dropout.scale
        positions = Positions(keys, queries, (n_buckets, max_distance))
        out = attend(q, k, v, positions, places, None, scale, drops)
        outs.append(out.transpose(1, 2).reshape(n_seqs * length, hidden_size))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = out if ungroup is None else out.index_select(0, ungroup)
    # The last rows belong to no sequence and are zeros.
    return out if out.shape[0] == qkv.shape[0] else F.pad(out, (0, 0, 0, qkv.shape[0] - out.shape[0]))


def for_kernel(keys: Tensor | None, queries: Tensor | None, buckets: tuple[int, int], batch: PackedBatch) -> Any:
    """Returns the Triton kernels' arguments for distances in a batch."""
    from fastbert_kernels.disentangled_tiles import Distances

    def reach() -> tuple[Tensor, int, int]:
        rows_of = rows_of_distances(*buckets)
        radius = len(rows_of) // 2
        # With holes in the mask, a text may be spread over all columns of the batch.
        longest = batch.padded_length if batch.columns is not None else int(batch.cu_seqlens_cpu.diff().max())
        span = min(max(longest - 1, 0), radius)
        low, high = rows_of[radius - span], rows_of[radius + span]
        return rows_on(buckets, batch.device, torch.int32), low, high - low + 1

    def needed() -> Tensor | None:
        if batch.n_tokens <= FEW_TOKENS or not batch.has_plan(LONGEST_IS_BOUND):
            return None
        if batch.columns is None:
            longest = batch.cu_seqlens.diff().max()
        else:  # the columns of rows beyond the last sequence are undefined
            rows = torch.arange(batch.n_tokens, device=batch.device)
            longest = torch.where(rows < batch.cu_seqlens[-1], batch.columns, 0).max() + 1
        radius = table.shape[0] // 2
        longest = longest.clamp(1, radius + 1)
        ends = table.index_select(0, torch.stack([radius + 1 - longest, radius - 1 + longest]))
        return ends - low if low else ends

    keys, queries = (None if tensor is None else tensor.contiguous() for tensor in (keys, queries))
    table, low, n_rows = batch.plan(("distances", buckets), reach)
    of_batch = batch.plan(("rows of distances needed", buckets), needed)
    return Distances(keys, queries, table, low, n_rows, batch.columns, of_batch)


def work_list(batch: PackedBatch, rows: int, invariant: bool = False) -> Any:
    """Returns a batch's tiles of at most `rows` rows for the Triton kernels. They are made once for all layers."""
    return batch.plan(("disentangled", rows, invariant), lambda: tiles_of(batch, rows, share=not invariant))
