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
    """The layers of an encoder, under the name `layer`, with the settings of gradient checkpointing.

    order: which of them runs as the first, the second and so on, where some run several times, as ALBERT's; None where
    each runs once.
    """

    def __init__(self, layers: Iterable[nn.Module], order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self.order = None if order is None else tuple(order)
        self.gradient_checkpointing = False
        self.checkpointing: dict[str, Any] = {}  # arguments of torch.utils.checkpoint.checkpoint
        self.checkpointed_every = 1  # 2: layers 0, 2, 4 ... keep their input alone
        # For each layer what calls it in the place of that, or None; an adapter has them from its live model.
        self.checkpoints: tuple[Callable[..., Any] | None, ...] | None = None

    @property
    def in_order(self) -> list[Any]:
        """The layers as they run; one that runs several times is there so often."""
        return list(self.layer) if self.order is None else [self.layer[i] for i in self.order]

    @property
    def sharing(self) -> str | None:
        """How many layers share how many sets of weights, for reports; None where each has its own."""
        if self.order is None:
            return None
        n_sets = len(self.layer)
        sets = "one set of weights" if n_sets == 1 else f"{n_sets} sets of weights"
        return f"{len(self.order)} layers share {sets}"

    def checkpoint_of(self, i: int) -> Callable[..., Any] | None:
        """Returns what calls layer i so that it keeps its input alone; None where it keeps what backward needs."""
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

        shared: what every layer takes beside its rows. call(layer, batch, policy, x, *shared) runs a layer.
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
    """Runs a layer that has the place of one n_before further on: its masks of dropout are that one's."""
    batch.n_layers_before = n_before
    try:
        return call(layer, batch, *others)
    finally:
        batch.n_layers_before = 0
