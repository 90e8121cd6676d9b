"""This module quantises to 8 bits with scales, dequantises, and rotates rows for int8."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
PRECISIONS = tuple(DTYPES)
TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
OUT_GROUP = 128  # columns of a linear's quantised result that share a scale
ROTATION = 32  # channels in a block of the rotation
TINY = 1e-30  # rows whose largest magnitude is less count as zeros


class Quantized(NamedTuple):
    """A `Quantized` is data * scale. data: (T, K) float8_e4m3fn or int8. scale: (T, G) float32, for `group` columns."""

    data: Tensor
    scale: Tensor
    group: int

    @property
    def precision(self) -> str:
        return "int8" if self.data.dtype == torch.int8 else "fp8"


def check_precision(precision: str | None) -> str | None:
    """Returns the precision. Raises ValueError for an unknown one."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))} or None, got {precision!r}")
    return precision


def hadamard(n: int, device: torch.device | None = None) -> Tensor:
    """Returns the Hadamard matrix, (n, n) float32, for a power of two n.

    H[i, j] is -1 if i & j has an odd number of one bits, else 1. H H = n I.
    """
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu" if device is None else device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate(x: Tensor) -> Tensor:
    """Multiplies x, (T, K), by the Hadamard matrix in blocks of ROTATION columns, in float32."""
    return (x.float().unflatten(1, (-1, ROTATION)) @ hadamard(ROTATION, x.device)).flatten(1)


def quantize(x: Tensor, precision: str, group: int | None = None, *, rotated: bool = False) -> Quantized:
    """Quantises x, (T, K), to 8 bits. A scale for `group` columns (default: all) is their greatest magnitude / 448 or
    127.

    float8 rounds to nearest, ties to even (448); int8 rounds to nearest, ties up (127). rotated: quantise x times the
    Hadamard matrix in blocks of 32 columns. In int8 one large column makes the steps of all columns coarse, and the
    rotation prevents this. float8 does not need it.
    """
    n_rows, k = x.shape
    group = k if group is None else min(group, k)
    x = rotate(x) if rotated else x.float()
    x = F.pad(x, (0, -k % group)).view(n_rows, -(-k // group), group)
    dtype = DTYPES[precision]
    largest = x.abs().amax(2)
    inverse = torch.full_like(largest, TOP[dtype]) / largest.clamp(min=TINY)
    scaled = x * torch.where(largest < TINY, 0.0, inverse)[:, :, None]
    if dtype == torch.int8:
        scaled = (scaled + 0.5).floor().nan_to_num(0.0)  # the scale shows a row that is not finite
    return Quantized(scaled.to(dtype).flatten(1)[:, :k].contiguous(), largest * (1.0 / TOP[dtype]), group)


def dequantize(q: Quantized) -> Tensor:
    """Returns (T, K) float32. Rotated rows stay rotated."""
    return q.data.float() * q.scale.repeat_interleave(q.group, 1)[:, : q.data.shape[1]]


def quantize_weight(weight: Tensor, precision: str, *, rotated: bool = False) -> Quantized:
    """Quantises a weight, (M, K), with one scale for each output channel. rotated: whether the inputs are rotated."""
    return quantize(weight.detach().float() / (ROTATION if rotated else 1), precision, rotated=rotated)
