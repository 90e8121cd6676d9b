"""The layers of an encoder are called one after the other, and some of them again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.models import hooks
from fastbert.ops import Policy


class LayerStack(nn.Module):
    """The layers of an encoder, under the name `layer`, with the settings of gradient checkpointing."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self.gradient_checkpointing = False
        self.checkpointing: dict[str, Any] = {}  # arguments of torch.utils.checkpoint.checkpoint
        self.checkpointed_every = 1  # 2: layers 0, 2, 4 ... keep their input alone
        # For each layer what calls it in the place of that, or None; an adapter has them from its live model.
        self.checkpoints: tuple[Callable[..., Any] | None, ...] | None = None

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
        states = [x]
        for i, layer in enumerate(self.layer):
            recomputed = self.checkpoint_of(i)
            if recomputed is None:
                x = call(layer, batch, policy, x, *shared)
            else:
                x = recomputed(call, layer, batch, policy, x, *shared)
            states = [*states, x] if keep_states else [x]
        return states
