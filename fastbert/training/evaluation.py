"""An evaluation computes the losses and accuracies of held-out documents. Their masks are the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.training.distributed import Processes
from fastbert.training.objective import MLM_LOSS, MLM_RIGHT, N_SUMS, NSP_LOSS, NSP_RIGHT, arguments_of


@dataclass(frozen=True)
class Scores:
    """A `Scores` holds means over masked tokens and over pairs, or None if there are none. Losses are in nats."""

    mlm_loss: float | None
    mlm_accuracy: float | None
    nsp_loss: float | None
    nsp_accuracy: float | None

    @classmethod
    def of(cls, sums: Sequence[float], n_masked: int, n_pairs: int, *, counted: bool = True) -> Scores:
        """Computes the means from the sums of an objective. counted: whether the sums include the right predictions."""

        def mean(place: int, n: int) -> float | None:
            return sums[place] / n if n else None

        return cls(
            mean(MLM_LOSS, n_masked),
            mean(MLM_RIGHT, n_masked) if counted else None,
            mean(NSP_LOSS, n_pairs),
            mean(NSP_RIGHT, n_pairs) if counted else None,
        )

    @property
    def loss(self) -> float:
        """Returns the sum of both losses, as in the objective."""
        return (self.mlm_loss or 0.0) + (self.nsp_loss or 0.0)

    def as_dict(self) -> dict[str, float]:
        """Returns the scores that are not None, and `loss`."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return {"loss": self.loss, **fields}


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Sequence[Any], processes: Processes, autocast: Any) -> Scores:
    """Returns the scores of batches, which are distributed over the processes. The model is in eval mode meanwhile.

    batches: batches of fastbert.training.data.batch, the same ones on every process. autocast: creates a context for
    each pass.
    """
    device = processes.device
    was_training = objective.training
    objective.eval()
    try:
        # Each batch has its own row, so that the order of the sum does not depend on the number of processes.
        sums = torch.zeros(len(batches), N_SUMS, device=device)
        for first in range(0, len(batches), processes.n):
            # FSDP gathers weights in each pass, so all processes make the same number of passes. A surplus pass is not
            # counted.
            i = first + processes.rank
            with autocast():
                _, of_batch = objective(*arguments_of(batches[min(i, len(batches) - 1)], device), count_right=True)
            if i < len(batches):
                sums[i] = of_batch
        processes.sum_tensor(sums)
    finally:
        objective.train(was_training)
    n_masked = sum(len(batch.rows) for batch in batches)
    return Scores.of(sums.double().sum(0).tolist(), n_masked, sum(batch.n_pairs for batch in batches))
