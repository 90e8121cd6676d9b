"""Numbers in 8 bits with scales: quantising, dequantising, and the rotation that int8 wants."""

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
    """data * scale: data (T, K) float8_e4m3fn or int8, scale (T, G) float32, `group` columns to a scale."""

    data: Tensor
    scale: Tensor
    group: int

    @property
    def precision(self) -> str:
        return "int8" if self.data.dtype == torch.int8 else "fp8"


def check_precision(precision: str | None) -> str | None:
    """Returns the precision, or ValueError for one that is not known."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))} or None, got {precision!r}")
    return precision


def hadamard(n: int, device: torch.device | None = None) -> Tensor:
    """(n, n) float32, n a power of two: H[i, j] = -1 where i & j has an odd number of bits, else 1; H H = n I."""
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu" if device is None else device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate(x: Tensor) -> Tensor:
    """x (T, K) times the Hadamard matrix in blocks of ROTATION columns, in float32."""
    return (x.float().unflatten(1, (-1, ROTATION)) @ hadamard(ROTATION, x.device)).flatten(1)


def quantize(x: Tensor, precision: str, group: int | None = None, *, rotated: bool = False) -> Quantized:
    """x (T, K) in 8 bits, `group` columns (all by default) to a scale: their largest magnitude over 448 or 127.

    float8 rounds to nearest, ties to even, int8 to nearest, ties up. rotated: of x times the Hadamard matrix in blocks
    of 32 columns, for int8, whose steps one large column makes coarse for all; float8 gains nothing by it.
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
        scaled = (scaled + 0.5).floor().nan_to_num(0.0)  # a row that is not finite shows in its scale
    return Quantized(scaled.to(dtype).flatten(1)[:, :k].contiguous(), largest * (1.0 / TOP[dtype]), group)


def dequantize(q: Quantized) -> Tensor:
    """(T, K) float32; of rotated rows, the rotated ones."""
    return q.data.float() * q.scale.repeat_interleave(q.group, 1)[:, : q.data.shape[1]]


def quantize_weight(weight: Tensor, precision: str, *, rotated: bool = False) -> Quantized:
    """(M, K) in 8 bits with a scale an output channel, for inputs that are rotated or not."""
    return quantize(weight.detach().float() / (ROTATION if rotated else 1), precision, rotated=rotated)
