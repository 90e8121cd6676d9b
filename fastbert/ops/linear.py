"""Linear layers with what follows them: bias, GELU; bias, dropout, residual and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.ops import dispatch, gelu, layer_norm
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.library import register

KERNELS = {"triton": "fastbert_kernels.linear", "torch": "torch.nn.functional.linear"}


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return gelu.activate(F.linear(x, weight, bias), activation)


def _kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    from fastbert_kernels.linear import linear_forward

    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return linear_forward(x, weight, bias, activation)


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0]),
)


def gemm_kernel(dtype: torch.dtype, activation: str) -> tuple[str, str]:
    """Which GEMM the triton backend takes, "fastbert" (with its epilogue) or "cublas", and why. Not measured yet.

    An activation in the epilogue saves a pass over (T, I) in memory. Without one cuBLAS has nothing to lose, and in
    float32 its IEEE GEMM is the faster one: Triton has only scalar multiply-adds for it.
    """
    if dtype == torch.float32:
        return "cublas", "heuristic: IEEE float32 has no tensor cores"
    if activation == "none":
        return "cublas", "heuristic: no activation to fuse"
    return "fastbert", "heuristic: the activation is in the epilogue"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    *,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """activation(x @ weight^T + bias). x: (T, K), weight: (M, K), bias: (M,) or None, of one floating dtype.

    activation: "none", "gelu" (erf), "gelu_tanh" or "relu". Returns (T, M) in x's dtype. Raises ValueError for shapes
    that do not fit, BackendError under a strict policy.
    """
    _check(x, weight, bias)
    if activation == "none":
        return F.linear(x, weight, bias)  # on every backend: see gemm_kernel
    why_not = dispatch.dtype_obstacle(x, weight, bias) or gelu.activation_obstacle(activation)
    if dispatch.choose("linear", policy.backend, policy.strict, x.device, why_not) != "triton":
        return _eager(x, weight, bias, activation)
    if gemm_kernel(x.dtype, activation)[0] == "fastbert":
        return torch.ops.fastbert.linear(x, weight, bias, activation)
    return torch.ops.fastbert.bias_gelu(F.linear(x, weight), bias, activation)


def linear_residual_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """LayerNorm(dropout(x @ weight^T + bias) + residual) * ln_weight + ln_bias.

    x: (T, K), weight: (H, K), bias: (H,) or None, residual: (T, H), ln_weight, ln_bias: (H,). Returns (T, H). Where the
    LayerNorm kernel runs, it adds the bias too; elsewhere the GEMM does.
    """
    _check(x, weight, bias)
    why_not = layer_norm.obstacle(weight.shape[0], x, weight, bias, residual, ln_weight, ln_bias, dropout_p=dropout_p)
    fused = dispatch.choose("layer_norm", policy.backend, policy.strict, x.device, why_not) == "triton"
    y = F.linear(x, weight, None if fused else bias)
    return layer_norm.bias_residual_layer_norm(
        y, bias if fused else None, residual, ln_weight, ln_bias, eps, dropout_p=dropout_p, policy=policy
    )


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x, weight: expected (T, K) and (M, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
