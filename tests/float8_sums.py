"""GPUs up to Hopper cut off bits in sums of float8 products; this arithmetic gives the error that a test may allow.

Their tensor cores keep 13 bits of a sum after the leading one (DeepSeek-AI, arXiv:2412.19437, section 3.3.2; Zhang et
al., arXiv:2411.10958). An instruction adds 32 products, which are exact, to what it was given: all are cut off below
2^-13 of the largest one's power of two, then added. What is added outside of the tensor cores is float32. How the
hardware splits an instruction is not published; that can change the number of roundings a few times, and the error by
the root of that. So tests allow twice the error of this arithmetic, and more than that would be another arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbert.ops import quantized as Q
from fastbert_kernels import launch
from helpers import rms_error

MANTISSA = 13  # bits of a sum after the leading one
PRODUCTS = 32  # of one instruction
ROWS = 64  # whose error stands for that of all


def are_short(device: torch.device) -> bool:
    """Whether the tensor cores of this device sum float8 products in this way."""
    return device.type == "cuda" and launch.arch(device) <= launch.LAST_ARCH_WITH_SHORT_FLOAT8_SUMS


def bound(
    x: Q.Quantized,
    weight: Q.Quantized,
    bias: Tensor | None,
    finish: Callable[[Tensor], Tensor] = lambda y: y,
    step: int | None = None,
) -> float:
    """Twice the RMS error, over the RMS of what is right, of finish(x @ weight^T + bias) in this arithmetic.

    x: (T, K), weight: (M, K), both in float8. finish: the activation, on float64. step: columns that are summed inside
    the tensor cores, None for all that share a scale; the sums of steps are added exactly.
    """
    x = x._replace(data=x.data[:ROWS], scale=x.scale[:ROWS])
    added = 0.0 if bias is None else bias.double()
    short = summed(x, weight, step or x.group) + added
    exact = Q.dequantize(x).double() @ Q.dequantize(weight).double().T + added
    return 2 * rms_error(finish(short), finish(exact))


def summed(x: Q.Quantized, weight: Q.Quantized, step: int) -> Tensor:
    """x @ weight^T, (T, M) float64, of sums inside over at most `step` columns and at most one group."""
    rows, columns = x.data.double(), weight.data.double()
    k, total = rows.shape[1], torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows.device)
    for group, first in enumerate(range(0, k, x.group)):
        last = min(k, first + x.group)
        for start in range(first, last, step):
            inside = torch.zeros_like(total)
            for at in range(start, min(last, start + step), PRODUCTS):
                end = min(last, start + step, at + PRODUCTS)
                products = rows[:, None, at:end] * columns[None, :, at:end]  # (T, M, 32)
                inside = _cut(_cut(torch.cat([inside[..., None], products], 2)).sum(2, keepdim=True))[..., 0]
            total += inside * x.scale[:, group, None].double()
    return total * weight.scale.double().T


def _cut(addends: Tensor) -> Tensor:
    """Cuts off, along the last dimension, what lies below 2^-13 of the largest one's power of two."""
    _, exponent = torch.frexp(addends.abs().amax(-1, keepdim=True))  # the largest is in [2^(e - 1), 2^e)
    unit = torch.exp2((exponent - 1 - MANTISSA).double())
    return (addends / unit).trunc() * unit
