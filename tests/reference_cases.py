"""The tests of the reference share random numbers and the error measure."""

from __future__ import annotations

import torch
from torch import Tensor


def error(ours: Tensor, ref: Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    assert ours.shape == ref.shape and ours.dtype == ref.dtype
    return ((ours - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))
