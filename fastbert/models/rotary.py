"""The angles of rotary positions, made once a batch for all layers of a base, and operations on parts without bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.rotary import RotaryLayer
from fastbert.engine import Norm
from fastbert.engine.listeners import is_bare
from fastbert.models.modules import call_module, dense, is_plain
from fastbert.ops import Policy, dispatch, recording, tracing
from fastbert.ops.packing import PackedBatch

PLAN = "rotary positions"
WORDS_OBSTACLE = "there is no Triton kernel for embeddings without positions yet"


class Rotations:
    """The cosines and sines of a batch's rows, for each base that its layers ask for."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, layer: RotaryLayer, head_size: int) -> tuple[Tensor, Tensor]:
        """(T, D / 2) float32 each."""
        key = head_size, layer.base, layer.factor
        if key not in self._tables:
            self._tables[key] = ops.rotations(self.position_ids, *key)
        return self._tables[key]

    def renew(self, position_ids: Tensor) -> None:
        """Takes the positions of a forward pass. Its tables are made in it, so that a CUDA graph makes them again."""
        self.position_ids, self._tables = position_ids, {}


def rotations_of(batch: PackedBatch) -> Rotations:
    """The rotations of a batch, by its columns where nobody has set other positions."""
    rotations: Rotations = batch.plan(PLAN, lambda: Rotations(batch.position_ids))
    return rotations


def look_up(words: nn.Module, ids: Any, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """words(ids), of words alone: (T,) -> (T, H)."""
    if not is_bare(words, nn.Embedding):
        return call_module(words, ids, policy, batch)
    weight: Any = words.weight
    backend = dispatch.choose("embedding", policy.backend, policy.strict, weight.device, WORDS_OBSTACLE)
    if recording.on:
        shape = ids.shape[0], weight.shape[1]
        if recording.note("embedding", backend, None, shape, weight.dtype, weight):
            return recording.stand_in(shape, weight.dtype)
    return nn.functional.embedding(ids, weight, words.padding_idx)  # type: ignore[arg-type]


def project(
    linear: nn.Module, x: Tensor, policy: Policy, batch: PackedBatch | None, activation: str = "none"
) -> Tensor:
    """activation(linear(x)), as `modules.dense`, for linears that may lack a bias. (T, K) -> (T, M)"""
    if is_bare(linear, nn.Linear) and not is_plain(linear):
        weight: Any = linear.weight
        if type(weight) in tracing.PLAIN:
            return ops.linear(x, weight, linear.bias, activation, policy=policy, keep=not linear.training)  # type: ignore[arg-type]
    return dense(linear, x, policy, activation, batch)


def fusable(linears: Iterable[nn.Module]) -> bool:
    """Tells whether linears, which may lack a bias, may be multiplied as one: they are bare, and of plain tensors."""
    compiling = torch.compiler.is_compiling()
    return all(is_bare(each, nn.Linear) and (compiling or type(each.weight) in tracing.PLAIN) for each in linears)


def normalise(norm: nn.Module, x: Tensor, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """norm(x), for norms that may lack a bias, or be nn.Identity. (T, H) -> (T, H)"""
    if is_bare(norm, nn.Identity):
        return x
    if not is_bare(norm, nn.LayerNorm) or norm.weight is None:
        return call_module(norm, x, policy, batch)
    weight, bias = Norm.of(norm).filled(norm.weight)  # type: ignore[arg-type]
    return ops.bias_residual_layer_norm(x, None, None, weight, bias, norm.eps, policy=policy)  # type: ignore[arg-type]
