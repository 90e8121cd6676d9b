"""Gradients are right where an operation reads a part of wider rows, as queries and keys are of one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import Policy, packing
from fastbert_kernels import cpu
from helpers import rms_error

N_TOKENS, SIZE = 7, 32
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))), "triton",
]  # fmt: skip
Operation = Callable[[Tensor, dict[str, Tensor], Any], Tensor]


def _norm(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.bias_residual_layer_norm(x, None, None, p["norm"], p["bias"], 1e-5, **settings)


def _norm_of_sum(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.bias_residual_layer_norm(x, p["bias"], x, p["norm"], p["bias"], 1e-5, **settings)


def _queries_and_keys(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    norm = p["norm"][:8], p["bias"][:8], 1e-5
    return ops.norm_queries_and_keys(x[:, :24], norm, norm, **settings)


def _linear(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.linear(x, p["weight"], p["wide"], "gelu", **settings)


def _linear_norm(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    square = p["weight"][:SIZE]
    return ops.linear_residual_layer_norm(x, square, p["bias"], x, p["norm"], p["bias"], 1e-5, **settings)


def _gated(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.gated(x, "gelu", **settings)


def _gelu(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.bias_gelu(x, p["bias"], "gelu", **settings)


def _attention(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    wide = torch.cat([x, x.flip(1), -x], 1)
    return ops.varlen_attention(wide[:, : 3 * SIZE], packing.from_lengths([3, 4], x.device), 2, **settings)


def _pooling(x: Tensor, p: dict[str, Tensor], settings: Any) -> Tensor:
    return ops.pool(x, packing.from_lengths([3, 4], x.device).cu_seqlens, "mean", **settings)


OPERATIONS: dict[str, Operation] = {
    "norm": _norm, "norm of sum": _norm_of_sum, "queries and keys": _queries_and_keys, "linear": _linear,
    "linear and norm": _linear_norm, "gate": _gated, "gelu": _gelu, "attention": _attention, "pooling": _pooling,
}  # fmt: skip


def gradients(run: Operation, backend: str, dtype: torch.dtype, device: Any) -> list[Tensor]:
    """The output, and the gradients of the wider rows and of the parameters that are read."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (N_TOKENS, 3 * SIZE), "weight": (48, SIZE), "wide": (48,), "norm": (SIZE,), "bias": (SIZE,)}
    p = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    out = run(p["rows"][:, SIZE : 2 * SIZE], p, {"policy": Policy(backend)})
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype, device=device).view(out.shape)).sum().backward()
    return [out.detach().cpu().double(), *(t.grad.cpu().double() for t in p.values() if t.grad is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_a_part_of_rows(name: str, backend: str, device: torch.device) -> None:
    """Catches a backward pass that takes saved rows for contiguous ones."""
    where = device if backend == "triton" else "cpu"
    ours = gradients(OPERATIONS[name], backend, torch.float32, where)
    exact = gradients(OPERATIONS[name], "torch", torch.float64, "cpu")
    assert len(ours) == len(exact)
    for mine, expected in zip(ours, exact, strict=True):
        assert rms_error(mine, expected) < 2e-6
