"""The learning rate of a step depends only on the step, so a resumed run needs no scheduler state."""

from __future__ import annotations

from fastbert.checks import expect, one_of, positive

KINDS = ("linear", "trapezoid")


def learning_rate_factor(step: int, *, steps: int, warmup: int, decay: int = 0, kind: str = "linear") -> float:
    """Returns the factor of the peak learning rate in the update of `step`, counted from 0.

    steps: the updates of the whole run. warmup: the updates in which the factor rises by 1 / warmup each; the first
    update has 1 / warmup, not 0. kind: "linear" falls from 1 to 0 over all remaining updates, as in the paper;
    "trapezoid" stays at 1 and falls in the last `decay` updates. "linear" ignores `decay`.

    From `steps` on the factor is 0. Raises ValueError, with the name, for an invalid value.
    """
    one_of("kind", kind, *KINDS)
    positive("steps", steps)
    expect(step >= 0, "step", step, "a whole number from 0 on")
    expect(0 <= warmup <= steps, "warmup", warmup, f"0 to {steps}, the steps of the run")
    falling = steps - warmup if kind == "linear" else decay
    expect(0 <= falling <= steps - warmup, "decay", decay, f"0 to {steps - warmup}, the steps after the warm-up")
    if step >= steps:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps - falling:
        return (steps - step) / falling
    return 1.0
