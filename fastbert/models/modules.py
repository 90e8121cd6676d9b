"""This module calls modules inside a model: fused if the result is the same, otherwise the module itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.engine.listeners import is_bare, is_plain, is_plain_norm
from fastbert.models import hooks
from fastbert.ops import Policy, dispatch, packing, recording
from fastbert.ops import dropout as masks
from fastbert.ops.packing import PackedBatch

__all__ = ["add_and_norm", "call_dropout", "call_module", "dense", "first_rows", "is_plain", "is_plain_norm",
           "mean_rows"]  # fmt: skip


def dense(
    module: nn.Module, x: Any, policy: Policy, activation: str = "none", batch: PackedBatch | None = None
) -> Tensor:
    """activation(module(x)), fused if the module is a plain linear. (T, K) -> (T, M)

    batch: the layout of the rows, for a module that is called with padded ones; None for rows of sequences, (B, K).
    """
    if is_plain(module):
        return ops.linear(x, module.weight, module.bias, activation, policy=policy, keep=not module.training)
    x = call_module(module, x, policy, batch)
    return x if activation == "none" else ops.bias_gelu(x, None, activation, policy=policy)


def call_module(module: nn.Module, x: Any, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """Calls module(x) for a module that is no plain linear or embedding. batch: see `dense`.

    Its bits are unknown, so it raises BackendError under a batch-invariant policy.
    """
    if policy.batch_invariant:
        name = type(module).__name__
        dispatch.refuse("", f"a {name} that is an adapter, has hooks or has no bias does not support it")
    if recording.on and (output := recording.call(module, x)) is not None:
        return output
    return hooks.leaf(module, x, batch)


def call_dropout(dropout: nn.Module, x: Tensor, batch: PackedBatch | None = None, site: int | None = None) -> Tensor:
    """Calls dropout(x), also for a replaced dropout module. batch: see `dense`.

    site: the site of a mask that every backend draws in the same way (`fastbert_kernels.masks`); None if PyTorch draws
    it.
    """
    if not is_bare(dropout, nn.Dropout):
        return hooks.leaf(dropout, x, batch)
    if site is None or not dropout.training or recording.on and recording.is_dry():
        return dropout(x)
    return masks.apply(x, ops.dropout_of(dropout.p, batch, site))  # type: ignore[arg-type]


def add_and_norm(
    norm: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor, policy: Policy, batch: PackedBatch | None
) -> Tensor:
    """norm(dropout(x) + residual), by the modules themselves."""
    return call_module(norm, call_dropout(dropout, x, batch) + residual, policy, batch)


def first_rows(x: Tensor, batch: PackedBatch, policy: Policy) -> Tensor:
    """(T, H) -> (B, H): each sequence's first token, zeros for an empty sequence."""
    if batch.valid is not None:
        return packing.first_rows(x, batch)
    return ops.pool(x, batch.cu_seqlens, "cls", policy=policy)


def mean_rows(x: Tensor, batch: PackedBatch, policy: Policy) -> Tensor:
    """(T, H) -> (B, H): the mean of each sequence's tokens, zeros for an empty sequence."""
    if batch.valid is None:
        return ops.pool(x, batch.cu_seqlens, "mean", policy=policy)
    counts = batch.valid.long().sum(1, keepdim=True).clamp(min=1)
    return packing.pad(x, batch).sum(1) / counts
