"""A whole encoder layer as one node of autograd.

It keeps for the backward pass, of a token, in the dtype of products: the input H, queries, keys and values 3 H, the
attention's output H, both sums before a norm 2 H, the first norm's output H, and what GELU reads, I. With I = 4 H and
2 bytes each that is 24 H bytes. The activation itself is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.training.kernels import Attention, Kernels
from fastbert.ops.training.once import again, batched, once
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels.masks import Dropout


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """What a layer is beside its parameters. eps: of both norms. dropouts: of both sums. dtype: of the products."""

    kernels: Kernels
    attention: Attention
    activation: str
    eps: tuple[float, float]
    dropouts: tuple[Dropout | None, Dropout | None]
    dtype: torch.dtype

    @property
    def drops_out(self) -> bool:
        return any(d is not None for d in (self.attention.dropout, *self.dropouts))


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """The parameters of a layer, in the order in which its node of autograd takes them. Biases may be None.

    position_bias: (N, 2R + 1), added to attention's scores: see fastbert.ops.position_bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    attention_norm: Tensor
    attention_norm_bias: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    output_norm: Tensor
    output_norm_bias: Tensor
    position_bias: Tensor | None = None

    def listed(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def qkv_biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.query_bias, self.key_bias, self.value_bias


QUERY, OUT, UP, DOWN, POSITION_BIAS = 0, 6, 10, 12, 16  # Places in LayerParameters.


def encoder_layer(x: Tensor, parameters: LayerParameters, settings: LayerSettings) -> Tensor:
    """(T, H) -> (T, H) in x's dtype: attention and feed-forward part, each with dropout, residual and LayerNorm."""
    output: Tensor = _EncoderLayer.apply(x, settings, *parameters.listed())
    return output


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: LayerSettings, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, kept = _forward(x, LayerParameters(*parameters), settings)
        ctx.settings = settings
        # PyTorch raises its own error for a parameter that is written to before the backward pass.
        ctx.save_for_backward(x if x.dtype == settings.dtype else None, *kept, *parameters)
        ctx.stream = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, settings = ctx.saved_tensors, ctx.settings
        x, kept, parameters = saved[0], saved[1 : 1 + N_KEPT], LayerParameters(*saved[1 + N_KEPT :])
        needed = ctx.needs_input_grad
        if x is not None and (batched(grad) or (torch.is_grad_enabled() and not settings.drops_out)):
            return again(
                lambda x, _, *p: plain_layer(x, LayerParameters(*p), settings), grad, (x, None, *saved[13:]), needed
            )
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            grads = _backward(grad, kept if x is None else (x, *kept[1:]), parameters, settings, needed)
        return once(grads) if torch.is_grad_enabled() else grads


# x in C, qkv, context, lse, (total, mean, rstd), y in C, pre, (total, mean, rstd)
N_KEPT = 12


def _forward(x: Tensor, p: LayerParameters, settings: LayerSettings) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and what the backward pass needs."""
    kernels, (first_drop, last_drop), (first_eps, last_eps) = settings.kernels, settings.dropouts, settings.eps
    mixed = x.dtype != settings.dtype
    low = x.to(settings.dtype)
    qkv = kernels.linear(low, p.qkv, p.qkv_biases)
    context, lse = kernels.attention_forward(qkv, settings.attention, p.position_bias)
    z = kernels.linear(context, (p.out,), (p.out_bias,))
    first = kernels.norm_forward(z, x, p.attention_norm, p.attention_norm_bias, first_eps, first_drop, mixed)
    middle = first.y if first.low is None else first.low
    activated, pre = kernels.activated_linear(middle, p.up, p.up_bias, settings.activation)
    z = kernels.linear(activated, (p.down,), (p.down_bias,))
    del activated
    last = kernels.norm_forward(z, first.y, p.output_norm, p.output_norm_bias, last_eps, last_drop, False)
    return last.y, (low if mixed else None, qkv, context, lse, *first[2:], middle, pre, *last[2:])


def _backward(
    grad: Tensor,
    kept: Sequence[Tensor],
    p: LayerParameters,
    settings: LayerSettings,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    kernels, (first_drop, last_drop) = settings.kernels, settings.dropouts
    x, qkv, context, lse, *first, middle, pre = kept[:9]
    grads: list[Tensor | None] = [None] * len(needed)
    wanted = _Wanted(kernels, grads, p, needed)

    last = kernels.norm_backward(grad.contiguous(), None, kept[9:], p.output_norm, last_drop, None, True)
    wanted.vectors(DOWN + 1, last.x_bias, last.weight, last.bias)
    d_activated = kernels.input_gradient(last.x, (p.down,))
    d_pre, activated, d_up_bias = kernels.activation_backward(d_activated, pre, settings.activation)
    del d_activated
    wanted.weight(DOWN, last.x, activated)
    del activated
    wanted.weight(UP, d_pre, middle)
    wanted.vectors(UP + 1, d_up_bias)
    if not wanted.before(UP) and not needed[POSITION_BIAS + 2]:
        return tuple(grads)
    d_middle = kernels.input_gradient(d_pre, (p.up,))
    assert last.residual is not None
    first_grads = kernels.norm_backward(last.residual, d_middle, first, p.attention_norm, first_drop, None, needed[0])
    del d_pre, d_middle, last
    wanted.vectors(OUT + 1, first_grads.x_bias, first_grads.weight, first_grads.bias)
    wanted.weight(OUT, first_grads.x, context)
    if not wanted.before(OUT) and not needed[POSITION_BIAS + 2]:
        return tuple(grads)
    d_context = kernels.input_gradient(first_grads.x, (p.out,))
    d_qkv, d_bias = kernels.attention_backward(d_context, qkv, context, lse, settings.attention, p.position_bias)
    del d_context
    if d_bias is not None:
        wanted.vectors(POSITION_BIAS, d_bias)
    wanted.projections(d_qkv, x)
    if needed[0]:
        grads[0] = kernels.input_gradient(d_qkv, p.qkv, first_grads.residual)
    return tuple(grads)


class _Wanted:
    """Computes the gradients of parameters that need one. Places are those of LayerParameters."""

    def __init__(
        self, kernels: Kernels, grads: list[Tensor | None], p: LayerParameters, needed: Sequence[bool]
    ) -> None:
        self.kernels, self.grads, self.parameters, self.needed = kernels, grads, p.listed(), needed

    def before(self, place: int) -> bool:
        """Tells whether x, or a parameter before this place, needs a gradient."""
        return any(self.needed[: place + 2])

    def vectors(self, place: int, *sums: Tensor) -> None:
        """Takes sums over rows as the gradients of parameters, from a place on."""
        for i, total in enumerate(sums, place):
            parameter = self.parameters[i]
            if parameter is not None and self.needed[i + 2]:
                self.grads[i + 2] = total.to(parameter.dtype)

    def weight(self, place: int, grad: Tensor, x: Tensor) -> None:
        """The gradient of the weight at a place, from that of its product."""
        parameter = self.parameters[place]
        assert parameter is not None
        if self.needed[place + 2]:
            self.grads[place + 2], _ = self.kernels.weight_gradient(grad, x, parameter.dtype, False)

    def projections(self, grad: Tensor, x: Tensor) -> None:
        """The gradients of query, key and value, all of one product where all need one."""
        needed = self.needed[2:8]
        size = x.shape[1]
        parts = [slice(0, 3 * size)] if all(needed[:3]) else [slice(i * size, (i + 1) * size) for i in range(3)]
        for i, part in enumerate(parts):
            members = range(3) if len(parts) == 1 else (i,)
            if not any(needed[j] or needed[j + 3] for j in members):
                continue
            dtype = self.parameters[i].dtype  # type: ignore[union-attr]
            weight, bias = self.kernels.weight_gradient(grad[:, part], x, dtype, any(needed[3:]))
            for n, j in enumerate(members):
                rows = slice(n * size, (n + 1) * size)
                self.grads[2 + j] = weight[rows] if needed[j] else None
                if bias is not None and needed[j + 3]:
                    self.grads[5 + j] = bias[rows]


def plain_layer(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """The layer in plain, differentiable PyTorch."""
    (first_drop, last_drop), (first_eps, last_eps) = settings.dropouts, settings.eps
    qkv = PLAIN.linear(x, p.qkv, p.qkv_biases)
    context = PLAIN.attention_forward(qkv, settings.attention, p.position_bias)[0]
    z = PLAIN.linear(context, (p.out,), (p.out_bias,))
    y = PLAIN.norm_forward(z, x, p.attention_norm, p.attention_norm_bias, first_eps, first_drop, False).y
    activated = PLAIN.activated_linear(y, p.up, p.up_bias, settings.activation)[0]
    z = PLAIN.linear(activated, (p.down,), (p.down_bias,))
    return PLAIN.norm_forward(z, y, p.output_norm, p.output_norm_bias, last_eps, last_drop, False).y
