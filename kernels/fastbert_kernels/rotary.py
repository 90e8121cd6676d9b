"""This kernel rotates queries and keys by their positions, in place or into a copy, and rotates gradients back.

    out[i]         = first * cos - second * sin,    first = x[i], second = x[i + D / 2], i < D / 2
    out[i + D / 2] = second * cos + first * sin

qkv, out: (T, 3, N, D), fp32 / bf16 / fp16, D even; cos, sin: (T, D / 2) float32. Arithmetic in float32, one rounding.
Values do not change. The gradient is rotated by the negative angle, because the rotation's transpose is its inverse.
Bytes moved: 4 * T * N * D elements in place, 6 into a copy, and the tables. A row's bits do not depend on the batch: no
number depends on another row.

Source: Su et al., "RoFormer", 2021, arXiv:2104.09864; pairs are formed from the two halves of a head, as in GPT-NeoX.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit


@jit(do_not_specialize=["n_rows"])
def _rotary_kernel(
    x_ptr,  # (T, P, N, D): P = 2 of q and k where it is done in place, else 3
    out_ptr,
    cos_ptr,  # (T, D / 2)
    sin_ptr,  # (T, D / 2)
    n_rows,
    x_row_stride,
    out_row_stride,
    N_TURNED: tl.constexpr,  # heads of q and k, 2 N
    N_HEADS: tl.constexpr,  # N_TURNED, or 3 N, whose last ones are copied
    HALF: tl.constexpr,  # D / 2
    BACK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    offs = tl.arange(0, BLOCK_HALF)
    table_mask = (rows < n_rows)[:, None] & (offs < HALF)[None, :]
    table_offs = rows[:, None] * HALF + offs[None, :]
    cos = tl.load(cos_ptr + table_offs, mask=table_mask, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + table_offs, mask=table_mask, other=0.0)[:, None, :]
    if BACK:
        sin = -sin

    mask = table_mask[:, None, :] & (heads < N_HEADS)[None, :, None]
    in_row = heads[None, :, None] * (2 * HALF) + offs[None, None, :]
    x_ptrs = x_ptr + rows[:, None, None] * x_row_stride + in_row
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_ROWS, BLOCK_HEADS, BLOCK_HALF)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    if N_HEADS != N_TURNED:
        is_turned = (heads < N_TURNED)[None, :, None]
        turned_first = tl.where(is_turned, turned_first, first)
        turned_second = tl.where(is_turned, turned_second, second)
    out_ptrs = out_ptr + rows[:, None, None] * out_row_stride + in_row
    tl.store(out_ptrs, turned_first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, turned_second.to(out_ptr.dtype.element_ty), mask=mask)


def rotary_forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, in_place: bool = False
) -> torch.Tensor:
    """Rotates queries and keys of (T, 3 * N * D), laid out [q | k | v]. cos, sin: (T, D / 2) float32, contiguous.

    qkv needs unit stride along its rows. in_place: whether the result overwrites q and k, and qkv is returned.
    """
    return _rotate(qkv, cos, sin, num_heads, in_place, False)


def rotary_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotates the gradient of `rotary_forward`'s result back, in place, and returns it."""
    return _rotate(grad, cos, sin, num_heads, True, True)


def _rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, in_place: bool, back: bool
) -> torch.Tensor:
    n_rows, half = cos.shape
    out = qkv if in_place else launch.empty(tuple(qkv.shape), like=qkv)
    if n_rows == 0:
        return out
    n_heads = (2 if in_place else 3) * num_heads
    config = configs.rotary_config(half, n_heads)
    # Grid: tiles of BLOCK_ROWS rows x BLOCK_HEADS heads; rows on axis 0, whose limit is 2^31 - 1 programs.
    grid, facts = (launch.cdiv(n_rows, config["BLOCK_ROWS"]), launch.cdiv(n_heads, config["BLOCK_HEADS"])), None
    if n_rows > 1 and (dtypes := launch.alike(qkv, out, cos, sin)):
        facts = dtypes, num_heads, half, in_place, back
        if launch.again(_rotary_kernel, grid, config, facts, qkv, out, cos, sin, n_rows):
            return out
    launch.run_first(
        _rotary_kernel,
        grid,
        config,
        facts,
        5,
        x_ptr=qkv,
        out_ptr=out,
        cos_ptr=cos,
        sin_ptr=sin,
        n_rows=n_rows,
        x_row_stride=qkv.stride(0),
        out_row_stride=out.stride(0),
        N_TURNED=2 * num_heads,
        N_HEADS=n_heads,
        HALF=half,
        BACK=back,
    )
    return out
