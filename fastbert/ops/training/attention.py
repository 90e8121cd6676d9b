"""Attention with gradients or masks, by the kernels of the backend that runs it."""

from __future__ import annotations

from torch import Tensor

from fastbert.ops import dispatch
from fastbert.ops.dispatch import Policy
from fastbert.ops.dropout import probability_of
from fastbert.ops.training import choose, functions
from fastbert.ops.training.kernels import Attention
from fastbert.ops.training.plain import PLAIN


def attention(qkv: Tensor, settings: Attention, policy: Policy, head_size: int) -> Tensor | None:
    """Returns the attention of packed rows, (T, 3 N D) -> (T, N D); None where it runs as without gradients.

    Raises BackendError for dropout under a batch-invariant policy.
    """
    dropout = settings.dropout
    if dropout is not None:
        dispatch.check_invariant("attention", policy, "cpu", dispatch.training_obstacle(probability_of(dropout)))
    if not choose.wanted(policy, dropout, qkv):
        return None if dropout is None else PLAIN.attention_forward(qkv, settings)[0]
    kernels = choose.kernels("attention", policy, qkv.device, qkv.dtype, head_size=head_size)
    if kernels is None and dropout is None:
        return None
    return functions.attention(qkv, settings, kernels or PLAIN)
