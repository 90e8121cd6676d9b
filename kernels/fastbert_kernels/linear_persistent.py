"""This kernel is the persistent form of linear.py, on tensor descriptors, for GPUs of compute capability 9.0 on.

    out = activation(x @ weight^T + bias) + residual,    for training also pre = x @ weight^T + bias

x: (T, K), weight: (M, K), bias: (M,), residual and out: (T, M), bf16 or fp16, float32 accumulator, one rounding. FLOPs
and bytes are those of linear.py. The tensor memory accelerator loads and stores tiles. It needs base addresses and row
strides that are multiples of 16 bytes. Past an edge it reads zeros and drops writes, so neither K nor T needs a mask.

One program per multiprocessor computes tile after tile, in the order of linear.py. The two loops are flattened into
one, so that the next tile is loaded during the epilogue of this one:

    program p    tile p | tile p + n_programs | tile p + 2 * n_programs | ...

There are two variants: FLATTEN = 0 keeps the loops apart, which takes fewer registers. With PROGRAMS = 2 a
multiprocessor multiplies one tile during the epilogue of another. The loop is never warp-specialised, because Triton
compiles it wrongly with descriptors from the host. `linear_specialized` makes its own descriptors.

A row's bits do not depend on the batch, for the reasons in linear.py. The sums of a tile do not depend on its program,
or on the tile before it.

Source: Triton's tutorial "Persistent matmul" (the technique).
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels import dependent, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_tile import ALIGNMENT, add_bias, epilogue, tile_of


@jit(do_not_specialize=["n_rows"])
def _linear_persistent_kernel(
    x_desc,  # (T, K) in blocks of (BLOCK_ROWS, BLOCK_K)
    weight_desc,  # (M, K) in blocks of (BLOCK_COLS, BLOCK_K)
    bias_ptr,  # (M,)
    residual_ptr,  # (T, M)
    out_desc,  # (T, M) in blocks of (BLOCK_ROWS, BLOCK_COLS)
    pre_desc,  # the same, or None
    n_rows,
    n_cols,
    k_size,
    residual_row_stride,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    FLATTEN: tl.constexpr = True,
    PROGRAMS: tl.constexpr = 1,  # a multiprocessor; the grid has them
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=FLATTEN):
        row_block, col_block = tile_of(tile, n_row_blocks, n_col_blocks, GROUP_ROWS)
        row, col = row_block * BLOCK_ROWS, col_block * BLOCK_COLS
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        for k_block in range(n_k_blocks):
            x = x_desc.load([row, k_block * BLOCK_K])
            weight = weight_desc.load([col, k_block * BLOCK_K])
            acc = tl.dot(x, weight.T, acc)

        row_offs, col_offs = row + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
        mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]
        acc = add_bias(acc, bias_ptr, col_offs, n_cols, HAS_BIAS)
        if pre_desc is not None:
            pre_desc.store([row, col], acc.to(pre_desc.dtype))
        out = epilogue(
            acc, residual_ptr, row_offs, col_offs, mask, residual_row_stride, ACTIVATION, HAS_RESIDUAL, out_desc.dtype
        )
        out_desc.store([row, col], out.to(out_desc.dtype))


def describable(rows: torch.Tensor) -> bool:
    """Tells whether a tensor descriptor can describe the (rows, columns) tensor."""
    row_stride, col_stride = rows.stride()
    aligned = rows.data_ptr() % ALIGNMENT == 0 and row_stride * rows.element_size() % ALIGNMENT == 0
    return aligned and col_stride == 1 and rows.numel() > 0


def descriptor(rows: torch.Tensor, block_rows: int, block_cols: int) -> TensorDescriptor:
    """Makes the descriptor of a `describable` tensor, in blocks, without the checks that its constructor repeats."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)  # the other fields have defaults
    descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape = (
        rows,
        rows.shape,
        rows.stride(),
        [block_rows, block_cols],
    )
    return descriptor


def linear_persistent_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    config: dict[str, int],
    out: torch.Tensor,
    pre: torch.Tensor | None = None,
    dtypes: tuple[Any, ...] | None = None,
) -> torch.Tensor:
    """Fills out and pre, (T, M) with T > 0. x, weight, out and pre must be describable; config is the tile.

    dtypes: the result of `launch.alike` for x, weight, bias, residual, out and pre, if the caller has it.
    """
    n_rows, k_size = x.shape
    n_cols = weight.shape[0]
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    grid = (min(n_tiles, config.get("PROGRAMS", 1) * launch.n_multiprocessors(x.device)),)
    x_desc = descriptor(x, config["BLOCK_ROWS"], config["BLOCK_K"])
    weight_desc = descriptor(weight, config["BLOCK_COLS"], config["BLOCK_K"])
    out_desc = descriptor(out, config["BLOCK_ROWS"], config["BLOCK_COLS"])
    pre_desc = None if pre is None else descriptor(pre, config["BLOCK_ROWS"], config["BLOCK_COLS"])
    kernel, facts = _linear_persistent_kernel, None
    if dtypes is not None and n_rows > 1:
        facts = dtypes, k_size, n_cols, activation
        if launch.again(kernel, grid, config, facts, x_desc, weight_desc, bias, residual, out_desc, pre_desc, n_rows):
            return out
    launch.run_first(
        kernel,
        grid,
        config,
        facts,
        7,
        x_desc=x_desc,
        weight_desc=weight_desc,
        bias_ptr=bias,
        residual_ptr=residual,
        out_desc=out_desc,
        pre_desc=pre_desc,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        residual_row_stride=residual.stride(0) if residual is not None else 0,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
    )
    return out
