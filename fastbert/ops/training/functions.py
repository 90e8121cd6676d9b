"""This module holds single operations with gradients, for layers that do not run as one: with adapters or hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops.training.kernels import Attention, Kernels
from fastbert.ops.training.once import again, batched, once
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels.masks import Dropout


def attention(qkv: Tensor, settings: Attention, kernels: Kernels, position_bias: Tensor | None = None) -> Tensor:
    """Computes softmax(scale q k^T + bias) v in each sequence, with dropout of probabilities: (T, 3 N D) -> (T, N D).

    position_bias: (N, 2R + 1), see fastbert.ops.position_bias.
    """
    out: Tensor = _Attention.apply(qkv, position_bias, settings, kernels)
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, kernels: Kernels, to: torch.dtype
) -> Tensor:
    """Computes activation(x W^T + b), (T, K) -> (T, M), in dtype `to`. activation: "none", or one of the kernels'."""
    out: Tensor = _Linear.apply(x, weight, bias, activation, kernels, to)
    return out


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    kernels: Kernels,
    dropout: Dropout | None = None,
    out_dropout: Dropout | None = None,
) -> Tensor:
    """Computes LayerNorm(dropout(x) + residual) * weight + bias, (T, H), in the residual's dtype.

    out_dropout: the dropout of the result.
    """
    y: Tensor = _ResidualNorm.apply(x, residual, weight, bias, eps, kernels, dropout, out_dropout)
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, settings: Attention, kernels: Kernels) -> Tensor:
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        with torch.autocast(qkv.device.type, enabled=False):
            out, lse = kernels.attention_forward(qkv, settings, bias)
        ctx.settings, ctx.kernels = settings, kernels
        ctx.save_for_backward(qkv, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, bias, out, lse = ctx.saved_tensors
        settings, differentiable = ctx.settings, torch.is_grad_enabled()
        if batched(grad) or (differentiable and settings.dropout is None):
            inputs = qkv, bias, None, None

            def plain(qkv: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
                return PLAIN.attention_forward(qkv, settings, bias)[0]

            return again(plain, grad, inputs, ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            d_qkv, d_bias = ctx.kernels.attention_backward(grad.contiguous(), qkv, out, lse, settings, bias)
            grads = d_qkv, None if d_bias is None else d_bias.to(bias.dtype), None, None
        return once(grads) if differentiable else grads


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, kernels: Kernels, to: torch.dtype
    ) -> Tensor:
        low = x.to(to)
        low = low if low.stride(-1) == 1 else low.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            if activation == "none":
                out, pre = kernels.linear(low, (weight,), (bias,)), None
            else:
                out, pre = kernels.activated_linear(low, weight, bias, activation)
        ctx.activation, ctx.kernels, ctx.dtype = activation, kernels, x.dtype
        ctx.save_for_backward(low if ctx.needs_input_grad[1] else None, weight, bias, pre)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, pre = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        kernels = ctx.kernels
        grads: list[Tensor | None] = [None] * 6
        differentiable = torch.is_grad_enabled()
        if (differentiable or batched(grad)) and x is not None and ctx.dtype == x.dtype == weight.dtype:
            return again(_plain_linear(ctx.activation), grad, (x, weight, bias, None, None, None), ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sums = None
            grad = grad.contiguous()
            if pre is not None:
                grad, _, sums = kernels.activation_backward(grad, pre, ctx.activation)
            if need_x:
                grads[0] = kernels.input_gradient(grad, (weight,)).to(ctx.dtype)
            if need_weight:
                grads[1], row_sums = kernels.weight_gradient(grad, x, weight.dtype, need_bias and sums is None)
                sums = row_sums if sums is None else sums
            if need_bias:
                sums = grad.float().sum(0) if sums is None else sums
                grads[2] = sums.to(bias.dtype)
        return once(tuple(grads)) if differentiable else tuple(grads)


def _plain_linear(activation: str) -> Any:
    """Returns the linear in plain PyTorch, as a function of the inputs of its autograd node."""

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        if activation == "none":
            return PLAIN.linear(x, (weight,), (bias,))
        return PLAIN.activated_linear(x, weight, bias, activation)[0]

    return function


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        kernels: Kernels,
        dropout: Dropout | None,
        out_dropout: Dropout | None,
    ) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            done = kernels.norm_forward(x, residual, weight, bias, eps, dropout, False)
        y = done.y if out_dropout is None else kernels.drop(done.y, out_dropout)
        ctx.kernels, ctx.eps, ctx.drops = kernels, eps, (dropout, out_dropout)
        # Without dropout the sum is computed again, because a second derivative needs its inputs.
        summed = (x, residual, None) if ctx.drops == (None, None) else (None, None, done.total)
        ctx.save_for_backward(*summed, done.mean, done.rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, residual, total, mean, rstd, weight, bias = ctx.saved_tensors
        differentiable, need = torch.is_grad_enabled(), ctx.needs_input_grad
        if (differentiable or batched(grad)) and total is None:
            inputs = x, residual, weight, bias, ctx.eps, None, None, None
            return again(_plain_norm(ctx.eps), grad, inputs, need)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if total is None:
                total = (x if residual is None else (x + residual).to(x.dtype)).contiguous()
            saved = total, mean, rstd
            done = ctx.kernels.norm_backward(grad.contiguous(), None, saved, weight, *ctx.drops, need[1])
        vectors = done.weight.to(weight.dtype), done.bias.to(bias.dtype)
        grads = (done.x if need[0] else None, done.residual, *vectors, None, None, None, None)
        return once(grads) if differentiable else grads


def _plain_norm(eps: float) -> Any:
    """Returns the norm in plain PyTorch, as a function of the inputs of its autograd node."""

    def function(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
        return PLAIN.norm_forward(x, residual, weight, bias, eps, None, False).y

    return function
