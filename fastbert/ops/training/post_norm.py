"""This module runs a post-norm layer, as BERT's: LayerNorm(x + attention(x)), then LayerNorm(y + feed_forward(y)).

For the backward pass it keeps for each token, in the dtype of products: the input H, queries, keys and values 3 H, the
attention's output H, both sums before a norm 2 H, the first norm's output H, and the activation's input, I. With I = 4
H and 2 bytes each these are 24 H bytes. The activation itself is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastbert.ops.training.parts import (
    LayerParameters,
    LayerSettings,
    Wanted,
    attend,
    attend_backward,
    feed_backward,
    feed_forward,
    plain_attend,
    plain_feed_forward,
    plain_norm,
)


def forward(x: Tensor, p: LayerParameters, settings: LayerSettings) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the output, and the data for the backward pass.

    The data are x in C if its dtype is not C, qkv, context, lse, (total, mean, rstd), y in C, pre, (total, mean, rstd).
    """
    kernels, (first_drop, last_drop), (first_eps, last_eps) = settings.kernels, settings.dropouts, settings.eps
    assert p.attention_norm is not None and p.attention_norm_bias is not None
    mixed = x.dtype != settings.dtype
    low = x.to(settings.dtype)
    z, attention = attend(low, p, settings, kernels)
    first = kernels.norm_forward(z, x, p.attention_norm, p.attention_norm_bias, first_eps, first_drop, mixed)
    middle = first.y if first.low is None else first.low
    z, pre = feed_forward(middle, p, settings, kernels)
    last = kernels.norm_forward(z, first.y, p.output_norm, p.output_norm_bias, last_eps, last_drop, False)
    return last.y, (low if mixed else None, *attention, *first[2:], middle, pre, *last[2:])


def backward(
    grad: Tensor, x: Tensor | None, kept: Sequence[Tensor], p: LayerParameters, settings: LayerSettings, wanted: Wanted
) -> Tensor | None:
    """Returns the gradient of x, if it is needed. x: None if `kept` has it in C."""
    kernels, (first_drop, last_drop) = settings.kernels, settings.dropouts
    low = kept[0] if x is None else x
    attention, first, (middle, pre) = kept[1:4], kept[4:7], kept[7:9]
    assert p.attention_norm is not None

    last = kernels.norm_backward(grad.contiguous(), None, kept[9:], p.output_norm, last_drop, None, True)
    wanted.vectors(down_bias=last.x_bias, output_norm=last.weight, output_norm_bias=last.bias)
    d_pre = feed_backward(last.x, middle, pre, p, settings, wanted, False)
    if not wanted.before("up"):
        return None
    d_middle = kernels.input_gradient(d_pre, p.inner)
    assert last.residual is not None
    of_first = kernels.norm_backward(last.residual, d_middle, first, p.attention_norm, first_drop, None, wanted.x)
    del d_pre, d_middle, last
    wanted.vectors(out_bias=of_first.x_bias, attention_norm=of_first.weight, attention_norm_bias=of_first.bias)
    d_qkv = attend_backward(of_first.x, low, attention, p, settings, wanted, False)
    return None if d_qkv is None or not wanted.x else kernels.input_gradient(d_qkv, p.qkv, of_first.residual)


def plain(x: Tensor, p: LayerParameters, settings: LayerSettings) -> Tensor:
    """Computes the layer in plain, differentiable PyTorch."""
    (first_drop, last_drop), (first_eps, last_eps) = settings.dropouts, settings.eps
    assert p.attention_norm is not None
    z = plain_attend(x, p, settings)
    y = plain_norm(z, x, p.attention_norm, p.attention_norm_bias, first_eps, first_drop)
    return plain_norm(plain_feed_forward(y, p, settings), y, p.output_norm, p.output_norm_bias, last_eps, last_drop)
