"""Rotary positions rotate queries and keys by an angle that is proportional to their position."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.library import register
from fastbert_kernels import cpu

KERNELS = {
    "triton": "fastbert_kernels.rotary",
    "cpu": "fastbert_kernels.cpu",
    "torch": "multiply, add, torch.cat",
}


def inverse_frequencies(head_size: int, base: float, factor: float = 1.0) -> Tensor:
    """Returns the angle of rotation of each pair of elements for one position, (D / 2,) float32 on the CPU.

    It is base^(-2i / D), divided by the factor. Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return 1.0 / base**exponents / factor


@functools.cache
def kept(head_size: int, base: float, factor: float, device: torch.device) -> Tensor:
    """Returns `inverse_frequencies` on a device, the same tensor at each call."""
    with torch.inference_mode(False):  # autograd cannot keep inference tensors
        return inverse_frequencies(head_size, base, factor).to(device)


def rotations(position_ids: Tensor, head_size: int, base: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the rows' angles, (T, D / 2) float32 each. position_ids: (T,) integers."""
    if recording.on and recording.is_dry():
        shape = position_ids.shape[0], head_size // 2
        return recording.stand_in(shape, torch.float32), recording.stand_in(shape, torch.float32)
    device = position_ids.device
    if torch.compiler.is_compiling() or tracing.observed() is not None or device.type == "meta":
        frequencies = inverse_frequencies(head_size, base, factor).to(device)
    else:
        frequencies = kept(head_size, base, factor, device)
    return tables_of(position_ids, frequencies)


def tables_of(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the cosines and sines of positions, (T,), times frequencies, (D / 2,): (T, D / 2) float32 each."""
    angles = position_ids[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate_rows(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Does the same as `rotary`, in plain PyTorch."""
    rows = qkv.unflatten(-1, (3, num_heads, -1))  # (T, 3, N, D)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    first, second = rows[:, :2].to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(qkv.dtype), rows[:, 2:]], dim=1).flatten(1)


def _turned_back(
    grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, None, None, None]:
    return torch.ops.fastbert.rotary(grad, cos, -sin, num_heads), None, None, None


def _kernel(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, in_place: bool = False) -> Tensor:
    from fastbert_kernels.rotary import rotary_forward

    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return rotary_forward(qkv, cos.contiguous(), sin.contiguous(), num_heads, in_place)


def _turned_back_by_kernel(
    grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, None, None, None]:
    return torch.ops.fastbert.triton_rotary(grad, cos, -sin, num_heads), None, None, None


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


register(
    "rotary(Tensor qkv, Tensor cos, Tensor sin, int num_heads) -> Tensor",
    kernel=rotate_rows,
    eager=rotate_rows,
    fake=_fake,
    backward=_turned_back,
)
register(
    "triton_rotary(Tensor qkv, Tensor cos, Tensor sin, int num_heads) -> Tensor",
    kernel=_kernel,
    eager=rotate_rows,
    fake=_fake,
    backward=_turned_back_by_kernel,
)


def cpu_obstacle(rows: Tensor) -> str | None:
    """Tells why the cpu backend takes PyTorch's operations on rows and not a C++ kernel, or returns None."""
    if rows.dtype not in (torch.float32, torch.bfloat16):
        return f"there is no C++ kernel for {rows.dtype}"
    return tracing.transformed(rows) or _kernels_obstacle()


@tracing.constant
def _kernels_obstacle() -> str | None:
    return cpu.obstacle()


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *, policy: Policy = AUTO, fresh: bool = False
) -> Tensor:
    """Rotates queries and keys: elements i and i + D / 2 of a head are a pair, rotated by the row's angle i.

    qkv: (T, 3 * N * D), laid out [q | k | v]. cos, sin: (T, D / 2) float32, from `rotations`; they get no gradients.
    Products are in float32 at least. fresh: whether no other code uses qkv, so that the result may overwrite it.
    Returns a tensor like qkv, with unchanged values v. Raises ValueError for wrong shapes, BackendError under a strict
    policy.
    """
    if tracing.has_sizes() and (qkv.dim() != 2 or qkv.shape[1] % (6 * num_heads)):
        raise ValueError(f"qkv: expected shape (T, 3 * N * D), N = {num_heads}, D even, got {tuple(qkv.shape)}")
    expected = qkv.shape[0], qkv.shape[1] // (6 * num_heads)
    for name, table in (("cos", cos), ("sin", sin)):
        if tracing.differ(table.shape, expected):
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(table.shape)}")
    obstacle = dispatch.dtype_obstacle(qkv)
    backend = dispatch.choose("rotary", policy.backend, policy.strict, qkv.device, obstacle)
    obstacle = cpu_obstacle(qkv) if backend == "cpu" else None
    if backend != "triton":
        dispatch.check_invariant("rotary", policy, backend, obstacle)
    if recording.on:
        facts: dict[str, Any] = {"heads": num_heads, "compiled": backend == "cpu" and obstacle is None}
        if recording.note("rotary", backend, qkv.shape, qkv.shape, qkv.dtype, **facts):
            return torch.empty_like(qkv)
    if backend == "triton":
        if fresh and dispatch.direct(qkv) and qkv.stride(-1) == 1:
            return _kernel(qkv, cos, sin, num_heads, in_place=True)
        return torch.ops.fastbert.triton_rotary(qkv, cos, sin, num_heads)
    if backend == "cpu" and obstacle is None and dispatch.direct(qkv):
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        return cpu.rotary_forward(qkv, cos.contiguous(), sin.contiguous(), num_heads)
    if torch.is_grad_enabled() and qkv.requires_grad and tracing.transformed(qkv) is None:
        return torch.ops.fastbert.rotary(qkv, cos, sin, num_heads)  # keeps only angles for the backward pass
    return rotate_rows(qkv, cos, sin, num_heads)
