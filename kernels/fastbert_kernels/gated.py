"""This module has two kernels: for a gated activation in one pass, and for its gradient.

    out = activation(first) * second,    x = [first | second]
    d_first = grad * second * activation'(first),    d_second = grad * activation(first)
    silu:  x * s,    silu'(x) = s + x s (1 - s),    s = sigmoid(x); the others are those of gelu.py

x, d_x: (T, 2 I); out, grad: (T, I); fp32 / bf16 / fp16. Arithmetic in float32, one rounding. Bytes moved: 3 * T * I
elements. The backward pass computes the activation again, and moves 5 * T * I elements, or 6 * T * I if it also writes
out again. All is elementwise, so a row's bits do not depend on the batch.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.gelu import activate, activate_with_slope
from fastbert_kernels.jit import jit

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@jit
def activate_gate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation, elementwise on float32. DTYPE: of what it is rounded to."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = activate(x, ACTIVATION, DTYPE)
    return y


@jit
def _activate_with_slope(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Returns (activation(x), its derivative at x), elementwise, in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = x * s
        slope = s + y * (1.0 - s)
    else:
        y, slope = activate_with_slope(x, ACTIVATION, DTYPE)
    return y, slope


@jit(do_not_specialize=["n_rows"])
def _gated_kernel(
    x_ptr,  # (T, 2 I)
    out_ptr,  # (T, I)
    n_rows,
    n_cols,  # I
    x_row_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]

    x_ptrs = x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :]
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + n_cols, mask=mask, other=0.0).to(tl.float32)
    out = activate_gate(first, ACTIVATION, out_ptr.dtype.element_ty) * second
    out_offs = row_offs[:, None] * n_cols + col_offs[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_rows"])
def _gated_backward_kernel(
    grad_ptr,  # (T, I)
    x_ptr,  # (T, 2 I)
    d_x_ptr,  # (T, 2 I)
    out_ptr,  # (T, I), or None
    n_rows,
    n_cols,  # I
    grad_row_stride,
    x_row_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]

    grad_offs = row_offs[:, None] * grad_row_stride + col_offs[None, :]
    grad = tl.load(grad_ptr + grad_offs, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :]
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + n_cols, mask=mask, other=0.0).to(tl.float32)
    y, slope = _activate_with_slope(first, ACTIVATION, d_x_ptr.dtype.element_ty)
    d_x_ptrs = d_x_ptr + row_offs[:, None] * (2 * n_cols) + col_offs[None, :]
    tl.store(d_x_ptrs, (grad * second * slope).to(d_x_ptr.dtype.element_ty), mask=mask)
    tl.store(d_x_ptrs + n_cols, (grad * y).to(d_x_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        out_offs = row_offs[:, None] * n_cols + col_offs[None, :]
        tl.store(out_ptr + out_offs, (y * second).to(out_ptr.dtype.element_ty), mask=mask)


def gated_forward(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Computes (T, 2 I) -> (T, I) in x's dtype. x needs unit stride along its rows. activation: of ACTIVATIONS."""
    n_rows, n_cols = x.shape[0], x.shape[1] // 2
    out = launch.empty((n_rows, n_cols), like=x)
    if n_rows == 0:
        return out
    config = configs.gated_config(n_cols)
    # Grid: tiles of BLOCK_ROWS x BLOCK_COLS; rows on axis 0, whose limit is 2^31 - 1 programs.
    grid, facts = (launch.cdiv(n_rows, config["BLOCK_ROWS"]), launch.cdiv(n_cols, config["BLOCK_COLS"])), None
    if n_rows > 1 and (dtypes := launch.alike(x, out)):
        facts = dtypes, n_cols, activation
        if launch.again(_gated_kernel, grid, config, facts, x, out, n_rows):
            return out
    launch.run_first(
        _gated_kernel,
        grid,
        config,
        facts,
        3,
        x_ptr=x,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        x_row_stride=x.stride(0),
        ACTIVATION=activation,
    )
    return out


def gated_backward(
    grad: torch.Tensor, x: torch.Tensor, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the gradient of x, (T, 2 I), from grad, that of `gated_forward`'s result, (T, I) in x's dtype.

    Both need unit stride along their rows. out: a contiguous buffer like grad, in which the result is computed again.
    """
    n_rows, n_cols = grad.shape
    d_x = launch.empty((n_rows, 2 * n_cols), like=x)
    if n_rows == 0:
        return d_x
    config = configs.gated_config(n_cols)
    # Grid: as in the forward pass.
    launch.run(
        _gated_backward_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]), launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        grad_ptr=grad,
        x_ptr=x,
        d_x_ptr=d_x,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        grad_row_stride=grad.stride(0),
        x_row_stride=x.stride(0),
        ACTIVATION=activation,
    )
    return d_x
