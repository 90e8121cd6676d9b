"""This kernel is a linear layer on 8-bit operands. Its epilogue adds bias and GELU, and may quantise the result.

    out = activation((x * x_scale) @ (weight * weight_scale)^T + bias)

x: (T, K) and weight: (M, K), float8_e4m3fn or int8; weight_scale: (M,) float32, one for each output channel; x_scale:
(T, G) float32, one for each row and group of `group` neighbouring columns (the last may be narrower); bias: (M,) or
None. out: (T, M) in fp32 / bf16 / fp16, or in 8 bits with scales (T, ceil(M / 128)), one for each row and group of 128
columns.

int8 products are summed exactly in int32, over all of K if a row has one scale, otherwise over a group. The tensor
cores sum float8 products; up to Hopper they keep about 14 bits of the sum. There they sum over at most BLOCK_K, and
these sums are added outside of them in float32. They are scaled first, because Triton would turn a bare `sums + dot(x,
w)` into a sum inside the tensor cores. FLOPs: 2 * T * M * K; bytes: T * K + M * K + T * M at least, half of those in 16
bits.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3 (sums outside, group scales);
Zhang et al., "SageAttention2", 2024, arXiv:2411.10958 (14 bits on Ada too); the order of the tiles is that of `linear`.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch, quantized_configs
from fastbert_kernels.jit import jit
from fastbert_kernels.linear_persistent import describable
from fastbert_kernels.quantize import quantize_rows
from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
from fastbert_kernels.quantized_linear_specialized import quantized_linear_specialized_forward
from fastbert_kernels.quantized_tile import OUT_GROUP, scaled_epilogue


@jit(do_not_specialize=["n_rows"])
def _quantized_linear_kernel(
    x_ptr,  # (T, K)
    x_scale_ptr,  # (T, N_GROUPS)
    weight_ptr,  # (M, K)
    weight_scale_ptr,  # (M,)
    bias_ptr,  # (M,)
    out_ptr,  # (T, M)
    out_scale_ptr,  # (T, ceil(M / BLOCK_COLS)) where QUANTIZE
    n_rows,
    n_cols,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    SUM_OUTSIDE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    N_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    STEP: tl.constexpr = BLOCK_K if N_GROUPS == 1 or GROUP % BLOCK_K == 0 else GROUP
    pid = tl.program_id(0)
    n_row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    n_col_blocks = tl.cdiv(n_cols, BLOCK_COLS)
    group_size = GROUP_ROWS * n_col_blocks
    first_row_block = (pid // group_size) * GROUP_ROWS
    group_rows = tl.minimum(n_row_blocks - first_row_block, GROUP_ROWS)
    row_block = first_row_block + (pid % group_size) % group_rows
    col_block = (pid % group_size) // group_rows

    row_offs = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    k_offs = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row instead: no mask in the loop, and the store drops what they give.
    x_rows = tl.minimum(row_offs, n_rows - 1).to(tl.int64)
    weight_rows = tl.minimum(col_offs, n_cols - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * K + k_offs[None, :]  # (BLOCK_ROWS, BLOCK_K)
    weight_ptrs = weight_ptr + weight_rows[None, :] * K + k_offs[:, None]  # (BLOCK_K, BLOCK_COLS)
    x_scale_ptrs = x_scale_ptr + x_rows * N_GROUPS

    row_scale = tl.load(x_scale_ptrs)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32 if INT8 and N_GROUPS == 1 else tl.float32)
    for k_start in range(0, K, STEP):
        if K % STEP == 0 and STEP == BLOCK_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            k_mask = k_offs < tl.minimum(K - k_start, STEP)
            x = tl.load(x_ptrs, mask=k_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=k_mask[:, None], other=0.0)
        if N_GROUPS > 1:
            row_scale = tl.load(x_scale_ptrs + k_start // GROUP)
        if N_GROUPS > 1 or SUM_OUTSIDE:
            sums += tl.dot(x, weight).to(tl.float32) * row_scale[:, None]
        else:
            sums = tl.dot(x, weight, sums, out_dtype=tl.int32 if INT8 else tl.float32)
        x_ptrs += STEP
        weight_ptrs += STEP

    out = scaled_epilogue(
        sums, row_scale, weight_scale_ptr, bias_ptr, col_offs, n_cols, N_GROUPS == 1 and not SUM_OUTSIDE, HAS_BIAS,
        ACTIVATION, out_ptr.dtype.element_ty,
    )  # fmt: skip
    out_offs = row_offs.to(tl.int64)[:, None] * n_cols + col_offs[None, :]
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]
    if QUANTIZE:
        q, scale = quantize_rows(out, INT8)
        tl.store(out_ptr + out_offs, q, mask=mask)
        tl.store(out_scale_ptr + row_offs.to(tl.int64) * n_col_blocks + col_block, scale, mask=row_offs < n_rows)
    else:
        tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def quantized_linear_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    group: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps (T, K) to (T, M) in dtype. activation: "none", "gelu" or "gelu_tanh". group: columns of x with one scale.

    out_scale: a buffer (T, ceil(M / OUT_GROUP)) float32 for the scales of a quantised result; dtype is then x's. All
    tensors are contiguous. It runs the kernel that quantized_configs.quantized_gemm names, or this file's if the
    weight's address does not allow tensor descriptors.
    """
    n_rows, k = x.shape
    n_cols = weight.shape[0]
    out = launch.empty((n_rows, n_cols), like=x, dtype=dtype)
    if n_rows == 0:
        return out
    arch, grouped = launch.arch(x.device), group if group < k else None
    gemm = quantized_configs.quantized_gemm(x.dtype, arch, (k, n_cols), grouped, dtype)
    forward, config = quantized_linear_pointer_forward, gemm.config
    if gemm.ours != "quantized_linear":
        if describable(weight) and describable(out):
            forward = quantized_linear_persistent_forward
            if gemm.ours == "quantized_linear_specialized":
                forward = quantized_linear_specialized_forward
            # Unaligned rows are copied, so that the kernel and the bits depend only on the weight.
            x = x if describable(x) else x.clone(memory_format=torch.contiguous_format)
        else:
            config = quantized_configs.quantized_linear_config(
                x.dtype, grouped, arch, (k, n_cols), out_scale is not None
            )
    return forward(
        x, x_scale, group, weight, weight_scale, bias, activation, config.block_sizes, out, out_scale,
        sums_outside(x.dtype, arch),
    )  # fmt: skip


def sums_outside(dtype: torch.dtype, arch: int) -> bool:
    """Tells whether the tensor cores of the architecture add up products of the dtype too coarsely."""
    return dtype != torch.int8 and arch <= launch.LAST_ARCH_WITH_SHORT_FLOAT8_SUMS


def quantized_linear_pointer_forward(
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
    """Fills out, (T, M) with T > 0, and out_scale, by the kernel of this file; config is the tile."""
    n_rows, k = x.shape
    n_cols = weight.shape[0]
    if out_scale is not None and config["BLOCK_COLS"] != OUT_GROUP:
        raise ValueError(f"a quantised result needs tiles of {OUT_GROUP} columns, the table has {config['BLOCK_COLS']}")
    # Grid: one program per output tile. All are on one axis, so that the kernel can order them.
    n_tiles = launch.cdiv(n_rows, config["BLOCK_ROWS"]) * launch.cdiv(n_cols, config["BLOCK_COLS"])
    launch.run(
        _quantized_linear_kernel,
        (n_tiles,),
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
        GROUP=min(group, k),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        INT8=x.dtype == torch.int8,
        SUM_OUTSIDE=sum_outside,
        QUANTIZE=out_scale is not None,
    )
    return out
