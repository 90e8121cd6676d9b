"""This module has a linear layer for few rows, with K split among programs, and a LayerNorm that adds up the sums.

    sums[s] = x[:, share s of K] @ weight[:, share s of K]^T
    out = LayerNorm(sum_s sums[s] + bias + residual) * weight + ln_bias

x: (T, K), weight: (H, K), sums: (S, T, H) float32, residual and out: (T, H) in bf16 or fp16; vectors: (H,). With few
rows, a linear with few columns has fewer output tiles than a GPU has multiprocessors. So S programs share each tile.
The following LayerNorm must read the product anyway: it adds up the shares in order in float32. So the split costs no
launch and no rounding, and two runs give the same bits. These differ from the bits of one sum, so batch-invariant mode
does not split.

FLOPs: 2 * T * K * H; bytes besides the weight's: 8 * S * T * H, in the L2 cache, and 4 * T * H.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, dependent, launch, tables
from fastbert_kernels.dependent import wait_for_predecessor
from fastbert_kernels.few_rows import Split
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import normalize_rows
from fastbert_kernels.linear import linear_pointer_forward
from fastbert_kernels.linear_tile import ALIGNMENT


@jit(do_not_specialize=["n_rows", "n_splits"])
def _split_layer_norm_kernel(
    sums_ptr,  # (n_splits, T, H) float32
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H)
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H)
    n_rows,
    n_splits,
    residual_row_stride,
    eps,
    N_COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_predecessor(PDL)
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < N_COLS)[None, :]
    mask = (row_offs < n_rows)[:, None] & col_mask
    offs = row_offs[:, None] * N_COLS + col_offs[None, :]

    share_size = n_rows.to(tl.int64) * N_COLS
    x = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    for split in range(1, n_splits):
        x += tl.load(sums_ptr + split * share_size + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)[None, :]
    residual_offs = row_offs[:, None] * residual_row_stride + col_offs[None, :]
    x += tl.load(residual_ptr + residual_offs, mask=mask, other=0.0).to(tl.float32)

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    normalized, _, _ = normalize_rows(x, col_mask, N_COLS, eps)
    out = normalized * weight[None, :] + ln_bias[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def split_linear_layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    split: Split,
) -> torch.Tensor:
    """Computes LayerNorm(x @ weight^T + bias + residual) * ln_weight + ln_bias, (T, H) in x's dtype.

    x: (T, K), weight: (H, K), residual: (T, H), with unit stride along the rows; vectors: (H,). A share without a step
    of K is all zeros.
    """
    n_rows, n_cols = x.shape[0], weight.shape[0]
    x = x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % ALIGNMENT else x
    sums = launch.empty((split.splits, n_rows, n_cols), like=x, dtype=torch.float32)
    if n_rows > 0:
        linear_pointer_forward(x, weight, None, "none", None, split.tile, sums, splits=split.splits)
    return split_layer_norm_forward(sums, bias, residual, ln_weight, ln_bias, eps)


def split_layer_norm_forward(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Computes LayerNorm(sum of sums + bias + residual) * ln_weight + ln_bias, (T, H) in residual's dtype.

    sums: (S, T, H) float32, contiguous; residual: (T, H) with unit stride along H; vectors: (H,).
    """
    n_splits, n_rows, n_cols = sums.shape
    out = launch.empty((n_rows, n_cols), like=residual)
    if n_rows == 0:
        return out
    rows = configs.rowwise_config(n_cols)
    if tables.some_dependent:
        rows = dependent.options(rows, launch.arch(sums.device))
    # Grid: one program per BLOCK_ROWS whole rows.
    launch.run(
        _split_layer_norm_kernel,
        (launch.cdiv(n_rows, rows["BLOCK_ROWS"]),),
        rows,
        sums_ptr=sums,
        bias_ptr=bias,
        residual_ptr=residual,
        weight_ptr=ln_weight,
        ln_bias_ptr=ln_bias,
        out_ptr=out,
        n_rows=n_rows,
        n_splits=n_splits,
        residual_row_stride=residual.stride(0),
        eps=eps,
        N_COLS=n_cols,
        HAS_BIAS=bias is not None,
    )
    return out
