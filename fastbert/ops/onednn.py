"""This module multiplies by packed weights in oneDNN, for linear layers of the cpu backend.

The operations are in `torch.ops.mkldnn`. These names are internal to PyTorch, so `packing_obstacle` checks that they
exist. If they are missing, the caller uses F.linear.

oneDNN adds up a float32 product over all of K in one chain. Its rounding error grows with K, and is about twice that of
F.linear at K = 3072. Here K is cut into pieces. Each piece is added to the sum of the earlier ones.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# float32: the longest chain of sums that keeps the error within the numerical policy. GELU passes more of the error on.
PIECE, PIECE_BEFORE_GELU = 384, 256
UNARY = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

# Packed slices of a weight along K, each with its end.
Pieces = list[tuple[int, torch.Tensor]]


@functools.cache
def _operations_obstacle() -> str | None:
    """Tells why this PyTorch does not have these operations, or returns None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    try:
        with torch.inference_mode(False), torch.no_grad():
            x = torch.ones(2, 4, dtype=torch.float32, device="cpu")
            weight = torch.ops.mkldnn._reorder_linear_weight(x, None)
            first = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            out = torch.ops.mkldnn._linear_pointwise.binary(x, first, weight, None, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this PyTorch has no torch.ops.mkldnn._linear_pointwise: {error}"
    return None if bool((out == 8).all()) else "torch.ops.mkldnn._linear_pointwise gives another result in this PyTorch"


def packing_obstacle(dtype: torch.dtype) -> str | None:
    """Tells why oneDNN is not used for a dtype on this processor, or returns None."""
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    return _operations_obstacle() or _dtype_obstacle(dtype)


@functools.cache
def _dtype_obstacle(dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return f"oneDNN has no {dtype} on this processor"


def pack(weight: torch.Tensor, longest: int) -> Pieces:
    """Packs a weight: (M, K) -> pieces. In float32 a piece has at most `longest` of K."""
    k_size = weight.shape[1]
    cuts = _cuts(k_size, longest) if weight.dtype == torch.float32 else [(0, k_size)]
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return [(end, reorder(weight[:, start:end].contiguous(), None)) for start, end in cuts]


def linear(
    x: torch.Tensor,
    pieces: Pieces,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies: (T, K), pieces of (M, K), (M,) -> (T, M) in x's dtype.

    activation: a key of UNARY, "none" with a residual.
    """
    ops: Any = torch.ops.mkldnn
    start = pieces[0][0]
    if residual is not None:
        out = ops._linear_pointwise.binary(x[:, :start], residual.contiguous(), pieces[0][1], bias, "add")
    else:
        name, algorithm = UNARY[activation if len(pieces) == 1 else "none"]
        out = ops._linear_pointwise(x[:, :start], pieces[0][1], bias, name, [], algorithm)
    for end, piece in pieces[1:]:
        out = ops._linear_pointwise.binary(x[:, start:end], out, piece, None, "add")
        start = end
    if len(pieces) > 1 and activation != "none":
        aten: Any = torch.ops.aten
        out = aten.relu_(out) if activation == "relu" else aten.gelu_(out, approximate=UNARY[activation][1])
    return out


def rows_for(n_rows: int) -> int:
    """Returns the padded number of rows for n_rows: in steps of 8, above 64 of an eighth of the power of two below.

    oneDNN compiles a program for each number of rows, which takes a millisecond and 100 KB. Padding limits the number
    of programs.
    """
    step = max(8, (1 << (n_rows - 1).bit_length()) // 16)
    return -(-n_rows // step) * step


def _cuts(k_size: int, longest: int) -> list[tuple[int, int]]:
    """Returns the fewest pieces of at most `longest`, as even as multiples of 16 allow."""
    n_pieces = -(-k_size // longest)
    step = -(-k_size // n_pieces // 16) * 16
    return [(start, min(start + step, k_size)) for start in range(0, k_size, step)]
