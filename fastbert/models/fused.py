"""Linears that read the same rows are multiplied as one. The weight of the product is derived from theirs.

A module of attention that uses this names the linears in `projections` and has a `derived`. Its methods only call these
functions:

    projections = "query", "key", "value"

    def fused_qkv(self):                      return fused.weights(self)             # engines and explain read it
    def derived_addresses(self):              return fused.addresses(self)           # so do graphs and the C++ encoder
    def renew(self, training):                fused.renew(self, training)
    def train(self, mode=True):               self.renew(mode); return super().train(mode)
    def _replicate_for_data_parallel(self):   return fused.replica(super()._replicate_for_data_parallel())

With `without_bias = True`, its linears may lack biases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.engine.listeners import is_bare, is_plain
from fastbert.models import rotary
from fastbert.models.modules import call_module
from fastbert.ops import Policy, tracing
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch


def weights(module: Any) -> Any:
    """Returns the linears as one: their weights one above the other, (M, K), and their biases, (M,).

    The bias has zeros for a linear without a bias. It is None if no linear has one. In eval mode both are kept until
    one of the parameters changes. Raises RuntimeError for weights of several dtypes.
    """
    linears = [getattr(module, name) for name in module.projections]
    parts: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    parameters = parts + [bias for bias in biases if bias is not None]
    if any(p.dtype != parameters[0].dtype for p in parameters):
        names, dtypes = ", ".join(module.projections), [p.dtype for p in parameters]
        raise RuntimeError(f"{names}: expected one dtype, got {dtypes}")
    present = tuple(bias is not None for bias in biases)

    def make() -> tuple[Tensor, ...]:
        if not any(present):
            return (torch.cat(parts),)
        filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(parts, biases, strict=True)]
        return torch.cat(parts), torch.cat(filled)

    tensors = make() if module.training else module.derived.get("qkv", parameters, make, present)
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def fusible(module: Any) -> bool:
    """Tells whether every linear is plain, so that one product may replace all of them."""
    linears = [getattr(module, name) for name in module.projections]
    if all(map(is_plain, linears)):
        return True
    return getattr(module, "without_bias", False) and all(
        is_bare(linear, nn.Linear) and type(linear.weight) in tracing.PLAIN for linear in linears
    )


def project(module: Any, x: Tensor, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """Returns the joined outputs of the linears, by one product if possible. (T, K) -> (T, M)"""
    if fusible(module):
        return ops.linear(x, *module.fused_qkv(), policy=policy, keep=not module.training)
    call = rotary.project if getattr(module, "without_bias", False) else call_module
    return torch.cat([call(getattr(module, name), x, policy, batch) for name in module.projections], -1)


def project_and_gate(module: Any, x: Tensor, activation: str, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """activation(first half) * second half of `project`, in one operation if there are no hooks. (T, K) -> (T, I)"""
    if fusible(module):
        weight, bias = module.fused_qkv()
        return ops.gated_linear(x, weight, bias, activation, policy=policy, keep=not module.training)
    return ops.gated(project(module, x, policy, batch), activation, policy=policy)


def addresses(module: Any) -> tuple[int, ...]:
    """Returns the addresses of the current fused weight and bias; () if they are not kept."""
    if not fusible(module):
        return ()
    fused = tuple(tensor for tensor in module.fused_qkv() if tensor is not None)
    kept = {tensor.data_ptr() for tensor in module.derived.tensors()}
    places = tuple(tensor.data_ptr() for tensor in fused)
    return places if kept.issuperset(places) else ()


def renew(module: Any, training: bool) -> None:
    """Marks the module's derived tensors to be made again at their next use, or, for training, drops them."""
    ops.forget_packed(module.derived.tensors())  # packed from parameters that will be written again
    if training:
        module.derived.clear()
    else:
        module.derived.invalidate()


def replica(module: Any) -> Any:
    """Returns the module of one of several threads, with tensors derived from its own parameters."""
    module.derived = Derived()
    return module
