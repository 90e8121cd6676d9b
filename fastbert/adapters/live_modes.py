"""This module copies the modes, dropouts and gradient checkpointing of a live model to fastbert's model.

fastbert's model has its own dropouts. A dropout has the probability of the live dropout if that is in training mode,
and 0 otherwise, so every mix of modes is exact. This module does not write to a live module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import nn

from fastbert.adapters import versions
from fastbert.models.bert import BertModel


@dataclass(frozen=True, eq=False)
class DropoutSite:
    """A `DropoutSite` connects one of fastbert's dropouts with the live model's probability and mode.

    path: that of the live dropout. holder: the module with the probability as the attribute `name`; an nn.Identity has
    none. moded: the module whose mode turns the dropout on.
    """

    path: str
    ours: nn.Dropout
    holder: nn.Module
    name: str
    moded: nn.Module

    @classmethod
    def of(cls, path: str, ours: nn.Dropout, leaf: nn.Module) -> DropoutSite:
        """Makes the site of a dropout that is called as a module."""
        return cls(path, ours, leaf, "p", leaf)

    def obstacle(self) -> str | None:
        """Says why the original raises an error in training mode, or returns None."""
        missing = self.holder is not self.moded and self.name not in self.holder.__dict__
        return f"{self.path} has no {self.name}" if missing and self.moded.training else None

    def probability(self) -> float:
        """Returns the live model's present probability of this dropout."""
        probability: float = self.holder.__dict__.get(self.name, 0.0)
        return probability if self.moded.training else 0.0


class Modes:
    """A `Modes` holds the modes and dropouts of a live model from the last copy to fastbert's model.

    model: fastbert's. own: its modules that are not the live model's. encoder: the live module around the layers.
    """

    def __init__(
        self,
        live: nn.Module,
        model: BertModel,
        own: Sequence[nn.Module],
        sites: Sequence[DropoutSite],
        encoder: nn.Module,
        layers: Sequence[nn.Module],
    ) -> None:
        self._live, self._model, self._own, self._sites = live, model, tuple(own), tuple(sites)
        self._encoder, self._layers = encoder, tuple(layers)
        self._moded = (live.__dict__, *(site.moded.__dict__ for site in sites))
        self._probabilities = tuple((site.holder.__dict__, site.name) for site in sites)
        self._seen: Any = None
        self._obstacle: str | None = None

    def unchanged(self) -> bool:
        """Tells whether fastbert's model has the present modes and dropouts."""
        return self._present() == self._seen

    def obstacle(self) -> str | None:
        """Says which dropout fastbert's model cannot copy, or returns None."""
        return self._obstacle

    def follow(self) -> None:
        """Copies the present modes and dropouts to fastbert's model."""
        present = self._present()
        self._obstacle = next(filter(None, (site.obstacle() for site in self._sites)), None)
        for site in self._sites:
            site.ours.p = site.probability()
        training = self._live.training or any(site.ours.p for site in self._sites)
        if training != self._model.training:
            for module in self._own:
                module.training = training
            self._model.renew(training)
        self._take_checkpoints(present[-1])
        self._seen = present

    def _present(self) -> tuple[Any, ...]:
        modes = list(map(itemgetter("training"), self._moded))
        checkpoints = None
        if any(modes):  # Nothing else is kept for a backward pass that could be computed again.
            checkpoints = [versions.checkpointing(self._encoder, layer) for layer in self._layers]
        return modes, [values.get(name) for values, name in self._probabilities], checkpoints

    def _take_checkpoints(self, functions: list[Callable[..., Any] | None] | None) -> None:
        encoder: Any = self._model.encoder
        encoder.gradient_checkpointing = functions is not None and any(functions)
        encoder.checkpoints = None if functions is None else tuple(map(versions.non_reentrant, functions))
