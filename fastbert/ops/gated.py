"""The gated activation of a feed-forward layer: activation(x) * gate."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import recording
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.gelu import bias_gelu

KERNELS = {"triton": "fastbert_kernels.gelu, multiply", "torch": "torch.nn.functional.gelu, multiply"}


def gated(x: Tensor, activation: str = "gelu", *, policy: Policy = AUTO) -> Tensor:
    """activation(first half) * second half, of each row. x: (T, 2 I). Returns (T, I) in x's dtype.

    activation: as in `bias_gelu`, whose kernels activate; PyTorch multiplies. Source: Shazeer, "GLU Variants Improve
    Transformer", 2020, arXiv:2002.05202. Raises ValueError for an odd width or an unknown activation.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x: expected shape (T, 2 I), got {tuple(x.shape)}")
    first, second = x.chunk(2, dim=-1)
    activated = bias_gelu(first, None, activation, policy=policy)
    if recording.on and recording.is_dry():
        return activated
    return torch.mul(activated, second)
