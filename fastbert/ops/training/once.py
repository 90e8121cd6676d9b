"""This module handles second derivatives: by PyTorch's rules if the function can run again, else with an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SECOND_DERIVATIVE = (
    "fastbert: the kernels for training have no second derivative under dropout or autocast; for a gradient of a "
    "gradient (create_graph=True) turn both off, as eval() does with dropout, or run the model with backend='torch'"
)


def batched(grad: Tensor) -> bool:
    """Tells whether a gradient is a batch of many (is_grads_batched or vmap), which kernels cannot read."""
    functorch: Any = torch._C._functorch
    return bool(functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad))


def once(grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the gradients, with a node that raises RuntimeError if they are differentiated."""
    places = [i for i, gradient in enumerate(grads) if gradient is not None]
    if not places:
        return grads
    node: Any = torch._C._functions.DelayedError(SECOND_DERIVATIVE.encode(), len(places))
    marked = node(*[grads[i].detach().requires_grad_() for i in places])
    out = list(grads)
    for i, gradient in zip(places, marked if len(places) > 1 else [marked], strict=True):
        out[i] = gradient
    return tuple(out)


def again(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Returns differentiable gradients of function(*tensors), computed again in plain PyTorch.

    inputs: the inputs of the autograd node, which are also the function's; entries that are not tensors are None.
    """
    places = [i for i, need in enumerate(needed) if need]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        views: list[Any] = [t.view_as(t) if isinstance(t, Tensor) else None for t in inputs]
        output = function(*views)
        gradients = torch.autograd.grad(output, [views[i] for i in places], grad, create_graph=differentiable)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(places, gradients, strict=True):
        grads[i] = gradient
    return tuple(grads)
