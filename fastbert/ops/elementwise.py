"""PyTorch's functions apply to each element, or each row, of what an operation gave."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastbert.ops import recording
from fastbert.ops.dispatch import AUTO, Policy


def elementwise(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, policy: Policy = AUTO
) -> torch.Tensor:
    """function(x). x: (B, K); the function works on rows of any number, and on each as if it were the only one."""
    if recording.on:
        name = getattr(function, "__name__", type(function).__name__)
        if recording.note("elementwise", "torch", x.shape, x.shape, x.dtype, function=name):
            return torch.empty_like(x)
    return in_rows(function, x, policy)


def in_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Does what `elementwise` does, as a part of another operation.

    On CPUs PyTorch takes the last elements of a thread's share one at a time, by another formula than whole vectors, so
    that the last bit of a sigmoid depends on where its row lies. There a batch-invariant policy gives it single rows.
    """
    if not policy.batch_invariant or x.device.type != "cpu" or len(x) == 0:
        return function(x)
    return torch.cat([function(row.clone()) for row in x.split(1)])  # copied, to memory that is aligned alike
