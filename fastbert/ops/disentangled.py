"""Disentangled attention over packed sequences has terms for the distance in columns between query and key.

    s_ij = scale * (q_i k_j + q_i pk[b(i - j)] + k_j pq[b(i - j)])

b maps each distance in columns (the query's column minus the key's) to a row of pk and pq. These are projections of a
table of distances, (2R, H). A row in the middle is for one distance, and a row further out is for several.
Source: He et al., "DeBERTa", 2020, arXiv:2006.03654.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.disentangled_gradients import gradients_by_lengths
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.distances import (
    Positions,
    attend_by_lengths,
    attend_in_place,
    bias,
    for_kernel,
    rows_of_distances,
    rows_on,
    work_list,
)
from fastbert.ops.dropout import Drop, mask_of, probability_of
from fastbert.ops.library import register
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import cpu_obstacle as rows_obstacle
from fastbert.ops.training import choose
from fastbert.ops.training import disentangled as training
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout, threshold_of

__all__ = ["KERNELS", "Positions", "bias", "cpu_obstacle", "disentangled_attention", "rows_of_distances",
           "triton_obstacle"]  # fmt: skip

KERNELS = {
    "triton": "fastbert_kernels.disentangled",
    "cpu": "fastbert_kernels.cpu",
    "torch": "torch.nn.functional.scaled_dot_product_attention, sequences of equal length together",
}
_WHOLE_BATCH = "gradients of disentangled attention go through a whole batch"


def _drawn(seed: Tensor | None, p: float) -> Dropout | None:
    return None if seed is None else Dropout(threshold_of(p), int(seed), 0)


def _forward(*arguments: Any) -> Any:
    run: Any = attend_by_lengths
    return run(*arguments[:-2], _drawn(*arguments[-2:]))


def _gradients(*arguments: Any) -> Any:
    run: Any = gradients_by_lengths
    return run(*arguments[:-2], _drawn(*arguments[-2:]))


def _backward(grad: Tensor, qkv: Tensor, keys: Any, queries: Any, *rest: Any) -> tuple[Tensor | None, ...]:
    # The registered operation has no derivative. The same computation in PyTorch has one, for create_graph=True.
    run = _gradients if torch.is_grad_enabled() else torch.ops.fastbert.disentangled_attention_backward
    d_qkv, d_keys, d_queries = run(grad, qkv, keys, queries, *rest)
    return d_qkv, None if keys is None else d_keys, None if queries is None else d_queries, *(None,) * len(rest)


# These operations read the lengths when the program runs. Both passes draw the same dropout mask from a seed.
_OPERANDS = (
    "Tensor qkv, Tensor? keys, Tensor? queries, Tensor cu_seqlens_cpu, int n_buckets, int max_distance, int num_heads, "
    "float scale, Tensor? columns, Tensor? seed, float dropout"
)
register(
    f"disentangled_attention({_OPERANDS}) -> Tensor",
    kernel=_forward,
    eager=_forward,
    fake=lambda qkv, *rest: qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
    backward=_backward,
)
register(
    f"disentangled_attention_backward(Tensor grad, {_OPERANDS}) -> (Tensor, Tensor, Tensor)",
    kernel=_gradients,
    eager=_gradients,
    fake=lambda grad, qkv, keys, queries, *rest: (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        *(qkv.new_empty(()) if t is None else t.new_empty(t.shape) for t in (keys, queries)),
    ),
)


def triton_obstacle(
    qkv: Tensor, positions: Positions, num_heads: int, dropout: Drop = None, trained: bool = False
) -> str | None:
    """Tells why the triton backend has no kernel for this, or returns None.

    trained: whether there are gradients or dropout masks.
    """
    head_size = qkv.shape[1] // (3 * num_heads)
    if not 16 <= head_size <= 128:
        return f"head size {head_size} is not from 16 to 128"
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export find the lengths of texts when the program runs"
    if trained:
        return _mixed_dtypes(qkv, positions) or choose.triton_obstacle(qkv.dtype, head_size=head_size)
    dtypes = dispatch.dtype_obstacle(qkv, positions.keys, positions.queries)
    return dtypes or dispatch.dropout_obstacle(probability_of(dropout)) or _gradient_obstacle(qkv, positions)


def cpu_obstacle(
    qkv: Tensor, positions: Positions, num_heads: int, dropout: Drop = None, trained: bool = False
) -> str | None:
    """Tells why the cpu backend takes PyTorch's operations and not the C++ kernels, or returns None."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    if trained:
        return _mixed_dtypes(qkv, positions) or choose.cpu_obstacle(qkv.dtype, head_size=head_size)
    if dropout is not None:
        return "dropout"
    return _gradient_obstacle(qkv, positions) or _mixed_dtypes(qkv, positions) or rows_obstacle(qkv)


def _mixed_dtypes(qkv: Tensor, positions: Positions) -> str | None:
    dtypes = {tensor.dtype for tensor in (qkv, *positions[:2]) if tensor is not None}
    return f"mixed dtypes: {', '.join(sorted(map(str, dtypes)))}" if len(dtypes) > 1 else None


def _gradient_obstacle(qkv: Tensor, positions: Positions) -> str | None:
    """Tells why no kernel runs for gradients outside of a training pass, or returns None."""
    tensors = [tensor for tensor in (qkv, *positions[:2]) if tensor is not None]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return None
    return tracing.observed(*tensors) or (None if recording.on and recording.is_dry() else _WHOLE_BATCH)


def by_kernel(
    qkv: Tensor, positions: Positions, batch: PackedBatch, num_heads: int, scale: float, invariant: bool
) -> Tensor:
    """Works as `disentangled_attention` on the triton backend, with checked arguments."""
    from fastbert_kernels import disentangled as kernels

    if batch.n_tokens == 0:
        return qkv.new_empty(0, qkv.shape[1] // 3)
    distances = for_kernel(*positions, batch)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    tiles = work_list(batch, kernels.BLOCK_Q, invariant)
    return kernels.disentangled_attention_forward(qkv, tiles, num_heads, scale, distances)


def disentangled_attention(
    qkv: Tensor,
    positions: Positions,
    batch: PackedBatch,
    num_heads: int,
    *,
    scale: float,
    dropout: Drop = None,
    policy: Policy = AUTO,
) -> Tensor:
    """Computes softmax(scale * (q k^T + terms of distances)) v within each sequence of the batch.

    qkv: (T, 3 * N * D), laid out [q | k | v], each (N, D). positions: at least one of its tensors, in qkv's dtype.
    Columns are those of the batch, after `packing.find_holes`. dropout: the dropout of the probabilities. Returns (T, N
    * D) in qkv's dtype. Raises ValueError for wrong shapes, BackendError if no backend meets the policy.
    """
    for name, tensor in (("keys", positions.keys), ("queries", positions.queries)):
        if tensor is not None and tracing.differ(tensor.shape[1] * 3, qkv.shape[1]):
            expected = qkv.shape[1] // 3
            raise ValueError(f"positions.{name}: expected rows of {expected} numbers, got {tuple(tensor.shape)}")
    if batch.valid is not None:
        in_place = tracing.transformed(qkv) or "the batch holds rows of padding"
        dispatch.choose("attention", policy.backend, policy.strict, qkv.device, in_place)
        dispatch.check_invariant("attention", policy, "cpu", in_place)
        return attend_in_place(qkv, batch, num_heads, positions, scale, probability_of(dropout))
    if qkv.dim() != 2 or qkv.shape[1] % (3 * num_heads) or qkv.shape[0] != batch.n_tokens:
        expected_shape = f"(T, 3 * N * D) with T = {batch.n_tokens} and N = {num_heads}"
        raise ValueError(f"qkv: expected shape {expected_shape}, got {tuple(qkv.shape)}")
    trained = choose.perhaps(dropout, torch.compiler.is_compiling())
    trained = trained and choose.wanted(policy, dropout, qkv, positions.keys, positions.queries)
    trained = trained and not isinstance(dropout, float)
    if recording.on and recording.is_dry():  # a dry run is about the forward kernels
        trained = mask_of(dropout) is not None and not policy.batch_invariant
    no_kernel = triton_obstacle(qkv, positions, num_heads, dropout, trained)
    backend = dispatch.choose("attention", policy.backend, policy.strict, qkv.device, no_kernel)
    obstacle = cpu_obstacle(qkv, positions, num_heads, dropout, trained) if backend == "cpu" else None
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
    if trained and (backend == "triton" or (backend == "cpu" and obstacle is None)):
        settings = training.Settings(batch, num_heads, scale, positions.buckets, mask_of(dropout))
        return training.attention(qkv, positions.keys, positions.queries, settings, training.KERNELS[backend])
    if backend == "triton":
        return by_kernel(qkv, positions, batch, num_heads, scale, policy.batch_invariant)
    if backend == "cpu" and obstacle is None and dispatch.direct(qkv):
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        rows_of = rows_on(positions.buckets, qkv.device, torch.int32)
        return cpu.disentangled_attention_forward(
            qkv, positions.keys, positions.queries, rows_of, batch.cu_seqlens_cpu, num_heads, scale, batch.columns
        )
    if torch.compiler.is_compiling():
        p, seed = probability_of(dropout), None
        if p > 0.0:  # a tensor, so that each call of the program draws a new seed
            seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
        return torch.ops.fastbert.disentangled_attention(*arguments, seed, p)
    return attend_by_lengths(*arguments, dropout)
