"""The row-wise part of a training step in plain PyTorch, and what autograd makes of it, beside the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert_kernels.masks import Dropout, threshold_of

F32, BF16 = torch.float32, torch.bfloat16
# C, the dtype of products, and S, that of the residual stream and of parameters.
PAIRS = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (BF16, F32)}
DROPOUT = Dropout(threshold_of(0.1), (5 << 40) + 3, 6)
OUT_DROPOUT = Dropout(threshold_of(0.3), (1 << 61) + 7, 9)
# Rows and columns: each edge of a vector, of a block of rows and of the widths that models have.
SIZES = [(65, width) for width in (1, 7, 64, 384, 768, 1000, 4096)] + [(n, 96) for n in (0, 1, 63, 64, 300)]
EPS = 1e-12


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout with the mask of the kernels."""
    if dropout is None:
        return x
    keep = masks.keep(torch.arange(x.shape[0]), x.shape[1], dropout)
    return torch.where(keep, x * dropout.scale, 0.0)


def residual_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    dropout: Dropout | None = None,
    out_dropout: Dropout | None = None,
) -> Tensor:
    """The forward pass with autocast's dtypes: bias and dropout in C, the rest in S."""
    x = drop(x if bias is None else x + bias.to(x.dtype), dropout)
    total = x if residual is None else x + residual
    return drop(F.layer_norm(total, weight.shape, weight, ln_bias, EPS), out_dropout)


def norm_inputs(n_rows: int, width: int, compute: torch.dtype, stream: torch.dtype) -> dict[str, Tensor]:
    """Arguments of `residual_norm`."""
    return {
        "x": torch.randn(n_rows, width).to(compute),
        "bias": torch.randn(width).to(stream),
        "residual": (1 + torch.randn(n_rows, width)).to(stream),
        "weight": (1 + 0.3 * torch.randn(width)).to(stream),
        "ln_bias": torch.randn(width).to(stream),
    }


def differentiate(
    function: Callable[..., Tensor], inputs: Mapping[str, Any], grad: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """function(**inputs), and the gradients of the tensors among them; in `dtype`, if there is one."""

    def leaf(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype or value.dtype).clone().requires_grad_() if floating else value

    leaves = {name: leaf(value) for name, value in inputs.items()}
    out = function(**leaves)
    out.backward(grad.to(out.dtype))
    return out.detach(), {name: t.grad for name, t in leaves.items() if isinstance(t, Tensor) and t.grad is not None}
