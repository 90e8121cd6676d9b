"""This module runs a pre-norm layer, as ModernBERT's: attention and feed-forward normalise their inputs.

    y = x + attention(LayerNorm(x)),    y + feed_forward(LayerNorm(y))

The first norm may be missing, and the last layer has one more, of its output. With S = C, it keeps for the backward
pass for each token, in the dtype of products: the input H, both norms' outputs 2 H, queries, keys and values 3 H, the
attention's output H, the sum in the middle H, and the activation's input. The activation is computed again.

With S = float32 under autocast, the sums and the norms stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert.ops.training.parts import (
    LayerParameters,
    LayerSettings,
    Wanted,
    attend,
    attend_backward,
    drop,
    feed_backward,
    feed_forward,
    plain_attend,
    plain_feed_forward,
    plain_norm,
)


def forward(x: Tensor, p: LayerParameters, settings: LayerSettings) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the output, and the data for the backward pass.

    The data are x in C if there is no first norm, else None, the first norm's output in C, mean and rstd; qkv, context
    and lse; the sum in the middle, its mean and rstd, the second norm's output in C, pre; the last norm's total, mean
    and rstd.
    """
    kernels, to, (first_drop, last_drop) = settings.kernels, settings.dtype, settings.dropouts
    first_eps, second_eps = settings.eps
    before: tuple[Tensor | None, Tensor | None] = None, None
    if p.attention_norm is None or p.attention_norm_bias is None:
        low = x.to(to)
    else:
        normed = kernels.norm_forward(x, None, p.attention_norm, p.attention_norm_bias, first_eps, None, False)
        low, before = normed.y.to(to), (normed.mean, normed.rstd)
        del normed
    z, attention = attend(low, p, settings, kernels)
    norm = p.output_norm, p.output_norm_bias, second_eps
    if x.dtype == to:
        second = kernels.norm_forward(z, x, *norm, first_drop, False)
    else:
        second = kernels.norm_forward(x + drop(kernels, z, first_drop), None, *norm, None, False)
    middle, stream = second.y.to(to), second.total
    z, pre = feed_forward(middle, p, settings, kernels)
    kept = low if low is not x else None, *before, *attention, *second[2:], middle, pre
    if p.last_norm is None or p.last_norm_bias is None:
        return stream + drop(kernels, z, last_drop), kept
    last = kernels.norm_forward(z, stream, p.last_norm, p.last_norm_bias, settings.last_eps, last_drop, False)
    return last.y, (*kept, *last[2:])


def backward(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], p: LayerParameters, settings: LayerSettings, wanted: Wanted
) -> Tensor | None:
    """Returns the gradient of x, if it is needed."""
    kernels, to, (first_drop, last_drop) = settings.kernels, settings.dtype, settings.dropouts
    low = x if kept[0] is None else kept[0]
    before, attention, second, (middle, pre), last = kept[1:3], kept[3:6], kept[6:9], kept[9:11], kept[11:]

    d_stream, grad = grad, grad.contiguous()
    if p.last_norm is None:
        d_z = drop(kernels, grad.to(to), last_drop)
    else:
        of_last = kernels.norm_backward(grad, None, last, p.last_norm, last_drop, None, True)
        wanted.vectors(down_bias=of_last.x_bias, last_norm=of_last.weight, last_norm_bias=of_last.bias)
        assert of_last.residual is not None
        d_z, d_stream = of_last.x, of_last.residual
    d_pre = feed_backward(d_z, middle, pre, p, settings, wanted, p.last_norm is None)
    if not wanted.before("up") and not wanted.needed["output_norm"] and not wanted.needed["output_norm_bias"]:
        return None
    d_middle = kernels.input_gradient(d_pre, p.inner)
    of_second = kernels.norm_backward(d_middle.to(x.dtype), None, second, p.output_norm, None, None, False)
    del d_pre, d_middle
    wanted.vectors(output_norm=of_second.weight, output_norm_bias=of_second.bias)
    if not wanted.before("up"):
        return None
    d_stream = d_stream + of_second.x
    d_z = drop(kernels, d_stream.to(to), first_drop)
    d_qkv = attend_backward(d_z, low, attention, p, settings, wanted, True)
    if d_qkv is None:
        return None
    if p.attention_norm is None:
        return kernels.input_gradient(d_qkv, p.qkv, d_stream) if wanted.x else None
    if not (wanted.x or wanted.needed["attention_norm"] or wanted.needed["attention_norm_bias"]):
        return None
    d_low = kernels.input_gradient(d_qkv, p.qkv)
    of_first = kernels.norm_backward(d_low.to(x.dtype), None, (x, *before), p.attention_norm, None, None, False)
    wanted.vectors(attention_norm=of_first.weight, attention_norm_bias=of_first.bias)
    return d_stream + of_first.x if wanted.x else None


def plain(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes the layer in plain, differentiable PyTorch."""
    (first_drop, last_drop), (first_eps, second_eps) = settings.dropouts, settings.eps
    normed = x
    if p.attention_norm is not None:
        normed = plain_norm(x, None, p.attention_norm, p.attention_norm_bias, first_eps)
    x = x + masks.apply(plain_attend(normed, p, settings), first_drop)
    normed = plain_norm(x, None, p.output_norm, p.output_norm_bias, second_eps)
    x = x + masks.apply(plain_feed_forward(normed, p, settings), last_drop)
    return x if p.last_norm is None else plain_norm(x, None, p.last_norm, p.last_norm_bias, settings.last_eps)
