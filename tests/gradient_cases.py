"""Tests of backward kernels share pairs of dtypes, masks, and the numerical policy for gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert_kernels.masks import Dropout, threshold_of
from helpers import rms_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The dtype of products, and that of the stream between layers: float32 under autocast.
PAIRS = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)]
PAIR_NAMES = [f"{str(c).removeprefix('torch.')}-{str(s).removeprefix('torch.')}" for c, s in PAIRS]
SEED = (1 << 62) - 12345  # Both words of the key are in use, the low one with its highest bit set.


def dropout(site: int = 5, p: float = 0.3) -> Dropout:
    """A dropout whose key has large words."""
    return Dropout(threshold_of(p), SEED, site)


def kept(n_rows: int, n_columns: int, drop: Dropout | None, device: torch.device) -> Tensor:
    """The mask (n_rows, n_columns), float64: the scale where an element is kept, 0 where it is dropped."""
    if drop is None:
        return torch.ones(n_rows, n_columns, dtype=torch.float64, device=device)
    return masks.keep(torch.arange(n_rows, device=device), n_columns, drop).double() * drop.scale


def assert_gradient(name: str, ours: Tensor | None, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The numerical policy: at most 1.25 times the error of PyTorch eager, and a floor.

    The floor is half an ulp of dtype, which is that of what the kernel reads and writes: a saved tensor that is rounded
    to it, once, may cost that much. An ulp of float32 comes on top, for another order of float32 sums. A sum that a
    kernel keeps in float32 is rounded to the dtype of eager's first.
    """
    assert ours is not None, name
    ours = ours.to(eager.dtype)
    ours_error, eager_error = rms_error(ours, exact), rms_error(eager, exact)
    bound = 1.25 * eager_error + 0.5 * torch.finfo(dtype).eps + torch.finfo(FP32).eps
    assert math.isfinite(ours_error), f"{name}: not finite"
    assert ours_error <= bound, f"{name}: error {ours_error:.3g}, eager has {eager_error:.3g}, bound {bound:.3g}"


# Rows that are nearly or quite constant: their value, and the deviation from it.
NEARLY_CONSTANT = [(1.004, 0.0), (1.004, 1e-4), (300.0, 0.1), (0.0, 0.0)]


def assert_norm_gradients_bounded(
    grads: Sequence[Tensor], grad_weight: Tensor, grad: Tensor, weight: Tensor, rstd: Tensor
) -> None:
    """Gradients of LayerNorm are no larger than normalised rows of variance 1 allow; 12 is above the root of H.

    grads: (T, H) each, of what was normalised; grad_weight: (H,). grad: (T, H) of the output; weight: (H,); rstd: (T,).
    """
    g = grad.float() * weight.float()
    for each in grads:
        most = 1.1 * 12 * g.abs().amax(1, keepdim=True) * rstd[:, None]
        most[most > torch.finfo(each.dtype).max] = math.inf
        assert (each.float().abs() <= most).all()
    assert grad_weight.abs().max() <= 1.1 * 12 * grad.float().abs().sum(0).max()


def assert_same_bits(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    """Two runs on the same inputs give the same bits."""
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list[Any]:
    """Copies of the tensors, in the dtype if there is one, that gather gradients."""
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
