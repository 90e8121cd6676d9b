"""Linear layers of the cpu backend through oneDNN, with each weight kept in oneDNN's own layout.

    out = activation(x @ weight^T + bias),    or    out = x @ weight^T + bias + residual

PyTorch's F.linear lays the weight out anew on every call, or, in float32, takes MKL, which is slow on processors of
other makers. The operations are `torch.ops.mkldnn`: names internal to PyTorch, so that `obstacle` looks for them, and
where they are missing the caller takes F.linear.

oneDNN adds up a float32 product over all of K in one chain, whose rounding error grows with K and is about twice that
of F.linear at K = 3072. Here K is cut into pieces, each added to the sum of those before it. For up to three rows
F.linear has more than one chain for each sum, and is taken instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# float32: the longest chain of sums, so that the error stays within the numerical policy; a GELU passes more of it on.
PIECE, PIECE_BEFORE_GELU = 384, 256
LEAST_ROWS = 4
UNARY = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

# Weight -> its state when packed, an alias that keeps its memory from being given to a successor, and the pieces.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def _missing() -> str | None:
    """Why this PyTorch has no such operations, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    try:
        with torch.inference_mode(False), torch.no_grad():
            x = torch.ones(2, 4)
            weight = torch.ops.mkldnn._reorder_linear_weight(x, None)
            first = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            out = torch.ops.mkldnn._linear_pointwise.binary(x, first, weight, None, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this PyTorch has no torch.ops.mkldnn._linear_pointwise: {error}"
    return None if bool((out == 8).all()) else "torch.ops.mkldnn._linear_pointwise does something else here"


def obstacle(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why oneDNN cannot take these operands, all of one dtype, on the cpu backend; or None."""
    tensors = [x, weight, *(t for t in others if t is not None)]
    if any(t.device.type != "cpu" for t in tensors):
        return f"the tensors are on {x.device}"
    if torch.compiler.is_compiling():
        return "torch.compile fuses F.linear itself"
    if x.shape[0] < LEAST_ROWS:
        return f"fewer than {LEAST_ROWS} rows"
    if any(t.dtype != x.dtype for t in tensors) or torch.is_autocast_enabled("cpu"):
        return "mixed dtypes"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are needed"
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors) or weight.is_inference():
        return "the weight is no plain tensor, whose changes are counted"
    return unavailable(x.dtype)


def unavailable(dtype: torch.dtype) -> str | None:
    """Why oneDNN is not used for a dtype on this processor, or None."""
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    return _missing() or _dtype_obstacle(dtype)


@functools.cache
def _dtype_obstacle(dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return f"oneDNN has no {dtype} on this processor"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, K), (M, K), (M,) -> (T, M) in x's dtype. activation: a key of UNARY; residual: (T, M), only without one."""
    pieces = _pieces(weight, PIECE if activation == "none" else PIECE_BEFORE_GELU)
    ops: Any = torch.ops.mkldnn
    x = x if x.stride(-1) == 1 else x.contiguous()
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
    """The number of rows to compute n_rows in, padded: steps of 8, above 64 an eighth of the power of two below.

    oneDNN makes a program for each number of rows, which takes a millisecond and 100 KB; of arbitrary token counts
    there would be no end.
    """
    if n_rows < LEAST_ROWS:
        return n_rows
    step = max(8, (1 << (n_rows - 1).bit_length()) // 16)
    return -(-n_rows // step) * step


def forget(weights: Iterable[torch.Tensor]) -> None:
    """Packs these anew when they are next used: they may have been written to through `.data`, which nothing counts."""
    for weight in weights:
        _packed.pop(weight, None)


def _pieces(weight: torch.Tensor, longest: int) -> list[tuple[int, torch.Tensor]]:
    """Packed slices of the weight along K, in float32 of at most `longest`, each with where it ends."""
    state = weight.data_ptr(), weight._version, weight.dtype, weight.shape, longest
    found = _packed.get(weight)
    if found is not None and found[0] == state:
        return found[2]
    k_size = weight.shape[1]
    with torch.inference_mode(False), torch.no_grad():
        pieces = []
        for start, end in _cuts(k_size, longest) if weight.dtype == torch.float32 else [(0, k_size)]:
            part = weight.detach()[:, start:end].contiguous()
            pieces.append((end, torch.ops.mkldnn._reorder_linear_weight(part, None)))
        _packed[weight] = state, weight.detach(), pieces
    return pieces


def _cuts(k_size: int, longest: int) -> list[tuple[int, int]]:
    """The fewest pieces of at most `longest`, as even as multiples of 16 allow."""
    n_pieces = -(-k_size // longest)
    step = -(-k_size // n_pieces // 16) * 16
    return [(start, min(start + step, k_size)) for start in range(0, k_size, step)]
