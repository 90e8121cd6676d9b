"""This module runs linear layers of the cpu backend, and keeps each weight in the layout that the product reads.

    out = activation(x @ weight^T + bias),    or    out = x @ weight^T + bias + residual

PyTorch's F.linear converts the weight's layout on every call, or, in float32, uses MKL, which is slow on processors of
other makers. The C++ kernel of `fastbert_kernels.cpu` runs if it is available, except for bfloat16 on processors with
matrix units. Otherwise oneDNN runs. If neither supports the product, the caller uses F.linear.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.ops import onednn, tracing
from fastbert.ops.derived import on_rewrite
from fastbert.ops.silent_writes import Writes
from fastbert_kernels import cpu

LEAST_ROWS = 4  # for up to three rows F.linear adds each sum in several chains and is more exact
ACTIVATIONS = tuple(onednn.UNARY)

# Weight -> its state when packed, its `Writes`, an alias that keeps its memory from being reused, and the packed
# weight.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def operands_obstacle(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Tells why these operands have no product with a packed weight on the cpu backend, or returns None."""
    obstacle = _tensors_obstacle(x, weight, others)
    if obstacle is not None:
        return obstacle
    if x.shape[0] < LEAST_ROWS:
        return f"fewer than {LEAST_ROWS} rows"
    if weight.is_inference():
        return "the weight is not a plain tensor, so its changes are not counted"
    return packing_obstacle(x.dtype)


def _tensors_obstacle(x: torch.Tensor, weight: torch.Tensor, others: tuple[torch.Tensor | None, ...]) -> str | None:
    tensors = [x, weight, *(t for t in others if t is not None)]
    if any(t.device.type != "cpu" for t in tensors):
        return f"the tensors are on {x.device}"
    if (observer := tracing.observed()) is not None:
        return observer
    if any(t.dtype != x.dtype for t in tensors) or torch.is_autocast_enabled("cpu"):
        return "mixed dtypes"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are needed (torch.no_grad or torch.inference_mode turns them off)"
    if any(type(t) not in tracing.PLAIN for t in tensors):
        return "the weight is not a plain tensor, so its changes are not counted"
    return None


def invariant_obstacle(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Tells why these operands have no batch-invariant product, or returns None.

    Only the C++ kernel's product is: oneDNN and F.linear choose their code by the number of rows.
    """
    return _tensors_obstacle(x, weight, others) or product_obstacle(x.dtype, weight.shape[1])


def product_obstacle(dtype: torch.dtype, k_size: int) -> str | None:
    """Tells why a weight (M, k_size) of this dtype has no such product on this processor, or returns None."""
    if not cpu.multiplies(dtype):
        obstacle = f"the C++ kernels ({cpu.instructions()}) do not multiply {dtype} on this processor"
        return cpu.obstacle() or obstacle
    odd = dtype == torch.bfloat16 and k_size % 2
    return f"the C++ kernels multiply bfloat16 in pairs, and there are {k_size} features" if odd else None


def packing_obstacle(dtype: torch.dtype) -> str | None:
    """Tells why no weight of this dtype is packed on this processor, or returns None."""
    return None if _native(dtype) else onednn.packing_obstacle(dtype)


def kernel(dtype: torch.dtype, batch_invariant: bool = False) -> str | None:
    """Returns the name of the code that multiplies by packed weights of this dtype, or None."""
    if batch_invariant or _native(dtype):
        return f"fastbert_kernels.cpu, {cpu.instructions()}, weights packed"
    return None if onednn.packing_obstacle(dtype) else "torch.ops.mkldnn._linear_pointwise, weights packed"


def _native(dtype: torch.dtype) -> bool:
    return cpu.multiplies(dtype) and not (dtype == torch.bfloat16 and cpu.has_amx())


def rows_for(n_rows: int, dtype: torch.dtype) -> int:
    """Returns the number of rows to compute for n_rows, padded if oneDNN compiles a program for each number of rows."""
    return n_rows if _native(dtype) or n_rows < LEAST_ROWS else onednn.rows_for(n_rows)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
    keep: bool = True,
) -> torch.Tensor:
    """Multiplies: (T, K), (M, K), (M,) -> (T, M) in x's dtype.

    activation: one of ACTIVATIONS, "none" with a residual (T, M).

    batch_invariant: run the C++ kernel, for operands without an `invariant_obstacle`. keep: keep the packed weight.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    if batch_invariant or (_native(x.dtype) and (x.dtype == torch.float32 or x.shape[1] % 2 == 0)):
        packed = packed_by_kernel(weight) if keep else cpu.pack_weight(weight.detach())
        bias = bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
        return cpu.linear_forward(x, packed, weight.shape[0], bias, activation, residual)
    longest = onednn.PIECE if activation == "none" else onednn.PIECE_BEFORE_GELU
    return onednn.linear(x, _kept(weight, longest, lambda w: onednn.pack(w, longest)), bias, activation, residual)


def packed_by_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Returns the weight as `fastbert_kernels.cpu` reads it, kept until it changes if its changes are counted."""
    if weight.is_inference():
        return cpu.pack_weight(weight)
    return _kept(weight, "cpu", cpu.pack_weight)


def forget(weights: Iterable[torch.Tensor]) -> None:
    """Drops the packed copies of weights that may have been written through `.data`. No counter shows such writes."""
    for weight in weights:
        _packed.pop(weight, None)


on_rewrite(forget)


def _kept(weight: torch.Tensor, layout: Any, pack: Any) -> Any:
    state = weight.data_ptr(), weight._version, weight.dtype, weight.shape, layout
    kept = _packed.get(weight)
    if kept is not None and kept[0] == state and kept[1].none_since([weight]):
        return kept[3]
    with torch.inference_mode(False), torch.no_grad():
        alias, writes = weight.detach(), Writes([weight])
        packed = pack(alias)
        _packed[weight] = state, writes, alias, packed
    return packed
