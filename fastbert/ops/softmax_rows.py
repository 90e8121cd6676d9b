"""This module computes the cross entropy of rows of logits and its gradient, in place and in plain PyTorch.

`fastbert_kernels.cross_entropy` has the formulas, and does the same on GPUs. This module processes rows in blocks that
stay in the processor's cache. Numbers are float32, or float64 if the logits are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20  # of a block in float32


class Terms(NamedTuple):
    """Holds terms of a row's loss besides its cross entropy. z_loss: the weight of the squared log-sum-exp."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Statistics(NamedTuple):
    """Holds the greatest logit of each row, (T,), and the logarithm of the sum of exp(logit - peak), (T,)."""

    peak: Tensor
    log_sum: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of statistics and sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def n_rows_of_block(n_cols: int) -> int:
    """Returns the number of rows of logits in a block."""
    return max(1, BLOCK_BYTES // (4 * max(n_cols, 1)))


def forward(logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Statistics]:
    """Returns the losses, (T,), and statistics of logits (T, V) with labels (T,). Every label is a valid class."""
    step = n_rows_of_block(logits.shape[1])
    parts = [_forward(x, y, terms) for x, y in zip(logits.split(step), labels.split(step), strict=True)]
    losses, peak, log_sum = map(torch.cat, zip(*parts, strict=True))
    return losses, Statistics(peak, log_sum)


def _forward(logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(wide(logits.dtype))
    peak = x.amax(1)
    x = x - peak[:, None]
    target = x.gather(1, labels[:, None])[:, 0]
    mean = x.mean(1) if terms.label_smoothing else None
    log_sum = x.exp_().sum(1).log_()
    losses = log_sum - (1.0 - terms.label_smoothing) * target
    if mean is not None:
        losses -= terms.label_smoothing * mean
    if terms.z_loss:
        losses += terms.z_loss * (peak + log_sum).square()
    return losses, peak, log_sum


def backward(
    logits: Tensor, labels: Tensor, statistics: Statistics, scale: Tensor, terms: Terms, grad_bias: Tensor | None
) -> None:
    """Writes the gradient of sum_t scale_t loss_t over the logits, and adds its column sums to grad_bias, (V,)."""
    step = n_rows_of_block(logits.shape[1])
    parts = (each.split(step) for each in (logits, labels, *statistics, scale))
    for block, y, peak, log_sum, factor in zip(*parts, strict=True):
        x = _gradient(block.to(wide(block.dtype)), y, Statistics(peak, log_sum), factor, terms)
        if grad_bias is not None:
            grad_bias += x.sum(0)
        if x.dtype != block.dtype:
            block.copy_(x)


def _gradient(x: Tensor, labels: Tensor, statistics: Statistics, scale: Tensor, terms: Terms) -> Tensor:
    """Writes the gradient in the place of x."""
    peak, log_sum = statistics
    smoothing, z_loss = terms
    above = 2.0 * z_loss * (peak + log_sum)  # what the z-loss adds to a row's probabilities
    x.sub_(peak[:, None]).sub_(log_sum[:, None])
    target = x.gather(1, labels[:, None])[:, 0]
    target = target.expm1() + above * target.exp() + smoothing * (1.0 - 1.0 / x.shape[1])
    x.exp_().mul_((scale * (1.0 + above))[:, None])
    if smoothing:
        x.sub_((scale * (smoothing / x.shape[1]))[:, None])
    return x.scatter_(1, labels[:, None], (scale * target)[:, None])
