"""This module makes CrossEncoder.predict keep derived tensors from call to call."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert.adapters.state import STATE, AcceleratedState, EncoderState
from fastbert.engine import Options


class ScoreState(AcceleratedState):
    """A `ScoreState` belongs to an accelerated CrossEncoder. A copy has only the options."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, "CrossEncoder.predict")

    def __reduce__(self) -> Any:
        return ScoreState, (self.options,)

    def __deepcopy__(self, memo: Any) -> ScoreState:
        return ScoreState(self.options)


def predict(
    live: nn.Module, state: AcceleratedState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls CrossEncoder.predict; its eval() of a model in eval mode must not renew derived tensors."""
    states = [(module, module.__dict__.get(STATE)) for module in live.modules()]
    encoders = [(module, inner) for module, inner in states if isinstance(inner, EncoderState)]
    for module, inner in encoders:
        inner.settled = not any(part.training for part in module.modules())
    try:
        return original(live, *args, **kwargs)
    finally:
        for _, inner in encoders:
            inner.settled = False
