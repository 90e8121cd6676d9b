"""Disentangled attention with gradients as one node of autograd. `fastbert.ops.disentangled` has the formula."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbert.ops.distances import attend_by_lengths, for_kernel, rows_on, runs_on, work_list
from fastbert.ops.packing import PackedBatch
from fastbert.ops.training.once import again, batched, once
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


class Settings(NamedTuple):
    """The settings of one attention. buckets: how distances become rows, the arguments of `rows_of_distances`."""

    batch: PackedBatch
    num_heads: int
    scale: float
    buckets: tuple[int, int]
    dropout: Dropout | None


class Kernels(Protocol):
    """The passes of one backend. qkv: (T, 3 N D). keys, queries: (2R, N D), one of which may be None."""

    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        """(T, N D), and what the backward pass needs beside the inputs."""

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        kept: tuple[Tensor, ...],
        settings: Settings,
    ) -> Gradients:
        """The gradients of qkv, zeros in rows of no sequence, and of keys and queries. kept: what `forward` gave."""


class _Cpu:
    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        batch, num_heads, scale, buckets, dropout = settings
        return (
            cpu.disentangled_attention_forward(
                qkv, keys, queries, rows_on(buckets, qkv.device, torch.int32), batch.cu_seqlens_cpu, num_heads, scale,
                batch.columns, dropout,
            ),
        )  # fmt: skip

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        kept: tuple[Tensor, ...],
        settings: Settings,
    ) -> Gradients:
        batch, num_heads, scale, buckets, dropout = settings
        return cpu.disentangled_attention_backward(
            grad, qkv, keys, queries, rows_on(buckets, qkv.device, torch.int32), batch.cu_seqlens_cpu, num_heads,
            scale, batch.columns, dropout,
        )  # fmt: skip


class _Triton:
    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        from fastbert_kernels import disentangled_training as kernels
        from fastbert_kernels.disentangled import BLOCK_Q

        batch, num_heads, scale, buckets, dropout = settings
        distances = for_kernel(keys, queries, buckets, batch)
        tiles = work_list(batch, BLOCK_Q)
        out, lse = kernels.disentangled_training_forward(qkv, tiles, num_heads, scale, distances, dropout)
        return out, out, lse

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        kept: tuple[Tensor, ...],
        settings: Settings,
    ) -> Gradients:
        from fastbert_kernels import disentangled_backward as kernels

        batch, num_heads, scale, buckets, dropout = settings
        distances = for_kernel(keys, queries, buckets, batch)
        n_tokens, runs_of = int(batch.cu_seqlens_cpu[-1]), runs_on(buckets, qkv.device)
        tiles = work_list(batch, kernels.tile_rows(qkv.dtype, qkv.shape[1] // (3 * num_heads)))
        return kernels.disentangled_attention_backward(
            grad, qkv, kept[0], kept[1], tiles, num_heads, scale, distances, runs_of, n_tokens, dropout
        )  # fmt: skip


KERNELS: dict[str, Kernels] = {"cpu": _Cpu(), "triton": _Triton()}


def attention(qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings, kernels: Kernels) -> Tensor:
    """dropout(softmax(scale (q k^T + terms of distances))) v within each sequence, (T, 3 N D) -> (T, N D)."""
    out: Tensor = _Attention.apply(qkv, keys, queries, settings, kernels)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings, kernels: Kernels
    ) -> Tensor:
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        keys, queries = (None if table is None else table.contiguous() for table in (keys, queries))
        with torch.autocast(qkv.device.type, enabled=False):
            out, *kept = kernels.forward(qkv, keys, queries, settings)
        ctx.settings, ctx.kernels = settings, kernels
        ctx.save_for_backward(qkv, keys, queries, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, keys, queries, *kept = ctx.saved_tensors
        settings, differentiable = ctx.settings, torch.is_grad_enabled()
        if batched(grad) or (differentiable and settings.dropout is None):
            inputs = qkv, keys, queries, None, None
            return again(_plain(settings), grad, inputs, ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            found = ctx.kernels.backward(grad.contiguous(), qkv, keys, queries, tuple(kept), settings)
        needed = zip(found, ctx.needs_input_grad, strict=False)
        grads = *(gradient if need else None for gradient, need in needed), None, None
        return once(grads) if differentiable else grads


def _plain(settings: Settings) -> Any:
    """Returns the attention in plain PyTorch, on what its node of autograd took."""
    batch, num_heads, scale, buckets, _ = settings

    def function(qkv: Tensor, keys: Tensor | None, queries: Tensor | None, *_: Any) -> Tensor:
        return attend_by_lengths(qkv, keys, queries, batch.cu_seqlens_cpu, *buckets, num_heads, scale, batch.columns)

    return function
