"""This kernel is the persistent form of quantized_linear.py, on tensor descriptors.

    out = activation((x * x_scale) @ (weight * weight_scale)^T + bias)

Operands, results, scales, FLOPs and bytes are those of quantized_linear.py, and so is the order of a row's sums: with
the same BLOCK_K both kernels give the same bits. As in linear_persistent.py, the tensor memory accelerator loads and
stores tiles, one program per multiprocessor computes tile after tile, and the next tile is loaded during the epilogue.
Rows must be multiples of 16 bytes, and a group of columns that share a scale must be a whole number of steps of K.
Otherwise the other kernel runs.

If sums are added up outside of the tensor cores, a thread holds the tile's sums and the product of one step. For a tile
of 128 x 256 this takes all of its registers. At the full rate of Hopper's tensor cores, such a tile reads 48 bytes a
clock from L2, and a tile of 128 x 128 reads 64. So the large tile is computed in two parts of PART_COLS columns with
one product at a time, and the first part's product is partly added while the tensor cores compute the second:

    tensor cores    x @ weight[0]^T | x @ weight[1]^T | next step ...
    sums                            | part 0          | part 1 ...

Row scales are loaded one step ahead of their use, with the operands of that step.

Source: Triton's tutorial "Persistent matmul" (the technique); DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024,
arXiv:2412.19437, section 3.3 (sums of one part while the other is multiplied).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import descriptor
from fastbert_kernels.linear_tile import tile_of
from fastbert_kernels.quantize import quantize_rows
from fastbert_kernels.quantized_tile import OUT_GROUP, scaled_epilogue


@jit
def multiply_add(sums, x, weight, row_scale, INT8: tl.constexpr, SCALED: tl.constexpr):
    """sums + x @ weight^T, times the rows' scales where SCALED: then the sum is made outside of the tensor cores."""
    if SCALED:
        product = tl.dot(x, weight.T, out_dtype=tl.int32 if INT8 else tl.float32)
        return sums + product.to(tl.float32) * row_scale[:, None]
    else:
        return tl.dot(x, weight.T, sums, out_dtype=sums.dtype)


@jit
def store(
    sums,  # (BLOCK_ROWS, PART_COLS)
    row_scale,  # (BLOCK_ROWS,), of sums that are not scaled yet
    weight_scale_ptr,
    bias_ptr,
    out_desc,
    out_scale_ptr,
    row,
    col,
    n_rows,
    n_cols,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PART_COLS: tl.constexpr,
):
    """The epilogue of the part of a tile that begins at (row, col)."""
    col_offs = col + tl.arange(0, PART_COLS)
    out = scaled_epilogue(
        sums, row_scale, weight_scale_ptr, bias_ptr, col_offs, n_cols, not SCALED, HAS_BIAS, ACTIVATION, out_desc.dtype
    )
    if QUANTIZE:
        q, scale = quantize_rows(out, INT8)
        out_desc.store([row, col], q)
        row_offs = row + tl.arange(0, BLOCK_ROWS)
        out_scale_ptrs = out_scale_ptr + row_offs.to(tl.int64) * tl.cdiv(n_cols, PART_COLS) + col // PART_COLS
        # A tile's second part may lie past the end, where the next row's scale would be overwritten.
        tl.store(out_scale_ptrs, scale, mask=(row_offs < n_rows) & (col < n_cols))
    else:
        out_desc.store([row, col], out.to(out_desc.dtype))


@jit(do_not_specialize=["n_rows", "n_groups"])
def _quantized_linear_persistent_kernel(
    x_desc,  # (T, K) in blocks of (BLOCK_ROWS, BLOCK_K)
    x_scale_ptr,  # (T, n_groups)
    weight_desc,  # (M, K) in blocks of (PART_COLS, BLOCK_K)
    weight_scale_ptr,  # (M,)
    bias_ptr,  # (M,)
    out_desc,  # (T, M) in blocks of (BLOCK_ROWS, PART_COLS)
    out_scale_ptr,  # (T, ceil(M / PART_COLS)) where QUANTIZE
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
    PART_COLS: tl.constexpr,  # BLOCK_COLS or half of it
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    FLATTEN: tl.constexpr = True,
    PROGRAMS: tl.constexpr = 1,  # a multiprocessor; the grid has them
):
    SUMS: tl.constexpr = tl.int32 if INT8 and not SCALED else tl.float32
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=FLATTEN):
        row_block, col_block = tile_of(tile, n_row_blocks, n_col_blocks, GROUP_ROWS)
        row, col = row_block * BLOCK_ROWS, col_block * BLOCK_COLS
        x_rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), n_rows - 1).to(tl.int64)
        x_scale_ptrs = x_scale_ptr + x_rows * n_groups
        next_scale = tl.load(x_scale_ptrs)
        row_scale = next_scale
        sums = tl.zeros((BLOCK_ROWS, PART_COLS), dtype=SUMS)
        if BLOCK_COLS > PART_COLS:
            more_sums = tl.zeros((BLOCK_ROWS, PART_COLS), dtype=SUMS)
        for k_block in range(n_k_blocks):
            x = x_desc.load([row, k_block * BLOCK_K])
            weight = weight_desc.load([col, k_block * BLOCK_K])
            if BLOCK_COLS > PART_COLS:
                more_weight = weight_desc.load([col + PART_COLS, k_block * BLOCK_K])
            if SCALED:
                # Of rows with one scale it is always the same, and loaded all the same: kept over the loop, it makes
                # the wide tile's registers spill (offline report).
                row_scale = next_scale
                group = tl.minimum((k_block + 1) // STEPS, n_groups - 1) if STEPS > 0 else 0
                next_scale = tl.load(x_scale_ptrs + group)
            sums = multiply_add(sums, x, weight, row_scale, INT8, SCALED)
            if BLOCK_COLS > PART_COLS:
                more_sums = multiply_add(more_sums, x, more_weight, row_scale, INT8, SCALED)

        store(
            sums, row_scale, weight_scale_ptr, bias_ptr, out_desc, out_scale_ptr, row, col, n_rows, n_cols, SCALED,
            HAS_BIAS, ACTIVATION, INT8, QUANTIZE, BLOCK_ROWS, PART_COLS,
        )  # fmt: skip
        if BLOCK_COLS > PART_COLS:
            store(
                more_sums, row_scale, weight_scale_ptr, bias_ptr, out_desc, out_scale_ptr, row, col + PART_COLS, n_rows,
                n_cols, SCALED, HAS_BIAS, ACTIVATION, INT8, QUANTIZE, BLOCK_ROWS, PART_COLS,
            )  # fmt: skip


def quantized_linear_persistent_forward(
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

    sum_outside: whether sums of products leave the tensor cores at every step, even if a row has one scale.
    """
    n_rows, k_size = x.shape
    n_cols = weight.shape[0]
    part_cols = min(config["BLOCK_COLS"], OUT_GROUP)
    grouped = group < k_size
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    launch.run(
        _quantized_linear_persistent_kernel,
        (min(n_tiles, config.get("PROGRAMS", 1) * launch.n_multiprocessors(x.device)),),
        config,
        x_desc=descriptor(x, config["BLOCK_ROWS"], config["BLOCK_K"]),
        x_scale_ptr=x_scale,
        weight_desc=descriptor(weight, part_cols, config["BLOCK_K"]),
        weight_scale_ptr=weight_scale,
        bias_ptr=bias,
        out_desc=descriptor(out, config["BLOCK_ROWS"], part_cols),
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
        PART_COLS=part_cols,
    )
    return out
