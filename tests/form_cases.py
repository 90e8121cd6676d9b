"""Tests of layers with gradients share forms that are not BERT's: pre-norm, gated, rotary, windowed, without biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoint.activations import activate
from fastbert.ops import dropout
from fastbert.ops.rotary import rotations
from fastbert.ops.training.kernels import Kernels, Rotation
from fastbert.ops.training.layer import LayerParameters, LayerSettings, encoder_layer, plain_layer
from fastbert_kernels.masks import INNER, Dropout, site_of, threshold_of
from layer_cases import leaves, random_parameters, settings_for, tensors_of
from window_cases import holes, within

BIASES = ("query_bias", "key_bias", "value_bias", "out_bias", "up_bias", "down_bias")
# ModernBERT's first, middle and last layer; Nomic's; GTE's; and one with a scale of its own and masks with holes.
FORMS: dict[str, dict[str, Any]] = {
    "first": {"pre_norm": True, "biases": (), "joint": True, "normed": False},
    "middle": {"pre_norm": True, "biases": (), "joint": True, "window": 4},
    "last": {"pre_norm": True, "biases": ("down_bias",), "joint": True, "last": True},
    "nomic": {"biases": (), "activation": "silu"},
    "gte": {"biases": ("query_bias", "key_bias", "value_bias", "out_bias", "down_bias")},
    "scaled": {"pre_norm": True, "biases": BIASES, "window": 3, "with_holes": True, "scale": 0.2},
}


def make(
    form: str,
    lengths: Sequence[int],
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    hidden: int = 64,
    inner: int = 96,
    num_heads: int = 4,
    device: Any = "cpu",
    stream: torch.dtype = torch.float64,
) -> tuple[LayerParameters, LayerSettings]:
    """A layer of a form, with random parameters in the stream's dtype."""
    made = {"pre_norm": False, "joint": False, "normed": True, "last": False, "window": None, "activation": "gelu",
            "with_holes": False, "scale": None} | FORMS[form]  # fmt: skip
    generator, head_size = torch.Generator().manual_seed(3), hidden // num_heads

    def draw(*shape: int, about: float = 0.0, size: float = 0.1) -> Tensor:
        values = about + size * torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.to(device, stream).requires_grad_()

    values = vars(random_parameters(hidden, inner, stream, device))
    values |= {name: None for name in BIASES if name not in made["biases"]}
    values |= {"gate": draw(inner, hidden, size=hidden**-0.5)}
    if "up_bias" in made["biases"]:
        values |= {"gate_bias": draw(inner)}
    if made["joint"]:
        values["query"] = _joined(values, "query", "key", "value")
        values["up"] = _joined(values, "up", "gate")
        values |= dict.fromkeys(("key", "value", "gate"))
    if not made["normed"]:
        values |= dict.fromkeys(("attention_norm", "attention_norm_bias"))
    if made["last"]:
        values |= {"last_norm": draw(hidden, about=1.0), "last_norm_bias": draw(hidden)}
    base = settings_for(
        lengths, num_heads, kernels, dtype, p=p, activation=made["activation"], device=device, head_size=head_size
    )
    columns = None
    if made["with_holes"]:
        base.attention.batch.columns = columns = holes(list(lengths)).to(device)
    attention = base.attention._replace(window=made["window"], columns=columns)
    if made["scale"] is not None:
        attention = attention._replace(scale=made["scale"])
    angles = rotations(base.attention.batch.position_ids.to(device), head_size, 10.0)
    drop = Dropout(threshold_of(p), 1234567890123, site_of(3, INNER)) if p else None
    settings = replace(
        base, attention=attention, gated=True, inner_dropout=drop, rotation=Rotation(*angles), eps=(1e-5, 1e-5),
        pre_norm=made["pre_norm"], last_eps=1e-5,
    )  # fmt: skip
    return LayerParameters(**values), settings


def _joined(values: dict[str, Any], *names: str) -> Tensor:
    return torch.cat([values[name].detach() for name in names]).requires_grad_()


def eager_form(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """The layer as PyTorch eager computes it in the dtypes of its tensors, or of autocast; masks are those of ours."""
    first, last = settings.dropouts

    def norm(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return y if weight is None else F.layer_norm(y, (y.shape[1],), weight, bias, eps)

    norms = ((p.attention_norm, p.attention_norm_bias, settings.eps[0]),
             (p.output_norm, p.output_norm_bias, settings.eps[1]))  # fmt: skip
    if settings.pre_norm:
        x = x + dropout.apply(_attention(norm(x, *norms[0]), p, settings), first)
        x = x + dropout.apply(_feed_forward(norm(x, *norms[1]), p, settings), last)
        return norm(x, p.last_norm, p.last_norm_bias, settings.last_eps)
    x = norm(dropout.apply(_attention(x, p, settings), first) + x, *norms[0])
    return norm(dropout.apply(_feed_forward(x, p, settings), last) + x, *norms[1])


def _attention(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    assert settings.rotation is not None
    qkv = torch.cat([F.linear(x, w, b) for w, b in zip(p.qkv, p.qkv_biases, strict=True)], 1)
    q, k, v = qkv.unflatten(1, (3, settings.attention.num_heads, -1)).unbind(1)
    cos, sin = (torch.cat([t, t], 1)[:, None].to(q.dtype) for t in settings.rotation)
    q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
    of = settings.attention
    lengths = of.batch.cu_seqlens_cpu.diff().tolist()
    window = 1 << 20 if of.window is None else of.window
    columns = None if of.columns is None else of.columns
    turned = torch.stack([q, k, v], 1).flatten(1)
    context = within(turned, lengths, of.num_heads, window, columns, of.dropout, of.scale)
    return F.linear(context, p.out, p.out_bias)


def _feed_forward(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    pre = torch.cat([F.linear(x, w, b) for w, b in zip(p.inner, p.inner_biases, strict=True)], 1)
    first, second = pre.chunk(2, -1)
    inner = dropout.apply(activate(first, settings.activation) * second, settings.inner_dropout)
    return F.linear(inner, p.down, p.down_bias)


def gradients(layer: Any, x: Tensor, p: LayerParameters, settings: LayerSettings, grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of x and of every parameter, by name.

    Queries, keys and values are one product: see `layer_cases.gradients`. A key's bias turns, so it has a gradient.
    """
    inputs = {"x": x, **tensors_of(p)}
    output = layer(x, p, settings)
    found = torch.autograd.grad(output, list(inputs.values()), grad.to(output.dtype))
    named = {"output": output.detach(), **dict(zip(inputs, found, strict=True))}
    if "key" in named:
        named["qkv"] = torch.cat([named.pop(name) for name in ("query", "key", "value")])
    return named


def compared(
    form: str,
    lengths: Sequence[int],
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    stream: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Computes one layer on random rows by our kernels, by PyTorch eager in the same dtypes, and in float64."""
    stream = dtype if stream is None else stream
    p, settings = make(form, lengths, kernels, dtype, stream=stream, **options)
    generator = torch.Generator().manual_seed(7)
    x, grad = (
        torch.randn(sum(lengths), p.out.shape[0], dtype=torch.float64, generator=generator).to(p.out.device, stream)
        for _ in range(2)
    )
    ours = gradients(encoder_layer, *leaves(x, p, stream), settings, grad)
    exact = gradients(plain_layer, *leaves(x, p, torch.float64), settings, grad.double())
    with torch.autocast(x.device.type, dtype, enabled=stream != dtype):
        eager = gradients(eager_form, *leaves(x, p, stream), settings, grad)
    return ours, eager, exact
