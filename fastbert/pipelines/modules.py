"""The modules after the pooling are those of sentence-transformers: Dense, LayerNorm, Dropout, Normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.ops import Policy, dispatch, recording

# A class of torch.nn, made without arguments -> its function at inference. The last three work on rows.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Identity": lambda x: x,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
    "CELU": F.celu,
    "ELU": F.elu,
    "Hardshrink": F.hardshrink,
    "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish,
    "Hardtanh": F.hardtanh,
    "LeakyReLU": F.leaky_relu,
    "LogSigmoid": F.logsigmoid,
    "Mish": F.mish,
    "RReLU": F.rrelu,
    "ReLU6": F.relu6,
    "SELU": F.selu,
    "SiLU": F.silu,
    "Softplus": F.softplus,
    "Softshrink": F.softshrink,
    "Softsign": F.softsign,
    "Tanhshrink": F.tanhshrink,
    "LogSoftmax": lambda x: x.log_softmax(1),
    "Softmax": lambda x: x.softmax(1),
    "Softmin": lambda x: (-x).softmax(1),
}


def activation_name(path: str) -> str | None:
    """Returns the name in ACTIVATIONS of the class under `path` in torch.nn, or None if there is no such class."""
    package, _, name = path.rpartition(".")
    if name not in ACTIVATIONS or package not in ("torch.nn", "torch.nn.modules", getattr(nn, name).__module__):
        return None
    return name


class Dense(nn.Module):
    """A Dense computes activation(x @ weight^T + bias) on sentence vectors, in the dtype of x: (B, K) -> (B, M).

    use_residual: x is added to the result, through a separate linear map if M is not K.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "Tanh",
        use_residual: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        out = ACTIVATIONS[self.activation](F.linear(x, weight.to(x), None if bias is None else bias.to(x)))
        if not self.use_residual:
            return out
        return out + (F.linear(x, self.residual.weight.to(x)) if hasattr(self, "residual") else x)

    def invariant(self, x: Tensor, policy: Policy) -> Tensor:
        """Computes the same as `forward`, on batch-invariant kernels."""
        weight, bias = self.linear.weight, self.linear.bias
        out = ops.linear(x, weight.to(x), None if bias is None else bias.to(x), policy=policy)
        out = ops.elementwise(ACTIVATIONS[self.activation], out, policy=policy)
        if not self.use_residual:
            return out
        return out + (
            ops.linear(x, self.residual.weight.to(x), None, policy=policy) if hasattr(self, "residual") else x
        )

    def settings(self) -> dict[str, Any]:
        settings = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{getattr(nn, self.activation).__module__}.{self.activation}",
        }
        return {**settings, "use_residual": True} if self.use_residual else settings


class LayerNorm(nn.Module):
    """A LayerNorm normalises sentence vectors, in the dtype of x: (B, K) -> (B, K)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)

    def settings(self) -> dict[str, Any]:
        return {"dimension": self.norm.normalized_shape[0]}


class Dropout(nn.Dropout):
    """A Dropout does nothing at inference. It is kept so that a saved folder can be trained further."""

    def settings(self) -> dict[str, Any]:
        return {"dropout": self.p}


class Normalize(nn.Module):
    """A Normalize computes x / max(||x||_2, 1e-12): (B, K) -> (B, K)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    def settings(self) -> dict[str, Any]:
        return {}


def output_size(modules: Iterable[nn.Module], size: int) -> int:
    """Returns the length of vectors after the modules. Raises ValueError if a module does not fit its input.

    size: the length before the first module.
    """
    for i, module in enumerate(modules):
        settings: dict[str, Any] = getattr(module, "settings", dict)()
        expected = settings.get("in_features", settings.get("dimension", size))
        if expected != size:
            raise ValueError(f"tail[{i}], {type(module).__name__}: takes vectors of {expected}, gets {size}")
        size = settings.get("out_features", size)
    return size


def apply(module: Callable[[Tensor], Tensor], x: Tensor, policy: Policy) -> Tensor:
    """Returns module(x) for sentence vectors (B, K), on batch-invariant kernels if the policy requires them.

    PyTorch's sums over a row may depend on the number of rows, in norms as well as in products. Raises BackendError for
    a module that is not known to be batch-invariant.
    """
    if recording.on:
        recording.enter(module)
    if not policy.batch_invariant or isinstance(module, nn.Dropout):
        if recording.on and (output := recording.call(module, x)) is not None:
            return output
        return module(x)
    if isinstance(module, Dense):
        return module.invariant(x, policy)
    if isinstance(module, LayerNorm):
        norm = module.norm
        return ops.bias_residual_layer_norm(x, None, None, norm.weight.to(x), norm.bias.to(x), norm.eps, policy=policy)
    if isinstance(module, Normalize):
        one_row_each = torch.arange(x.shape[0] + 1, out=x.new_empty(x.shape[0] + 1, dtype=torch.int32))
        return ops.pool(x, one_row_each, "cls", normalize=True, policy=policy)
    dispatch.refuse("", f"a module {type(module).__name__} after the pooling does not support it")
    return module(x)
