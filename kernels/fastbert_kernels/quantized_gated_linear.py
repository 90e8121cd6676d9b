"""This kernel is the gated half of a feed-forward layer on 8-bit operands: two products, a gate and quantised rows.

    out = quantised(activation(x @ up^T + up_bias) * (x @ gate^T + gate_bias)),    weight = [up above gate]

x: (T, K), float8_e4m3fn or int8, with one scale for each row, (T, 1) float32. weight: (2 I, K) of the same dtype, with
one scale for each output channel. bias: (2 I,) or None. out: (T, I) in x's dtype with scales (T, ceil(I / 128)), one
for each row and group of 128 columns. activation: of ACTIVATIONS. A program holds both products of a tile; neither is
rounded or stored.

Sums, and the place where they are added up, are those of quantized_linear.py. FLOPs: 4 * T * I * K; bytes: T * K + 2 *
I * K + T * I at least. Separate kernels, a linear to 16 bits and a gate that quantises, move T * I * 8 bytes more.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202; the rest as in quantized_linear.py.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import describable
from fastbert_kernels.linear_tile import tile_of
from fastbert_kernels.quantize import quantize_rows
from fastbert_kernels.quantized_configs import quantized_gated_config, quantized_gated_gemm
from fastbert_kernels.quantized_gated_linear_persistent import quantized_gated_linear_persistent_forward
from fastbert_kernels.quantized_linear import sums_outside
from fastbert_kernels.quantized_tile import OUT_GROUP, gate, scaled_epilogue

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@jit(do_not_specialize=["n_rows"])
def _quantized_gated_linear_kernel(
    x_ptr,  # (T, K)
    x_scale_ptr,  # (T,)
    weight_ptr,  # (2 I, K)
    weight_scale_ptr,  # (2 I,)
    bias_ptr,  # (2 I,)
    out_ptr,  # (T, I)
    out_scale_ptr,  # (T, ceil(I / BLOCK_COLS))
    n_rows,
    n_cols,  # I
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    SUM_OUTSIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    row_block, col_block = tile_of(tl.program_id(0), n_row_blocks, n_col_blocks, GROUP_ROWS)
    row_offs = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    k_offs = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row instead: no mask in the loop, and the store drops what they give.
    x_rows = tl.minimum(row_offs, n_rows - 1).to(tl.int64)
    weight_rows = tl.minimum(col_offs, n_cols - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * K + k_offs[None, :]  # (BLOCK_ROWS, BLOCK_K)
    up_ptrs = weight_ptr + weight_rows[None, :] * K + k_offs[:, None]  # (BLOCK_K, BLOCK_COLS)
    gate_ptrs = up_ptrs + n_cols.to(tl.int64) * K

    row_scale = tl.load(x_scale_ptr + x_rows)
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    up_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=SUMS)
    gate_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=SUMS)
    for k_start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            up = tl.load(up_ptrs)
            gates = tl.load(gate_ptrs)
        else:
            k_mask = k_offs < K - k_start
            x = tl.load(x_ptrs, mask=k_mask[None, :], other=0.0)
            up = tl.load(up_ptrs, mask=k_mask[:, None], other=0.0)
            gates = tl.load(gate_ptrs, mask=k_mask[:, None], other=0.0)
        if SUM_OUTSIDE:
            up_sums += tl.dot(x, up).to(tl.float32) * row_scale[:, None]
            gate_sums += tl.dot(x, gates).to(tl.float32) * row_scale[:, None]
        else:
            up_sums = tl.dot(x, up, up_sums, out_dtype=SUMS)
            gate_sums = tl.dot(x, gates, gate_sums, out_dtype=SUMS)
        x_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K

    first = scaled_epilogue(
        up_sums, row_scale, weight_scale_ptr, bias_ptr, col_offs, n_cols, not SUM_OUTSIDE, HAS_BIAS, "none",
        out_ptr.dtype.element_ty,
    )  # fmt: skip
    second = scaled_epilogue(
        gate_sums, row_scale, weight_scale_ptr + n_cols, bias_ptr + n_cols if HAS_BIAS else bias_ptr, col_offs, n_cols,
        not SUM_OUTSIDE, HAS_BIAS, "none", out_ptr.dtype.element_ty,
    )  # fmt: skip
    q, scale = quantize_rows(gate(first, second, ACTIVATION, out_ptr.dtype.element_ty), INT8)
    out_offs = row_offs.to(tl.int64)[:, None] * n_cols + col_offs[None, :]
    tl.store(out_ptr + out_offs, q, mask=(row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :])
    tl.store(out_scale_ptr + row_offs.to(tl.int64) * n_col_blocks + col_block, scale, mask=row_offs < n_rows)


def quantized_gated_linear_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (T, K) with scales (T, 1) to (T, I) in x's dtype with scales (T, ceil(I / OUT_GROUP)).

    weight: (2 I, K) of x's dtype, weight_scale: (2 I,). All tensors are contiguous. It runs the kernel on tensor
    descriptors if the architecture has it and the weight's address allows them.
    """
    n_rows, k = x.shape
    n_cols = weight.shape[0] // 2
    out = launch.empty((n_rows, n_cols), like=x)
    out_scale = launch.empty((n_rows, launch.cdiv(n_cols, OUT_GROUP)), like=x, dtype=torch.float32)
    if n_rows == 0:
        return out, out_scale
    arch = launch.arch(x.device)
    gemm, outside = quantized_gated_gemm(x.dtype, arch, (k, n_cols)), sums_outside(x.dtype, arch)
    forward, config = quantized_gated_linear_persistent_forward, gemm.config
    if gemm.ours == "quantized_gated_linear" or not (describable(weight) and describable(out)):
        forward, config = quantized_gated_linear_pointer_forward, quantized_gated_config(x.dtype, arch, (k, n_cols))
    elif not describable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    forward(x, x_scale, weight, weight_scale, bias, activation, config.block_sizes, out, out_scale, outside)
    return out, out_scale


def quantized_gated_linear_pointer_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    config: dict[str, int],
    out: torch.Tensor,
    out_scale: torch.Tensor,
    sum_outside: bool,
) -> None:
    """Fills out, (T, I) with T > 0, and out_scale, by the kernel of this file; config is the tile."""
    n_rows, k = x.shape
    n_cols = weight.shape[0] // 2
    # Grid: one program per output tile. All are on one axis, so that the kernel can order them.
    launch.run(
        _quantized_gated_linear_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"]),),
        config,
        x_ptr=x,
        x_scale_ptr=x_scale,
        weight_ptr=weight,
        weight_scale_ptr=weight_scale,
        bias_ptr=bias,
        out_ptr=out,
        out_scale_ptr=out_scale,
        n_rows=n_rows,
        n_cols=n_cols,
        K=k,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        INT8=x.dtype == torch.int8,
        SUM_OUTSIDE=sum_outside,
    )
