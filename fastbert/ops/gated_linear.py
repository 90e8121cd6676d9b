"""This module holds a linear with its gate: activation(first half) * second half of x @ weight^T + bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import dispatch, gelu, recording
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.gated import activation_obstacle, gated, kernel_name
from fastbert.ops.gemm import gemm_kernel, takes_our_gemm
from fastbert.ops.kernel_modules import dense_rows, kernels_of
from fastbert.ops.library import register
from fastbert.ops.linear import check_shapes, linear
from fastbert.ops.training import choose


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, by_rows: bool = False) -> Tensor:
    first, second = F.linear(x, weight, bias).chunk(2, dim=-1)
    return gelu.activate(first, activation) * second


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, by_rows: bool = False) -> Tensor:
    out: Tensor = kernels_of("gated_linear").gated_linear_forward(
        dense_rows(x), dense_rows(weight), bias, kernel_name(activation), by_rows
    )
    return out


register(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool by_rows=False) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[0] // 2),
)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    *,
    policy: Policy = AUTO,
    keep: bool = True,
) -> Tensor:
    """Computes activation(first half) * second half of each row of x @ weight^T + bias.

    x: (T, K), weight: (2 I, K), bias: (2 I,) or None. activation, keep: as in `linear`. Returns (T, I) in x's dtype. On
    the triton backend one kernel computes all if `gemm_kernel` selects fastbert's GEMM and no gradients are needed.
    Otherwise `linear` and then `gated` run. Raises ValueError for shapes that do not fit, or an unknown activation.
    """
    if not _one_kernel(x, weight, bias, activation, policy):
        return gated(linear(x, weight, bias, policy=policy, keep=keep), activation, policy=policy)
    check_shapes(x, weight, bias)
    if recording.on:
        shape, sizes = (x.shape[0], weight.shape[0] // 2), (weight.shape[1], weight.shape[0])
        why = gemm_kernel(
            x.dtype, "gated", sizes, arch=dispatch.arch_of(x.device), batch_invariant=policy.batch_invariant
        )[1]
        facts = {"product": "fastbert", "why": why, "bias": bias is not None, "activation": activation, "gated": True,
                 "residual": False, "batch_invariant": policy.batch_invariant}  # fmt: skip
        if recording.note("linear", "triton", x.shape, shape, x.dtype, weight, **facts):
            return x.new_zeros(shape)
    return torch.ops.fastbert.gated_linear(x, weight, bias, activation, not policy.batch_invariant)


def _one_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, policy: Policy) -> bool:
    """Tells whether one kernel computes product and gate. If not, `linear` and `gated` give the reason or raise."""
    if not dispatch.wants_triton(policy.backend, x.device):
        return False
    if weight.shape[0] % 2 or activation_obstacle(activation) or dispatch.dtype_obstacle(x, weight, bias):
        return False
    if _wants_gradients(x, weight, bias):
        return False
    if dispatch.decide("linear", policy, x.device, None).backend != "triton":
        return False
    return takes(x.dtype, weight, x.device, policy)


def takes(dtype: torch.dtype, weight: Tensor, device: torch.device, policy: Policy) -> bool:
    """Tells whether one kernel computes the product with this weight and its gate, if the backend is "triton"."""
    n_cols, k_size = weight.shape
    choice = policy.backend, policy.batch_invariant, None
    return takes_our_gemm(dtype, "gated", k_size, n_cols, False, device, *choice)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    if recording.on and recording.is_dry():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and choose.IN_TRAINING.get()
