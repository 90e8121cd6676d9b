"""This module holds disentangled attention as one node of autograd. `fastbert.ops.disentangled` has the formula."""

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
    """A `Settings` holds the settings of one attention. buckets: the arguments of `rows_of_distances`."""

    batch: PackedBatch
    num_heads: int
    scale: float
    buckets: tuple[int, int]
    dropout: Dropout | None


class Kernels(Protocol):
    """A `Kernels` has the passes of one backend. qkv: (T, 3 N D). keys, queries: (2R, N D); one of them may be None."""

    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the result, (T, N D), and lse for the backward pass, (N, T) float32 or None."""

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        settings: Settings,
    ) -> Gradients:
        """Returns the gradients of qkv (zeros in rows of no sequence), keys and queries. out, lse: from `forward`."""


class _Cpu:
    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor | None]:
        batch, num_heads, scale, buckets, dropout = settings
        rows_of = rows_on(buckets, qkv.device, torch.int32)
        out = cpu.disentangled_attention_forward(
            qkv, keys, queries, rows_of, batch.cu_seqlens_cpu, num_heads, scale, batch.columns, dropout
        )
        return out, None

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        settings: Settings,
    ) -> Gradients:
        batch, num_heads, scale, buckets, dropout = settings
        rows_of = rows_on(buckets, qkv.device, torch.int32)
        return cpu.disentangled_attention_backward(
            grad, qkv, keys, queries, rows_of, batch.cu_seqlens_cpu, num_heads, scale, batch.columns, dropout
        )


class _Triton:
    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert_kernels import disentangled_training as kernels
        from fastbert_kernels.disentangled import BLOCK_Q

        batch, num_heads, scale, buckets, dropout = settings
        distances = for_kernel(keys, queries, buckets, batch)
        tiles = work_list(batch, BLOCK_Q)
        return kernels.disentangled_training_forward(qkv, tiles, num_heads, scale, distances, dropout)

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        settings: Settings,
    ) -> Gradients:
        from fastbert_kernels import disentangled_backward as kernels

        batch, num_heads, scale, buckets, dropout = settings
        distances = for_kernel(keys, queries, buckets, batch)
        n_tokens, runs_of = int(batch.cu_seqlens_cpu[-1]), runs_on(buckets, qkv.device)
        tiles = work_list(batch, kernels.tile_rows(qkv.dtype, qkv.shape[1] // (3 * num_heads)))
        assert lse is not None
        return kernels.disentangled_attention_backward(
            grad, qkv, out, lse, tiles, num_heads, scale, distances, runs_of, n_tokens, dropout
        )


class _Plain:
    """A `_Plain` has the forward pass in plain, differentiable PyTorch."""

    def forward(
        self, qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor | None]:
        batch, num_heads, scale, buckets, dropout = settings
        arguments = batch.cu_seqlens_cpu, *buckets, num_heads, scale, batch.columns
        return attend_by_lengths(qkv, keys, queries, *arguments, dropout), None

    def backward(self, *_: Any) -> Gradients:
        raise NotImplementedError("plain PyTorch differentiates its forward pass")


KERNELS: dict[str, Kernels] = {"cpu": _Cpu(), "triton": _Triton(), "torch": _Plain()}


def attention(qkv: Tensor, keys: Tensor | None, queries: Tensor | None, settings: Settings, kernels: Kernels) -> Tensor:
    """Computes dropout(softmax(scale (q k^T + terms of distances))) v in each sequence, (T, 3 N D) -> (T, N D)."""
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
            out, lse = kernels.forward(qkv, keys, queries, settings)
        ctx.settings, ctx.kernels = settings, kernels
        ctx.save_for_backward(qkv, keys, queries, None if lse is None else out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, keys, queries, out, lse = ctx.saved_tensors
        settings, differentiable = ctx.settings, torch.is_grad_enabled()
        if batched(grad) or (differentiable and settings.dropout is None):
            inputs = qkv, keys, queries, None, None
            return again(_plain(settings), grad, inputs, ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            gradients = ctx.kernels.backward(grad.contiguous(), qkv, keys, queries, out, lse, settings)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        grads = *(gradient if need else None for gradient, need in needed), None, None
        return once(grads) if differentiable else grads


def _plain(settings: Settings) -> Any:
    """Returns the attention in plain PyTorch, as a function of the inputs of its autograd node."""

    def function(qkv: Tensor, keys: Tensor | None, queries: Tensor | None, *_: Any) -> Tensor:
        return KERNELS["torch"].forward(qkv, keys, queries, settings)[0]

    return function
