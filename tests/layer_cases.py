"""Tests of a layer with gradients share random layers, batches and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoint.activations import activate
from fastbert.ops import dropout, packing
from fastbert.ops.training.kernels import Attention, Kernels
from fastbert.ops.training.layer import LayerParameters, LayerSettings, encoder_layer, plain_layer
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, OUTPUT, Dropout, site_of, threshold_of

NAMES = tuple(name for name in LayerParameters.__dataclass_fields__ if name != "position_bias")
LENGTHS = {
    "mixed": [5, 1, 9, 0, 17, 3],
    "ones": [1] * 21,
    "one long": [1, 70, 2, 1],
    "one token": [1],
    "none": [0, 0],
}


def random_parameters(
    hidden: int, inner: int, dtype: torch.dtype = torch.float64, device: Any = "cpu", seed: int = 0
) -> LayerParameters:
    """A layer's parameters, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, about: float = 0.0, size: float = 1.0) -> Tensor:
        values = about + size * torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.to(device, dtype).requires_grad_()

    square, small = lambda: draw(hidden, hidden, size=1.2 * hidden**-0.5), lambda n: draw(n, size=0.1)
    return LayerParameters(
        square(), square(), square(), small(hidden), small(hidden), small(hidden), square(), small(hidden),
        draw(hidden, about=1.0, size=0.2), small(hidden), draw(inner, hidden, size=hidden**-0.5), small(inner),
        draw(hidden, inner, size=inner**-0.5), small(hidden), draw(hidden, about=1.0, size=0.2), small(hidden),
    )  # fmt: skip


def settings_for(
    lengths: Sequence[int],
    num_heads: int,
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    activation: str = "gelu",
    device: Any = "cpu",
    seed: int = 1234567890123,
    head_size: int = 16,
) -> LayerSettings:
    batch = packing.from_lengths(lengths, device)
    kinds = ATTENTION, ATTENTION_OUTPUT, OUTPUT
    drops = [Dropout(threshold_of(p), seed, site_of(3, kind)) if p else None for kind in kinds]
    attention = Attention(batch, num_heads, head_size**-0.5, drops[0])
    return LayerSettings(kernels, attention, activation, (1e-12, 1e-12), (drops[1], drops[2]), dtype)


def tensors_of(parameters: LayerParameters) -> dict[str, Tensor]:
    """The parameters that are there, by name."""
    return {name: tensor for name, tensor in vars(parameters).items() if tensor is not None}


def leaves(x: Tensor, parameters: LayerParameters, dtype: torch.dtype) -> tuple[Tensor, LayerParameters]:
    """Copies that collect gradients of their own."""
    copies: list[Any] = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, *parameters.listed())
    ]
    return copies[0], LayerParameters(*copies[1:])


def eager_layer(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """The layer as PyTorch eager computes it in the dtypes of its tensors, or of autocast; masks are those of ours."""
    first, last = settings.dropouts
    qkv = torch.cat([F.linear(x, w, b) for w, b in zip(p.qkv, p.qkv_biases, strict=True)], 1)
    z = F.linear(_eager_attention(qkv, settings.attention), p.out, p.out_bias)
    size = (x.shape[1],)
    y = F.layer_norm(dropout.apply(z, first) + x, size, p.attention_norm, p.attention_norm_bias, settings.eps[0])
    z = F.linear(activate(F.linear(y, p.up, p.up_bias), settings.activation), p.down, p.down_bias)
    return F.layer_norm(dropout.apply(z, last) + y, size, p.output_norm, p.output_norm_bias, settings.eps[1])


def _eager_attention(qkv: Tensor, settings: Attention) -> Tensor:
    outs = []
    for start, end in pairwise(settings.batch.cu_seqlens_cpu.tolist()):
        rows = torch.arange(start, end, device=qkv.device)
        q, k, v = qkv[start:end].unflatten(1, (3, settings.num_heads, -1)).permute(1, 2, 0, 3)  # each (N, length, D)
        probabilities = torch.softmax(q @ k.transpose(-1, -2) * settings.scale, -1)
        if settings.dropout is not None:
            kept = dropout.keep(rows[None], end - start, settings.dropout, settings.num_heads)[0]
            probabilities = probabilities * (kept * settings.dropout.scale).to(probabilities.dtype)
        outs.append((probabilities @ v).transpose(0, 1).flatten(1))
    return torch.cat([*outs, qkv[:0, : qkv.shape[1] // 3]])


Layer = Callable[[Tensor, LayerParameters, LayerSettings], Tensor]


def gradients(
    layer: Layer, x: Tensor, parameters: LayerParameters, settings: LayerSettings, grad: Tensor
) -> dict[str, Tensor]:
    """The output and the gradients of x and of every parameter, by name.

    Queries, keys and values are one product: softmax does not see a key alone. It never sees a key's bias, whose exact
    gradient is 0, so that no relative error of it has a meaning.
    """
    output = layer(x, parameters, settings)
    inputs = {"x": x, **tensors_of(parameters)}
    found = torch.autograd.grad(output, list(inputs.values()), grad.to(output.dtype), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs.values(), strict=True)]
    named = {"output": output.detach(), **dict(zip(inputs, filled, strict=True))}
    named["qkv"] = torch.cat([named.pop(name) for name in ("query", "key", "value")])
    assert named.pop("key_bias").abs().max() < 0.1
    named["qkv_bias"] = torch.cat([named.pop(name) for name in ("query_bias", "value_bias")])
    return named


def compared(
    lengths: Sequence[int],
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    hidden: int = 64,
    inner: int = 112,
    num_heads: int = 4,
    stream: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Computes one layer on random rows by our kernels, by PyTorch eager in the same dtypes, and in float64."""
    stream = dtype if stream is None else stream
    generator = torch.Generator().manual_seed(7)
    device = options.get("device", "cpu")
    x, grad = (
        torch.randn(sum(lengths), hidden, dtype=torch.float64, generator=generator).to(device, stream) for _ in range(2)
    )
    parameters = random_parameters(hidden, inner, stream, device)
    settings = settings_for(lengths, num_heads, kernels, dtype, head_size=hidden // num_heads, **options)
    ours = gradients(encoder_layer, *leaves(x, parameters, stream), settings, grad)
    exact = gradients(plain_layer, *leaves(x, parameters, torch.float64), settings, grad.double())
    with torch.autocast(x.device.type, dtype, enabled=stream != dtype):
        eager = gradients(eager_layer, *leaves(x, parameters, stream), settings, grad)
    return ours, eager, exact
