"""This kernel is a linear layer with bias, GELU and residual in the GEMM's epilogue.

    out = activation(x @ weight^T + bias) + residual,    for training also pre = x @ weight^T + bias

x: (T, K), weight: (M, K) as torch.nn.Linear keeps it, bias: (M,), residual and out: (T, M); fp32 / bf16 / fp16, float32
accumulator. The epilogue uses the accumulator before the only rounding. fp32 multiplies in IEEE float32 unless TF32 is
allowed. FLOPs: 2 * T * M * K; bytes: (T * K + M * K + T * M) elements at least, and T * M more with a residual.

K and M are run-time sizes: one compiled kernel serves all shapes of a model whose K is a whole number of blocks. Tiles
are visited in groups of GROUP_ROWS row blocks, so that neighbouring programs share weight columns in L2 (Tillet, Kung
and Cox, "Triton", MAPL 2019, and its matrix multiplication tutorial).

The bits of an output row do not depend on the other rows. The tile depends on (K, M), never on T. Each output element
is summed over K in the same order at any place in a tile, and no sum is split. Callers that do not need this may have
tiles for few rows (`few_rows`), and sums over shares of K (`split_linear`).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, dependent, few_rows, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import describable, linear_persistent_forward
from fastbert_kernels.linear_specialized import linear_specialized_forward
from fastbert_kernels.linear_tile import ALIGNMENT, add_bias, epilogue, tile_of


@jit(do_not_specialize=["n_rows"])
def _linear_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (M, K)
    bias_ptr,  # (M,)
    residual_ptr,  # (T, M)
    out_ptr,  # (T, M)
    pre_ptr,  # (T, M), with the rows of out, or None
    n_rows,
    n_cols,
    k_size,
    x_row_stride,
    weight_row_stride,
    residual_row_stride,
    out_row_stride,
    EVEN_K: tl.constexpr,  # whether k_size is a whole number of blocks
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SPLIT: tl.constexpr = False,  # whether programs of axis 1 share K, and out is their sums, (splits, T, M) float32
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    n_row_blocks, n_col_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    row_block, col_block = tile_of(tl.program_id(0), n_row_blocks, n_col_blocks, GROUP_ROWS)

    row_offs = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    k_offs = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row instead: no mask in the loop, and the store drops what they give.
    x_rows = tl.minimum(row_offs, n_rows - 1).to(tl.int64)
    weight_rows = tl.minimum(col_offs, n_cols - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_row_stride + k_offs[None, :]  # (BLOCK_ROWS, BLOCK_K)
    weight_ptrs = weight_ptr + weight_rows[None, :] * weight_row_stride + k_offs[:, None]  # (BLOCK_K, BLOCK_COLS)

    if SPLIT:
        share = tl.cdiv(tl.cdiv(k_size, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        first_k = tl.program_id(1) * share
        end_k = tl.minimum(first_k + share, k_size)
        x_ptrs += first_k
        weight_ptrs += first_k
        out_ptr += tl.program_id(1).to(tl.int64) * n_rows * out_row_stride
    else:
        first_k = 0
        end_k = k_size
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for k_start in range(first_k, end_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k_offs < k_size - k_start)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(k_offs < k_size - k_start)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]
    acc = add_bias(acc, bias_ptr, col_offs, n_cols, HAS_BIAS)
    if pre_ptr is not None:
        pre_offs = row_offs.to(tl.int64)[:, None] * out_row_stride + col_offs[None, :]
        tl.store(pre_ptr + pre_offs, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    out = epilogue(
        acc, residual_ptr, row_offs, col_offs, mask, residual_row_stride, ACTIVATION, HAS_RESIDUAL,
        out_ptr.dtype.element_ty,
    )  # fmt: skip
    out_offs = row_offs.to(tl.int64)[:, None] * out_row_stride + col_offs[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    by_rows: bool = False,
) -> torch.Tensor:
    """Multiplies (T, K) -> (T, M) in x's dtype; activation "none", "gelu" or "gelu_tanh". Tensors have unit row stride.

    pre: a contiguous tensor (T, M) in x's dtype for x @ weight^T + bias, which the backward pass of an activation
    needs. by_rows: whether few rows may have their own tile, and with it other bits. It runs the kernel that
    configs.gemm names, or this file's if the weight's alignment does not allow tensor descriptors.
    """
    n_rows, shape = x.shape[0], (x.shape[1], weight.shape[0])
    out = launch.empty((n_rows, shape[1]), like=x)
    if n_rows == 0:
        return out
    epilogue_name = "pre" if pre is not None else activation if residual is None else "residual"
    arch = launch.arch(x.device)
    few = few_rows.tile(x.dtype, arch, shape, epilogue_name, n_rows) if by_rows else None
    gemm = configs.gemm(x.dtype, arch, shape, epilogue_name)
    config = gemm.config.block_sizes
    # Rows at unaligned addresses are copied. The kernel, its specialisation, and with them the bits must depend only on
    # the weight, not on the address of the rows.
    if few is not None:
        config = few
    elif gemm.ours != "linear":
        dtypes = launch.alike(x, weight, bias, residual, out, pre) if x.shape[0] > 1 else None
        # For the sizes for which `gemm` names these kernels, all such tensors are describable.
        if dtypes or (describable(weight) and describable(out) and (pre is None or describable(pre))):
            x = x if dtypes or describable(x) else x.clone(memory_format=torch.contiguous_format)
            if gemm.ours == "linear_specialized" and pre is None:
                return linear_specialized_forward(x, weight, bias, activation, residual, config, out)
            return linear_persistent_forward(x, weight, bias, activation, residual, config, out, pre, dtypes)
        config = configs.linear_config(x.dtype, arch, shape, epilogue_name).block_sizes
    x = x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % ALIGNMENT else x
    return linear_pointer_forward(x, weight, bias, activation, residual, config, out, pre)


def linear_pointer_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    config: dict[str, int],
    out: torch.Tensor,
    pre: torch.Tensor | None = None,
    splits: int = 0,
) -> torch.Tensor:
    """Fills out and pre, (T, M) with T > 0, by the kernel of this file; config is the tile.

    splits: the number of programs that share each tile's K; out then holds their sums, (splits, T, M) float32. 0 means
    the whole product.
    """
    n_rows, k_size = x.shape
    n_cols = weight.shape[0]
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    options = {"SPLIT": True} if splits else {}
    precision = launch.dot_precision(x.dtype)
    if tables.some_dependent:
        config = dependent.options(config, launch.arch(x.device))
    # Grid: one program per output tile and share of K. Tiles are on one axis, so that the kernel can order them.
    grid, facts = (n_tiles, splits) if splits else (n_tiles,), None
    if n_rows > 1 and (dtypes := launch.alike(x, weight, bias, residual, out, pre)):
        facts = dtypes, k_size, n_cols, activation, precision, splits > 0
        if launch.again(_linear_kernel, grid, config, facts, x, weight, bias, residual, out, pre, n_rows):
            return out
    launch.run_first(
        _linear_kernel,
        grid,
        config,
        facts,
        7,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        pre_ptr=pre,
        n_rows=n_rows,
        n_cols=n_cols,
        k_size=k_size,
        x_row_stride=x.stride(0),
        weight_row_stride=weight.stride(0),
        residual_row_stride=residual.stride(0) if residual is not None else 0,
        out_row_stride=out.stride(-2),
        EVEN_K=k_size % config["BLOCK_K"] == 0,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
        INPUT_PRECISION=precision,
        **options,
    )
    return out
