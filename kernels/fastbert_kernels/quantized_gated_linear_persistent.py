"""This kernel is the persistent form of quantized_gated_linear.py, on tensor descriptors.

    out = quantised(activation(x @ up^T + up_bias) * (x @ gate^T + gate_bias)),    weight = [up above gate]

Operands, results, scales, FLOPs and bytes are those of quantized_gated_linear.py, and so is the order of a row's sums:
with the same BLOCK_K both kernels give the same bits. The rest is as in quantized_linear_persistent.py. Its wide tile
has two parts of 128 columns that are multiplied in turn. Here the parts are columns of up, and the same columns of
gate. A tile's result has 128 columns, one group of scales. K and I are multiples of 16.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import descriptor
from fastbert_kernels.linear_tile import tile_of
from fastbert_kernels.quantize import quantize_rows
from fastbert_kernels.quantized_linear_persistent import multiply_add
from fastbert_kernels.quantized_tile import gate, scaled_epilogue


@jit(do_not_specialize=["n_rows"])
def _quantized_gated_linear_persistent_kernel(
    x_desc,  # (T, K) in blocks of (BLOCK_ROWS, BLOCK_K)
    x_scale_ptr,  # (T,)
    weight_desc,  # (2 I, K) in blocks of (BLOCK_COLS, BLOCK_K)
    weight_scale_ptr,  # (2 I,)
    bias_ptr,  # (2 I,)
    out_desc,  # (T, I) in blocks of (BLOCK_ROWS, BLOCK_COLS)
    out_scale_ptr,  # (T, ceil(I / BLOCK_COLS))
    n_rows,
    n_cols,  # I
    k_size,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    SUM_OUTSIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=True):
        row_block, col_block = tile_of(tile, n_row_blocks, n_col_blocks, GROUP_ROWS)
        row, col = row_block * BLOCK_ROWS, col_block * BLOCK_COLS
        x_rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), n_rows - 1).to(tl.int64)
        next_scale = tl.load(x_scale_ptr + x_rows)
        row_scale = next_scale
        up_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=SUMS)
        gate_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=SUMS)
        for k_block in range(n_k_blocks):
            x = x_desc.load([row, k_block * BLOCK_K])
            up = weight_desc.load([col, k_block * BLOCK_K])
            gates = weight_desc.load([n_cols + col, k_block * BLOCK_K])
            if SUM_OUTSIDE:  # Loaded anew: kept over the loop, it makes the registers spill (offline report).
                row_scale = next_scale
                next_scale = tl.load(x_scale_ptr + x_rows)
            up_sums = multiply_add(up_sums, x, up, row_scale, INT8, SUM_OUTSIDE)
            gate_sums = multiply_add(gate_sums, x, gates, row_scale, INT8, SUM_OUTSIDE)

        col_offs = col + tl.arange(0, BLOCK_COLS)
        first = scaled_epilogue(
            up_sums, row_scale, weight_scale_ptr, bias_ptr, col_offs, n_cols, not SUM_OUTSIDE, HAS_BIAS, "none",
            out_desc.dtype,
        )  # fmt: skip
        second = scaled_epilogue(
            gate_sums, row_scale, weight_scale_ptr + n_cols, bias_ptr + n_cols if HAS_BIAS else bias_ptr, col_offs,
            n_cols, not SUM_OUTSIDE, HAS_BIAS, "none", out_desc.dtype,
        )  # fmt: skip
        q, scale = quantize_rows(gate(first, second, ACTIVATION, out_desc.dtype), INT8)
        out_desc.store([row, col], q)
        row_offs = row + tl.arange(0, BLOCK_ROWS)
        out_scale_ptrs = out_scale_ptr + row_offs.to(tl.int64) * n_col_blocks + col_block
        tl.store(out_scale_ptrs, scale, mask=row_offs < n_rows)


def quantized_gated_linear_persistent_forward(
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
    """Fills out, (T, I) with T > 0, and out_scale. x, weight and out must be describable; config is the tile."""
    n_rows, k_size = x.shape
    n_cols = weight.shape[0] // 2
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    launch.run(
        _quantized_gated_linear_persistent_kernel,
        (min(n_tiles, launch.n_multiprocessors(x.device)),),
        config,
        x_desc=descriptor(x, config["BLOCK_ROWS"], config["BLOCK_K"]),
        x_scale_ptr=x_scale,
        weight_desc=descriptor(weight, config["BLOCK_COLS"], config["BLOCK_K"]),
        weight_scale_ptr=weight_scale,
        bias_ptr=bias,
        out_desc=descriptor(out, config["BLOCK_ROWS"], config["BLOCK_COLS"]),
        out_scale_ptr=out_scale,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        INT8=x.dtype == torch.int8,
        SUM_OUTSIDE=sum_outside,
    )
