"""This kernel is the 8-bit layer with warps that only load and warps that only multiply, for compute capability 9.0.

    out = activation((x * x_scale) @ (weight * weight_scale)^T + bias)

Operands, results, scales, FLOPs, bytes and the order of sums are those of quantized_linear_persistent.py with a tile of
one part: with the same BLOCK_K the sums are the same. linear_specialized.py describes the split of the warps and the
descriptors made on the device. This kernel, too, is only a candidate of `fastbert tune`, and has not run on a GPU yet.

Source: Triton's tutorial "Persistent matmul" (descriptors made on the device, warp specialisation).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch, scratch
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_tile import tile_of
from fastbert_kernels.quantized_linear_persistent import multiply_add, store
from fastbert_kernels.quantized_tile import OUT_GROUP


@jit(do_not_specialize=["n_rows", "n_groups"])
def _quantized_linear_specialized_kernel(
    x_ptr,  # (T, K)
    x_scale_ptr,  # (T, n_groups)
    weight_ptr,  # (M, K)
    weight_scale_ptr,  # (M,)
    bias_ptr,  # (M,)
    out_ptr,  # (T, M)
    out_scale_ptr,  # (T, ceil(M / BLOCK_COLS)) where QUANTIZE
    n_rows,
    n_cols,
    k_size,
    n_groups,
    STEPS: tl.constexpr,  # of BLOCK_K in a group; 0 where a row has one scale
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    SCALED: tl.constexpr,  # whether sums are scaled step by step, and added outside of the tensor cores
    QUANTIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [n_rows, k_size], [k_size, 1], [BLOCK_ROWS, BLOCK_K])
    weight_desc = tl.make_tensor_descriptor(weight_ptr, [n_cols, k_size], [k_size, 1], [BLOCK_COLS, BLOCK_K])
    out_desc = tl.make_tensor_descriptor(out_ptr, [n_rows, n_cols], [n_cols, 1], [BLOCK_ROWS, BLOCK_COLS])
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=False, warp_specialize=True
    ):
        row_block, col_block = tile_of(tile, n_row_blocks, n_col_blocks, GROUP_ROWS)
        row, col = row_block * BLOCK_ROWS, col_block * BLOCK_COLS
        x_rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), n_rows - 1).to(tl.int64)
        x_scale_ptrs = x_scale_ptr + x_rows * n_groups
        row_scale = tl.load(x_scale_ptrs)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32 if INT8 and not SCALED else tl.float32)
        for k_block in range(n_k_blocks):
            x = x_desc.load([row, k_block * BLOCK_K])
            weight = weight_desc.load([col, k_block * BLOCK_K])
            if STEPS > 0:
                row_scale = tl.load(x_scale_ptrs + k_block // STEPS)
            sums = multiply_add(sums, x, weight, row_scale, INT8, SCALED)
        store(
            sums, row_scale, weight_scale_ptr, bias_ptr, out_desc, out_scale_ptr, row, col, n_rows, n_cols, SCALED,
            HAS_BIAS, ACTIVATION, INT8, QUANTIZE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip


def quantized_linear_specialized_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    group: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    config: dict[str, int],
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    sum_outside: bool,
) -> torch.Tensor:
    """Fills out, (T, M) with T > 0, and out_scale. x, weight and out must be describable; config is the tile.

    BLOCK_COLS is at most OUT_GROUP. sum_outside: whether sums of products leave the tensor cores at every step, even if
    a row has one scale.
    """
    n_rows, k_size = x.shape
    n_cols = weight.shape[0]
    if config["BLOCK_COLS"] > OUT_GROUP:
        raise ValueError(f"BLOCK_COLS: expected at most {OUT_GROUP}, got {config['BLOCK_COLS']}")
    grouped = group < k_size
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    scratch.provide()
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    launch.run(
        _quantized_linear_specialized_kernel,
        (min(n_tiles, launch.n_multiprocessors(x.device)),),
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
        k_size=k_size,
        n_groups=x_scale.shape[1],
        STEPS=group // config["BLOCK_K"] if grouped else 0,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        INT8=x.dtype == torch.int8,
        SCALED=grouped or sum_outside,
        QUANTIZE=out_scale is not None,
    )
    return out
