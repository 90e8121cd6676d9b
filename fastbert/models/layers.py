"""The layers of an encoder are called one after the other, and some of them again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.models import hooks
from fastbert.ops import Policy


class LayerStack(nn.Module):
    """A LayerStack has the layers of an encoder, under the name `layer`, with the settings of gradient checkpointing.

    order: the index of the layer that runs first, second and so on, if some run several times, as in ALBERT; None if
    each runs once.
    """

    def __init__(self, layers: Iterable[nn.Module], order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self.order = None if order is None else tuple(order)
        self.gradient_checkpointing = False
        self.checkpointing: dict[str, Any] = {}  # arguments of torch.utils.checkpoint.checkpoint
        self.checkpointed_every = 1  # 2: layers 0, 2, 4 ... keep only their input
        # For each layer a function to call instead of it, or None; adapters set these functions from their live model.
        self.checkpoints: tuple[Callable[..., Any] | None, ...] | None = None

    @property
    def in_order(self) -> list[Any]:
        """Returns the layers in their order of execution; a layer that runs several times is there as many times."""
        return list(self.layer) if self.order is None else [self.layer[i] for i in self.order]

    @property
    def sharing(self) -> str | None:
        """Returns how many layers share how many sets of weights, for reports; None if each has its own weights."""
        if self.order is None:
            return None
        n_sets = len(self.layer)
        sets = "one set of weights" if n_sets == 1 else f"{n_sets} sets of weights"
        return f"{len(self.order)} layers share {sets}"

    def checkpoint_of(self, i: int) -> Callable[..., Any] | None:
        """Returns a call of layer i that keeps only its input; None if the layer keeps the tensors for backward."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return None
        if self.checkpoints is not None:
            return self.checkpoints[i]
        return None if i % self.checkpointed_every else partial(checkpoint, **self.checkpointing)

    def states(
        self,
        x: Tensor,
        batch: Any,
        policy: Policy,
        keep_states: bool,
        *shared: Tensor,
        call: Callable[..., Tensor] = hooks.call,
    ) -> list[Tensor]:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        shared: further arguments of every layer beside its rows. call(layer, batch, policy, x, *shared) runs a layer.
        """
        states, call_layer = [x], call
        for i, layer in enumerate(self.in_order):
            if self.order is not None and self.training:
                call = partial(_call_at, call_layer, i - self.order[i])
            recomputed = self.checkpoint_of(i)
            if recomputed is None:
                x = call(layer, batch, policy, x, *shared)
            else:
                x = recomputed(call, layer, batch, policy, x, *shared)
            states = [*states, x] if keep_states else [x]
        return states


def _call_at(call: Callable[..., Tensor], n_before: int, layer: Any, batch: Any, *others: Any) -> Tensor:
    """Runs a layer as if it were n_before layers further on: its dropout masks are those of that layer."""
    batch.n_layers_before = n_before
    try:
        return call(layer, batch, *others)
    finally:
        batch.n_layers_before = 0
