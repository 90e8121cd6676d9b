"""This kernel is the persistent form of gated_linear.py, on tensor descriptors, for compute capability 9.0 on.

    out = activation(x @ first^T + first_bias) * (x @ second^T + second_bias),    weight = [first above second]

x: (T, K), weight: (2 I, K), bias: (2 I,), out: (T, I), bf16 or fp16, float32 accumulator, one rounding. FLOPs and bytes
are those of gated_linear.py. Programs, loops and the order of tiles are those of linear_persistent.py. The tensor
memory accelerator requires that K and I are multiples of 8.

The weight's descriptor has three dimensions, (2, I, K). One copy loads both halves of a tile, (2, BLOCK_COLS / 2,
BLOCK_K). In shared memory they are the rows of one operand. So a step of K is one product of BLOCK_COLS columns, and
not two narrow ones that would each read x again. In the accumulator the factors of an output are in one thread.

A row's bits do not depend on the batch, for the reasons in linear.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels import dependent, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.gated_tile import gated_epilogue
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import descriptor
from fastbert_kernels.linear_tile import tile_of


@jit(do_not_specialize=["n_rows"])
def _gated_linear_persistent_kernel(
    x_desc,  # (T, K) in blocks of (BLOCK_ROWS, BLOCK_K)
    weight_desc,  # (2, I, K) in blocks of (2, BLOCK_COLS / 2, BLOCK_K)
    bias_ptr,  # (2 I,)
    out_desc,  # (T, I) in blocks of (BLOCK_ROWS, BLOCK_COLS / 2)
    n_rows,
    n_cols,  # I
    k_size,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # of the product; a tile of the output has half as many
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    FLATTEN: tl.constexpr = True,
    PROGRAMS: tl.constexpr = 1,  # a multiprocessor; the grid has them
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    OUT_COLS: tl.constexpr = BLOCK_COLS // 2
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, OUT_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=FLATTEN):
        row_block, col_block = tile_of(tile, n_row_blocks, n_col_blocks, GROUP_ROWS)
        row, col = row_block * BLOCK_ROWS, col_block * OUT_COLS
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        for k_block in range(n_k_blocks):
            x = x_desc.load([row, k_block * BLOCK_K])
            both = weight_desc.load([0, col, k_block * BLOCK_K])
            acc = tl.dot(x, tl.reshape(both, (BLOCK_COLS, BLOCK_K)).T, acc)

        col_offs = col + tl.arange(0, OUT_COLS)
        out = gated_epilogue(acc, bias_ptr, col_offs, n_cols, HAS_BIAS, ACTIVATION, False, out_desc.dtype)
        out_desc.store([row, col], out.to(out_desc.dtype))


def _descriptor_of_halves(weight: torch.Tensor, block_cols: int, block_k: int) -> TensorDescriptor:
    """Makes the descriptor of a `describable` weight, (2 I, K), as (2, I, K) in blocks of both halves."""
    made = descriptor(weight, 2, block_cols // 2)
    (n_rows, k_size), row_stride = weight.shape, weight.stride(0)
    made.shape, made.strides = (2, n_rows // 2, k_size), (n_rows // 2 * row_stride, row_stride, 1)
    made.block_shape = [2, block_cols // 2, block_k]
    return made


def gated_linear_persistent_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    config: dict[str, int],
    out: torch.Tensor,
    dtypes: tuple[Any, ...] | None = None,
) -> torch.Tensor:
    """Fills out, (T, I) with T > 0. x, weight and out must be describable; config is the tile of the product.

    dtypes: the result of `launch.alike` for x, weight, bias and out, if the caller has it.
    """
    n_rows, k_size = x.shape
    n_cols = out.shape[1]
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"] // 2)
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    grid = (min(n_tiles, config.get("PROGRAMS", 1) * launch.n_multiprocessors(x.device)),)
    x_desc = descriptor(x, config["BLOCK_ROWS"], config["BLOCK_K"])
    weight_desc = _descriptor_of_halves(weight, config["BLOCK_COLS"], config["BLOCK_K"])
    out_desc = descriptor(out, config["BLOCK_ROWS"], config["BLOCK_COLS"] // 2)
    kernel, facts = _gated_linear_persistent_kernel, None
    if dtypes is not None and n_rows > 1:
        facts = dtypes, k_size, n_cols, activation
        if launch.again(kernel, grid, config, facts, x_desc, weight_desc, bias, out_desc, n_rows):
            return out
    launch.run_first(
        kernel,
        grid,
        config,
        facts,
        5,
        x_desc=x_desc,
        weight_desc=weight_desc,
        bias_ptr=bias,
        out_desc=out_desc,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
    )
    return out
