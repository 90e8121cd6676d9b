"""This module applies PyTorch's functions to each element, or each row, of the result of an operation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastbert.ops import recording
from fastbert.ops.dispatch import AUTO, Policy


def elementwise(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, policy: Policy = AUTO
) -> torch.Tensor:
    """Computes function(x). x: (B, K). The function takes any number of rows, and treats each as if it were alone."""
    if recording.on:
        name = getattr(function, "__name__", type(function).__name__)
        if recording.note("elementwise", "torch", x.shape, x.shape, x.dtype, function=name):
            return torch.empty_like(x)
    return in_rows(function, x, policy)


def in_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Does the same as `elementwise`, as a part of another operation.

    On CPUs PyTorch computes the last elements of a thread's share one at a time, by another formula than whole vectors.
    So the last bit of a sigmoid depends on the place of its row. Under a batch-invariant policy the function gets
    single rows there.
    """
    if not policy.batch_invariant or x.device.type != "cpu" or len(x) == 0:
        return function(x)
    return torch.cat([function(row.clone()) for row in x.split(1)])  # a copy has the same alignment for each row
