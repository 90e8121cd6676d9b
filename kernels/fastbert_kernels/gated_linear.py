"""This kernel is a linear layer with a gate in the GEMM's epilogue: the first half of a gated feed-forward layer.

    out = activation(x @ first^T + first_bias) * (x @ second^T + second_bias),    weight = [first above second]

x: (T, K), weight: (2 I, K), bias: (2 I,), out: (T, I); fp32 / bf16 / fp16, float32 accumulators. Activation and gate
use the accumulators before the only rounding. FLOPs: 4 * T * I * K; bytes: (T * K + 2 * I * K + T * I) elements at
least. Separate kernels for a linear and a gate move 4 * T * I elements more, and round the product in between.

A tile of the product has BLOCK_COLS columns, half of them from the first part of the weight and half from the second.
So a program holds both factors of its BLOCK_COLS / 2 outputs. The weight is not rearranged: a tile reads its rows in
two places. So a tile has the operands and the accumulators of the same tile in linear.py, and one table of tiles serves
both.

    weight, (2 I, K)      tile of x @ weight^T         out
    first   . 1 1 . .     [ 1 1 | 2 2 ]         ->     [ a(1) 2  a(1) 2 ]
    second  . 2 2 . .

With tensor cores, the factors of an output are in the two halves of a tile, in registers of one thread. In IEEE
float32, with multiply-adds, they are neighbouring columns (`PAIRS`), which takes a third fewer registers.

A row's bits do not depend on the batch, except that few rows may have their own tile, as in linear.py.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, dependent, few_rows, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.gated_linear_persistent import gated_linear_persistent_forward
from fastbert_kernels.gated_tile import gated_epilogue, half_and_place
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import describable
from fastbert_kernels.linear_tile import ALIGNMENT, tile_of


@jit(do_not_specialize=["n_rows"])
def _gated_linear_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (2 I, K)
    bias_ptr,  # (2 I,)
    out_ptr,  # (T, I)
    n_rows,
    n_cols,  # I
    k_size,
    x_row_stride,
    weight_row_stride,
    EVEN_K: tl.constexpr,  # whether k_size is a whole number of blocks
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # of the product; a tile of the output has half as many
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    OUT_COLS: tl.constexpr = BLOCK_COLS // 2
    PAIRS: tl.constexpr = x_ptr.dtype.element_ty.is_fp32()
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, OUT_COLS)
    row_block, col_block = tile_of(tl.program_id(0), n_row_blocks, n_col_blocks, GROUP_ROWS)

    row_offs = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    half, place = half_and_place(BLOCK_COLS, PAIRS)
    k_offs = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row instead: no mask in the loop, and the store drops what they give.
    x_rows = tl.minimum(row_offs, n_rows - 1).to(tl.int64)
    weight_rows = (half * n_cols + tl.minimum(col_block * OUT_COLS + place, n_cols - 1)).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_row_stride + k_offs[None, :]  # (BLOCK_ROWS, BLOCK_K)
    weight_ptrs = weight_ptr + weight_rows[None, :] * weight_row_stride + k_offs[:, None]  # (BLOCK_K, BLOCK_COLS)

    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for k_start in range(0, k_size, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k_offs < k_size - k_start)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(k_offs < k_size - k_start)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    col_offs = col_block * OUT_COLS + tl.arange(0, OUT_COLS)
    out = gated_epilogue(acc, bias_ptr, col_offs, n_cols, HAS_BIAS, ACTIVATION, PAIRS, out_ptr.dtype.element_ty)
    out_offs = row_offs.to(tl.int64)[:, None] * n_cols + col_offs[None, :]
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, by_rows: bool = False
) -> torch.Tensor:
    """Computes product and gate, (T, K) -> (T, I) in x's dtype, with weight (2 I, K); activation: of gated.ACTIVATIONS.

    Tensors have unit row stride. by_rows: whether few rows may have their own tile, and with it other bits. It runs the
    kernel that configs.gemm names, or this file's if the weight's alignment does not allow tensor descriptors.
    """
    n_rows, shape = x.shape[0], (x.shape[1], weight.shape[0])
    out = launch.empty((n_rows, shape[1] // 2), like=x)
    if n_rows == 0:
        return out
    arch = launch.arch(x.device)
    few = few_rows.tile(x.dtype, arch, shape, "gated", n_rows) if by_rows else None
    gemm = configs.gemm(x.dtype, arch, shape, "gated")
    config = gemm.config.block_sizes
    # Rows at odd addresses are copied, for the reason in `linear_forward`.
    if few is not None:
        config = few
    elif gemm.ours == "linear_persistent":
        dtypes = launch.alike(x, weight, bias, out) if n_rows > 1 else None
        if dtypes or (describable(weight) and describable(out)):
            x = x if dtypes or describable(x) else x.clone(memory_format=torch.contiguous_format)
            return gated_linear_persistent_forward(x, weight, bias, activation, config, out, dtypes)
        config = configs.linear_config(x.dtype, arch, shape, "gated").block_sizes
    x = x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % ALIGNMENT else x
    return gated_linear_pointer_forward(x, weight, bias, activation, config, out)


def gated_linear_pointer_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    config: dict[str, int],
    out: torch.Tensor,
) -> torch.Tensor:
    """Fills out, (T, I) with T > 0, contiguous, by the kernel of this file; config is the tile of the product."""
    n_rows, k_size = x.shape
    n_cols = out.shape[1]
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"] // 2)
    precision = launch.dot_precision(x.dtype)
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    # Grid: one program per output tile. All are on one axis, so that the kernel can order them.
    grid, facts = (n_tiles,), None
    if n_rows > 1 and (dtypes := launch.alike(x, weight, bias, out)):
        facts = dtypes, k_size, n_cols, activation, precision
        if launch.again(_gated_linear_kernel, grid, config, facts, x, weight, bias, out, n_rows):
            return out
    launch.run_first(
        _gated_linear_kernel,
        grid,
        config,
        facts,
        5,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        x_row_stride=x.stride(0),
        weight_row_stride=weight.stride(0),
        EVEN_K=k_size % config["BLOCK_K"] == 0,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        INPUT_PRECISION=precision,
    )
    return out
