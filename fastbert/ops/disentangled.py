"""Disentangled attention over packed sequences: scores have terms for how many columns query and key are apart.

    s_ij = scale * (q_i k_j + q_i pk[b(i - j)] + k_j pq[b(i - j)])

b gives each distance in columns, the query's less the key's, a row of pk and pq, which are projections of a table of
distances, (2R, H). Rows in the middle are for one distance each, and those farther out for more of them.
Source: He et al., "DeBERTa", 2020, arXiv:2006.03654.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.attention_plan import tiles_of
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.groups import group_by_length
from fastbert.ops.library import register
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import cpu_obstacle as rows_obstacle
from fastbert_kernels import cpu

KERNELS = {
    "triton": "fastbert_kernels.disentangled",
    "cpu": "fastbert_kernels.cpu",
    "torch": "torch.nn.functional.scaled_dot_product_attention, sequences of equal length together",
}
_GRADIENTS = "there is no {} for gradients of disentangled attention yet"


class Positions(NamedTuple):
    """What stands for distances in one layer.

    keys: (2R, N * D), which queries are multiplied with (content to position), or None. queries: (2R, N * D), which
    keys are multiplied with (position to content), or None. buckets: how distances become rows, the arguments of
    `rows_of_distances`.
    """

    keys: Tensor | None
    queries: Tensor | None
    buckets: tuple[int, int]


@functools.cache
def rows_of_distances(n_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The row, from 0 to 2R - 1, of each distance from -M to M; beyond, all distances have the row of the last.

    n_buckets: on either side, R. Those from 0 to R / 2 have one distance each, and the others grow with its logarithm
    up to max_distance. -1: each distance below max_distance, R, has its own. The logarithm is float32's, as in the
    published code, which decides the bucket at an edge.
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
            return tuple(rows)
        radius *= 2


_rows_on: dict[Any, Tensor] = {}


def _rows(buckets: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """(2M + 1,): `rows_of_distances` on a device."""
    key = buckets, device, dtype
    kept = _rows_on.get(key)
    if kept is not None:
        return kept
    rows = rows_of_distances(*buckets)
    if torch.compiler.is_compiling() or tracing.observed() is not None or device.type == "meta":
        return torch.tensor(rows, device=device, dtype=dtype)
    with torch.inference_mode(False):  # or autograd could not keep it
        _rows_on[key] = made = torch.tensor(rows, device=device, dtype=dtype)
    return made


def bias(q: Tensor, k: Tensor, positions: Positions, columns: Tensor, scale: float) -> Tensor:
    """The two terms of distances, scaled, (B, N, S, S), in the dtype of q. q, k: (B, N, S, D).

    columns: (S,) or (B, S), of the tokens.
    """
    table = _rows(positions.buckets, q.device)
    radius, n_heads = table.shape[0] // 2, q.shape[1]
    apart = (columns[..., :, None] - columns[..., None, :]).long().clamp(-radius, radius) + radius
    rows = table.index_select(0, apart.flatten()).view(apart.shape)  # (S, S) or (B, S, S)
    rows = rows[None, None] if columns.dim() == 1 else rows[:, None]
    shape = q.shape[0], n_heads, q.shape[2], q.shape[2]
    total: Any = 0
    for part, other, places in ((q, positions.keys, rows), (k, positions.queries, rows.transpose(-1, -2))):
        if other is not None:
            by_row = part @ other.unflatten(-1, (n_heads, -1)).permute(1, 2, 0)  # (B, N, S, 2R)
            term = by_row.gather(-1, places.expand(shape))
            term = term.to(torch.promote_types(term.dtype, torch.float32))
            total = total + (term if part is q else term.transpose(-1, -2))
    return (total * scale).to(q.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Positions,
    columns: Tensor,
    valid: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Attention of texts of equal length, (B, N, S, D) each. valid: (B, 1, 1, S) bool, the keys that are tokens."""
    added = bias(q, k, positions, columns, scale)
    if tracing.differentiated() or (torch.is_grad_enabled() and added.requires_grad):
        scores = q @ k.transpose(-1, -2) * scale + added
        if valid is not None:
            scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
        return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ v
    if valid is not None:
        added = added.masked_fill(~valid, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, added, dropout_p=dropout_p, scale=scale)


def attend_in_place(
    qkv: Tensor, batch: PackedBatch, num_heads: int, positions: Positions, scale: float, dropout_p: float
) -> Tensor:
    """Attention of a `packing.in_place` batch, (B * S, 3 * N * D) -> (B * S, N * D), with its padding masked."""
    assert batch.valid is not None
    qkv = qkv.reshape(batch.batch_size, batch.padded_length, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    valid = batch.valid | ~batch.valid.any(1, keepdim=True)  # what comes of a row without tokens is cleared later
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
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of packed rows, (T, 3 * N * D) -> (T, N * D). columns: (T,), None where tokens are neighbours."""
    hidden_size, outs = qkv.shape[1] // 3, []
    groups, ungroup = group_by_length(cu_seqlens_cpu, qkv.device)
    if not groups:
        return qkv[:, :hidden_size].clone()
    for n_seqs, length, rows in groups:
        part = qkv[rows] if isinstance(rows, slice) else qkv.index_select(0, rows)
        q, k, v = part.view(n_seqs, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (sequences, N, length, D)
        places = torch.arange(length, device=qkv.device) if columns is None else columns[rows].view(n_seqs, length)
        out = attend(q, k, v, Positions(keys, queries, (n_buckets, max_distance)), places, None, scale, dropout_p)
        outs.append(out.transpose(1, 2).reshape(n_seqs * length, hidden_size))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = out if ungroup is None else out.index_select(0, ungroup)
    # Rows that belong to no sequence fill the last ones up.
    return out if out.shape[0] == qkv.shape[0] else F.pad(out, (0, 0, 0, qkv.shape[0] - out.shape[0]))


register(
    "disentangled_attention(Tensor qkv, Tensor? keys, Tensor? queries, Tensor cu_seqlens_cpu, int n_buckets, "
    "int max_distance, int num_heads, float scale, Tensor? columns) -> Tensor",
    kernel=attend_by_lengths,
    eager=attend_by_lengths,
    fake=lambda qkv, *rest: qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
)


def triton_obstacle(qkv: Tensor, positions: Positions, num_heads: int, dropout_p: float) -> str | None:
    """Tells why the triton backend has no kernel for this, or None."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if not 16 <= head_size <= 128:
        return f"head size {head_size} is not from 16 to 128"
    if _with_gradients(qkv, positions):
        return _GRADIENTS.format("Triton kernel")
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export find the lengths of texts when the program runs"
    return dispatch.dtype_obstacle(qkv, positions.keys, positions.queries) or dispatch.dropout_obstacle(dropout_p)


def cpu_obstacle(qkv: Tensor, positions: Positions, num_heads: int, dropout_p: float) -> str | None:
    """Tells why the cpu backend takes PyTorch's operations and not the C++ kernel, or None."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is no multiple of 16 up to 256"
    if dropout_p > 0.0:
        return "dropout"
    if _with_gradients(qkv, positions):
        return _GRADIENTS.format("C++ kernel")
    dtypes = {tensor.dtype for tensor in (qkv, positions.keys, positions.queries) if tensor is not None}
    return "mixed dtypes" if len(dtypes) > 1 else rows_obstacle(qkv)


def _with_gradients(qkv: Tensor, positions: Positions) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, *positions[:2]))


class _Reach(NamedTuple):
    """What the kernel needs of a batch: its tiles, a row for each distance, and the rows that its longest text has."""

    work_list: Any
    rows_of: Tensor
    low: int
    n_rows: int


def _reach_of(batch: PackedBatch, buckets: tuple[int, int], invariant: bool) -> _Reach:
    """Returns that, made once a batch."""

    def make() -> _Reach:
        from fastbert_kernels import disentangled as kernels

        rows_of = rows_of_distances(*buckets)
        radius = len(rows_of) // 2
        # With holes in the mask, a text may be spread over all columns of the batch.
        longest = batch.padded_length if batch.columns is not None else int(batch.cu_seqlens_cpu.diff().max())
        span = min(max(longest - 1, 0), radius)
        low, high = rows_of[radius - span], rows_of[radius + span]
        tiles = tiles_of(batch, kernels.BLOCK_Q, share=not invariant)
        return _Reach(tiles, _rows(buckets, batch.device, torch.int32), low, high - low + 1)

    return batch.plan(("disentangled", buckets, invariant), make)


def by_kernel(
    qkv: Tensor, positions: Positions, batch: PackedBatch, num_heads: int, scale: float, invariant: bool
) -> Tensor:
    """Does what `disentangled_attention` does on the triton backend, with arguments that were checked."""
    from fastbert_kernels import disentangled as kernels

    if batch.n_tokens == 0:
        return qkv.new_empty(0, qkv.shape[1] // 3)
    reach = _reach_of(batch, positions.buckets, invariant)
    keys, queries = (None if tensor is None else tensor.contiguous() for tensor in positions[:2])
    distances = kernels.Distances(keys, queries, reach.rows_of, reach.low, reach.n_rows, batch.columns)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return kernels.disentangled_attention_forward(qkv, reach.work_list, num_heads, scale, distances)


def disentangled_attention(
    qkv: Tensor,
    positions: Positions,
    batch: PackedBatch,
    num_heads: int,
    *,
    scale: float,
    dropout_p: float = 0.0,
    policy: Policy = AUTO,
) -> Tensor:
    """softmax(scale * (q k^T + terms of distances)) v within each sequence of the batch.

    qkv: (T, 3 * N * D), laid out [q | k | v], each (N, D). positions: at least one of its tensors, in qkv's dtype.
    Columns are those of the batch, after `packing.find_holes`. dropout_p: of the probabilities, which PyTorch draws.
    Returns (T, N * D) in qkv's dtype. Raises ValueError for shapes that do not fit, BackendError under a policy that
    nothing can follow.
    """
    for name, tensor in (("keys", positions.keys), ("queries", positions.queries)):
        if tensor is not None and tracing.differ(tensor.shape[1] * 3, qkv.shape[1]):
            expected = qkv.shape[1] // 3
            raise ValueError(f"positions.{name}: expected rows of {expected} numbers, got {tuple(tensor.shape)}")
    if batch.valid is not None:
        in_place = tracing.transformed(qkv) or "the batch keeps the rows of its padding"
        dispatch.choose("attention", policy.backend, policy.strict, qkv.device, in_place)
        dispatch.check_invariant("attention", policy, "cpu", in_place)
        return attend_in_place(qkv, batch, num_heads, positions, scale, dropout_p)
    if qkv.dim() != 2 or qkv.shape[1] % (3 * num_heads) or qkv.shape[0] != batch.n_tokens:
        expected_shape = f"(T, 3 * N * D) with T = {batch.n_tokens} and N = {num_heads}"
        raise ValueError(f"qkv: expected shape {expected_shape}, got {tuple(qkv.shape)}")
    no_kernel = triton_obstacle(qkv, positions, num_heads, dropout_p)
    backend = dispatch.choose("attention", policy.backend, policy.strict, qkv.device, no_kernel)
    obstacle = cpu_obstacle(qkv, positions, num_heads, dropout_p) if backend == "cpu" else None
    if backend != "triton":
        dispatch.check_invariant("attention", policy, backend, obstacle)
    if recording.on:
        shape = qkv.shape[0], qkv.shape[1] // 3
        tables = [tensor for tensor in (positions.keys, positions.queries) if tensor is not None]
        facts: dict[str, Any] = {
            "heads": num_heads, "compiled_obstacle": obstacle, "distances": (len(tables), tables[0].shape[0])
        }  # fmt: skip
        if recording.note("attention", backend, qkv.shape, shape, qkv.dtype, **facts):
            return qkv.new_zeros(shape)
    arguments = (
        qkv, positions.keys, positions.queries, batch.cu_seqlens_cpu, *positions.buckets, num_heads, scale,
        batch.columns,
    )  # fmt: skip
    if backend == "triton" and not torch.compiler.is_compiling():
        return by_kernel(qkv, positions, batch, num_heads, scale, policy.batch_invariant)
    if backend == "cpu" and obstacle is None and dispatch.direct(qkv):
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        rows_of = _rows(positions.buckets, qkv.device, torch.int32)
        return cpu.disentangled_attention_forward(
            qkv, positions.keys, positions.queries, rows_of, batch.cu_seqlens_cpu, num_heads, scale, batch.columns
        )
    if torch.compiler.is_compiling() and dropout_p == 0.0:  # lengths are looked at when it runs
        return torch.ops.fastbert.disentangled_attention(*arguments)
    return attend_by_lengths(*arguments, dropout_p)
