"""This module registers the fused kernels with `torch.library`, so torch.compile and torch.export accept them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastbert.ops import dispatch

LIBRARY = torch.library.Library("fastbert", "FRAGMENT")


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., tuple[torch.Tensor | None, ...]] | None = None,
) -> None:
    """Defines `torch.ops.fastbert.<name>` from a schema such as "bias_gelu(Tensor x, ...) -> Tensor".

    `kernel` runs on CUDA, and on the CPU under Triton's interpreter. `eager` is the same function in plain PyTorch. It
    runs on the CPU without the interpreter. The backward pass recomputes it and takes its derivative, unless `backward`
    returns the inputs' gradients from (grad, *inputs). `fake` returns the output's shape and dtype.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, lambda *args: (kernel if dispatch.interpreting() else eager)(*args), "CPU")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        tensors = [a if isinstance(a, torch.Tensor) else None for a in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in inputs]

    def run_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        if backward is not None:
            return backward(grad, *inputs)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        again = torch.is_grad_enabled()  # create_graph=True: the gradient is differentiated once more
        for i in wanted:
            inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            output = eager(*inputs)
        grads: list[torch.Tensor | None] = [None] * len(inputs)
        gradients = torch.autograd.grad(
            output, [inputs[i] for i in wanted], grad, allow_unused=True, create_graph=again
        )
        for i, g in zip(wanted, gradients, strict=True):
            grads[i] = g
        return tuple(grads)

    torch.library.register_autograd(f"fastbert::{name}", run_backward, setup_context=setup_context, lib=LIBRARY)
