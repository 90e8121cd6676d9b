"""This kernel adds rows up, in a fixed order: the second step of a sum over all tokens.

    out = sum_p partials[p]

partials: (P, M) float32; out: (M,) float32. The first step is in another kernel. There each of P programs adds the rows
of its tiles, one tile after the other, and stores one row of partial sums:

    program p    tile p * n | tile p * n + 1 | ... | tile p * n + n - 1    -> partials[p],    n = ceil(tiles / programs)

P and n depend only on the number of tiles, so a sum has the same bits on every GPU and in every run. There are no
atomics. Bytes moved: P * M elements read, usually from the L2 cache, and M written.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit


@jit(do_not_specialize=["n_rows"])
def _column_sums_kernel(
    partials_ptr,  # (P, M)
    out_ptr,  # (M,)
    n_rows,
    n_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col_offs = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < n_cols
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        row_offs = first + tl.arange(0, BLOCK_ROWS)
        mask = (row_offs < n_rows)[:, None] & col_mask[None, :]
        sums += tl.load(partials_ptr + row_offs[:, None] * n_cols + col_offs[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col_offs, tl.sum(sums, axis=0), mask=col_mask)


def shares(n_rows: int, block_rows: int, max_programs: int) -> tuple[int, int]:
    """Returns the number of programs for the tiles of n_rows rows, and the most tiles of one program."""
    n_tiles = launch.cdiv(n_rows, block_rows)
    tiles_each = max(1, launch.cdiv(n_tiles, max_programs))
    return launch.cdiv(n_tiles, tiles_each), tiles_each


def column_sums(partials: torch.Tensor) -> torch.Tensor:
    """Adds (P, ...) contiguous float32 to (...). P = 0 gives zeros."""
    out = launch.empty(tuple(partials.shape[1:]), like=partials)
    if out.numel() == 0:
        return out
    config = configs.column_sums_config()
    # Grid: one program per BLOCK_COLS columns.
    launch.run(
        _column_sums_kernel,
        (launch.cdiv(out.numel(), config["BLOCK_COLS"]),),
        config,
        partials_ptr=partials,
        out_ptr=out,
        n_rows=partials.shape[0],
        n_cols=out.numel(),
    )
    return out
