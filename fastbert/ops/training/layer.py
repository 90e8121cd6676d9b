"""This module runs a whole encoder layer as one node of autograd, post-norm or pre-norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops.training import post_norm, pre_norm
from fastbert.ops.training.once import again, batched, once
from fastbert.ops.training.parts import NAMES, LayerParameters, LayerSettings, Wanted

__all__ = ["LayerParameters", "LayerSettings", "encoder_layer", "plain_layer"]


def encoder_layer(x: Tensor, parameters: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes a layer, (T, H) -> (T, H) in x's dtype: attention, feed-forward, dropout, residuals and LayerNorms."""
    output: Tensor = _EncoderLayer.apply(x, settings, *parameters.listed())
    return output


def plain_layer(x: Tensor, parameters: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes the layer in plain, differentiable PyTorch."""
    return _form(settings).plain(x, parameters, settings)


def _form(settings: LayerSettings) -> Any:
    return pre_norm if settings.pre_norm else post_norm


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: LayerSettings, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            y, kept = _form(settings).forward(x, LayerParameters(*parameters), settings)
        ctx.settings = settings
        # PyTorch raises its own error for a parameter that is written to before the backward pass.
        read_again = x.dtype == settings.dtype or settings.pre_norm
        ctx.save_for_backward(x if read_again else None, *kept, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x, *kept), settings = ctx.saved_tensors, ctx.settings
        kept, parameters = kept[: -len(NAMES)], kept[-len(NAMES) :]
        needed = ctx.needs_input_grad
        differentiable = x is not None and x.dtype == settings.dtype
        if differentiable and (batched(grad) or (torch.is_grad_enabled() and not settings.drops_out)):
            return again(
                lambda x, _, *p: plain_layer(x, LayerParameters(*p), settings), grad, (x, None, *parameters), needed
            )
        p = LayerParameters(*parameters)
        wanted = Wanted(settings.kernels, p, (needed[0], *needed[2:]))
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            d_x = _form(settings).backward(grad, x, kept, p, settings, wanted)
        grads = d_x, None, *wanted.listed()
        return once(grads) if torch.is_grad_enabled() else grads
