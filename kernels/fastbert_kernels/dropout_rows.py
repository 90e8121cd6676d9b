"""This kernel applies dropout to rows, if no other kernel includes it. It is its own backward pass.

    out = keep * x / (1 - p)

x, out: (T, H), fp32 / bf16 / fp16. Masks are those of `fastbert_kernels.masks`. Bytes moved: 2 * T * H elements.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch, masks
from fastbert_kernels import dropout as drawing
from fastbert_kernels.dropout import GROUP, keep_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout


@jit(do_not_specialize=["n_rows", *drawing.DO_NOT_SPECIALIZE])
def _dropout_kernel(
    x_ptr,  # (T, H)
    out_ptr,  # (T, H)
    n_rows,
    n_cols,
    x_row_stride,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    groups = tl.program_id(1) * (BLOCK_COLS // GROUP) + tl.arange(0, BLOCK_COLS // GROUP)
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]
    x = tl.load(x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :], mask=mask, other=0.0).to(tl.float32)
    kept = keep_columns(row_offs, groups, 0, key_low, key_high, site, threshold)
    out = tl.where(kept, x * keep_scale, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offs[:, None] * n_cols + col_offs[None, :], out, mask=mask)


def dropout_forward(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Sets elements of (T, H) to zero and scales the others. x needs unit stride along H."""
    n_rows, n_cols = x.shape
    out = launch.empty((n_rows, n_cols), like=x)
    if n_rows == 0:
        return out
    config = configs.elementwise_config(max(n_cols, masks.GROUP))
    # Grid: tiles of BLOCK_ROWS x BLOCK_COLS; rows on axis 0, whose limit is 2^31 - 1 programs.
    launch.run(
        _dropout_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]), launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        x_ptr=x,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        x_row_stride=x.stride(0),
        **drawing.arguments(dropout),
    )
    return out
