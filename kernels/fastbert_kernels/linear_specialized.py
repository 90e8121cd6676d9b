"""This kernel is linear.py's layer with warps that only load and warps that only multiply, for compute capability 9.0.

    out = activation(x @ weight^T + bias) + residual

Shapes, dtypes, FLOPs, bytes and the order of tiles and sums are those of linear_persistent.py. Triton splits the warps
of the loop over tiles (`warp_specialize`): one group copies data by the tensor memory accelerator for two groups of
four warps. Each of these computes half of a tile's rows.

Tensor descriptors are made on the device, in scratch memory that `scratch` gives to Triton. Descriptors from the host
have boxes of a whole tile's rows, but the split copies half of them at a time. Triton compiles this without an error,
and the copies overrun their buffers. So this kernel has only pointer arguments, and no kernel with a descriptor
argument is warp-specialised.

It is a candidate of `fastbert tune`, which checks its results before it measures the time. It is not a default, because
it has not run on a GPU yet.

Source: Triton's tutorial "Persistent matmul" (descriptors made on the device, warp specialisation).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch, scratch
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_tile import add_bias, epilogue, tile_of

ARCH = 90  # the only architecture for which it is compiled
WARPS = 4  # of a group; Triton makes the groups


@jit(do_not_specialize=["n_rows"])
def _linear_specialized_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (M, K)
    bias_ptr,  # (M,)
    residual_ptr,  # (T, M)
    out_ptr,  # (T, M)
    n_rows,
    n_cols,
    k_size,
    x_row_stride,
    weight_row_stride,
    residual_row_stride,
    out_row_stride,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [n_rows, k_size], [x_row_stride, 1], [BLOCK_ROWS, BLOCK_K])
    weight_desc = tl.make_tensor_descriptor(weight_ptr, [n_cols, k_size], [weight_row_stride, 1], [BLOCK_COLS, BLOCK_K])
    out_desc = tl.make_tensor_descriptor(out_ptr, [n_rows, n_cols], [out_row_stride, 1], [BLOCK_ROWS, BLOCK_COLS])
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_k_blocks = tl.cdiv(k_size, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), n_row_blocks * n_col_blocks, tl.num_programs(0), flatten=False, warp_specialize=True
    ):
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
        out = epilogue(
            acc, residual_ptr, row_offs, col_offs, mask, residual_row_stride, ACTIVATION, HAS_RESIDUAL, out_desc.dtype
        )
        out_desc.store([row, col], out.to(out_desc.dtype))


def linear_specialized_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    config: dict[str, int],
    out: torch.Tensor,
) -> torch.Tensor:
    """Fills out, (T, M) with T > 0. x, weight and out must be describable; config is the tile, with WARPS warps."""
    n_rows, k_size = x.shape
    n_cols = weight.shape[0]
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    scratch.provide()
    # Grid: as many programs as run at once, or one per output tile if there are fewer tiles.
    launch.run(
        _linear_specialized_kernel,
        (min(n_tiles, launch.n_multiprocessors(x.device)),),
        config,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        x_row_stride=x.stride(0),
        weight_row_stride=weight.stride(0),
        residual_row_stride=residual.stride(0) if residual is not None else 0,
        out_row_stride=out.stride(0),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
    )
    return out
