"""This module holds the activations by transformers' names (its ACT2FN), and computes them in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _laplace(x: Tensor) -> Tensor:
    # Ma et al., "Mega", 2022, arXiv:2209.10655: 0.5 (1 + erf((x - mu) / (sigma sqrt(2))))
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


# Activations without a kernel of their own.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}

# Names of config.hidden_act, and the names of activations in this library. The tanh form of GELU has many names.
# gelu_fast rounds its constant, sqrt(2 / pi), to ten digits.
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    **{name: name for name in OTHERS},
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Applies an activation to each element: "none", or a value of ACTIVATIONS. Raises ValueError for another."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation not in OTHERS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(sorted(set(ACTIVATIONS.values())))}"
        )
    return OTHERS[activation](x)
