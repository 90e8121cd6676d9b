"""A callback checks every step of the Trainers of transformers and sentence-transformers for NaN and infinity."""

from __future__ import annotations

import functools
from typing import Any

from fastbert.training.finite import LEAST_SCALE, FiniteGuard


def finite_callback(*, least_scale: float = LEAST_SCALE) -> Any:
    """Returns a TrainerCallback that raises FloatingPointError as `FiniteGuard` does.

    It checks after each backward pass, before the optimizer's step. least_scale: as in `FiniteGuard`.
    """
    return _callback_class()(least_scale)


@functools.cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class FiniteCallback(TrainerCallback):
        def __init__(self, least_scale: float) -> None:
            self.least_scale = least_scale
            self.guard: FiniteGuard | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.guard = FiniteGuard(model, least_scale=self.least_scale)

        def on_substep_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            self._check(state, optimizer)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            self._check(state, optimizer)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.guard is not None:
                self.guard.close()

        def _check(self, state: Any, optimizer: Any) -> None:
            if self.guard is not None:
                self.guard.check(step=state.global_step + 1, scaler=getattr(optimizer, "scaler", None))

    return FiniteCallback
