"""This module adds a position bias to attention's scores.

A bias is a table (N, 2R + 1). It holds, for each head, the number that is added to the score of a key -R to R columns
after the query. Keys at greater distances have the number of R or -R. Kernels add it to q . k before the multiplication
by the softmax scale, so it is divided by the scale when it is loaded. Bytes moved: the table of a head stays in the L1
cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastbert_kernels.jit import jit

DO_NOT_SPECIALIZE = ("bias_radius",)


class PositionBias(NamedTuple):
    """A `PositionBias` is a table, (N, 2R + 1), contiguous, in any float dtype.

    columns: (T,) int32, the column of each row; None if the tokens of each sequence are neighbours.
    """

    table: torch.Tensor
    columns: torch.Tensor | None


# The arguments of a kernel without a bias.
NONE: dict[str, Any] = {
    **dict.fromkeys(("bias_ptr", "columns_ptr", "bias_radius", "bias_scale")), "BIASED": False, "HOLES": False
}  # fmt: skip


def arguments(bias: PositionBias | None, scale: float) -> dict[str, Any]:
    """Returns the arguments of a kernel for a bias, or for none. scale: the scale of the softmax."""
    if bias is None:
        return NONE
    return {
        "bias_ptr": bias.table,
        "columns_ptr": bias.columns,
        "bias_radius": bias.table.shape[1] // 2,
        "bias_scale": 1.0 / scale,
        "BIASED": True,
        "HOLES": bias.columns is not None,
    }


@jit
def bias_of(
    queries,  # (rows, 1) or (1, rows) packed rows
    keys,  # (1, rows) or (rows, 1)
    query_mask,  # whether a row is one of the tile's
    key_mask,
    head,
    bias,  # (bias_ptr, columns_ptr, bias_radius, bias_scale, end of the rows)
    HOLES: tl.constexpr,
):
    """Returns what is added to q . k, float32."""
    bias_ptr, columns_ptr, radius, bias_scale, _ = bias
    if HOLES:
        queries = tl.load(columns_ptr + queries, mask=query_mask, other=0)
        keys = tl.load(columns_ptr + keys, mask=key_mask, other=0)
    places = tl.minimum(tl.maximum(keys - queries + radius, 0), 2 * radius)
    return tl.load(bias_ptr + head * (2 * radius + 1) + places).to(tl.float32) * bias_scale
