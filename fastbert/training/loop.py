"""The loop of pre-training takes batches and makes steps of the optimiser. All other parts are arguments.

A step consists of a number of batches. Each process takes its share of them, gradients are accumulated, and one update
uses the means over the whole step. The numbers of a step are read while the next step runs, so that the device never
waits for the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.training.distributed import Processes, accumulating
from fastbert.training.evaluation import Scores
from fastbert.training.objective import N_SUMS, arguments_of


@dataclass
class State:
    """A `State` is the progress of a run.

    cursor: the position in the data at which the run continues. best: the lowest loss of an evaluation. seconds: the
    duration of the run, with all its resumed parts.
    """

    step: int = 0
    cursor: Any = None
    best: float = math.inf
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class StepReport:
    """A `StepReport` describes a step. The scores are means over all processes, with accuracies only on request."""

    step: int
    scores: Scores
    norm: float  # of all gradients together, before clipping
    learning_rate: float
    tokens: int  # of all processes
    sequences: int
    epoch: int
    tokens_so_far: int
    ended: float  # time.perf_counter() when the step was launched
    waited: float  # seconds that the loop has waited for data in total


@dataclass
class Loop:
    """A `Loop` holds the parts of the loop of pre-training.

    objective: the module to call, possibly wrapped for several processes. steps_of_data: yields objects with `step`,
    the `batches` of this process, and the cursor `after` them. learning_rate: returns the rate of a step, counted from
    0. autocast: creates a context for each forward pass. after_step: called with the state and the report of each step,
    in order, when the numbers of the step are known. at_rest: called with the state after the last step and after each
    step for which is_due is true; all steps are reported by then. stop: tells whether to end the run.
    """

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    steps_of_data: Iterable[Any]
    processes: Processes
    learning_rate: Callable[[int], float]
    steps: int
    seed: int
    clip: float
    after_step: Callable[[State, StepReport], None]
    at_rest: Callable[[State], None]
    is_due: Callable[[int], bool]
    counts_right: Callable[[int], bool]
    stop: Callable[[], bool] = bool
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    _pending: _Pending | None = field(default=None, repr=False)

    def run(self, state: State) -> State:
        """Trains from a state to the last step, or until a stop is requested. It changes the state and returns it."""
        self.objective.train()
        started, before = time.perf_counter(), state.seconds
        for data in self.steps_of_data:
            pending = self._take_step(data)
            state.step, state.cursor = data.step + 1, data.after
            state.tokens += pending.tokens
            pending.tokens_so_far, pending.ended = state.tokens, time.perf_counter()
            pending.waited = getattr(self.steps_of_data, "waited", 0.0)
            state.seconds = before + pending.ended - started
            self._settle(state)
            self._pending = pending
            is_last = state.step >= self.steps or pending.stop
            if is_last or self.is_due(state.step):
                self._settle(state)
                self.at_rest(state)
            if is_last:
                break
        return state

    def _take_step(self, data: Any) -> _Pending:
        processes, batches, step = self.processes, data.batches, data.step
        n_masked, n_pairs, n_tokens, n_sequences, stop = processes.sum(
            [sum(len(b.rows) for b in batches), sum(b.n_pairs for b in batches), sum(b.n_tokens for b in batches),
             sum(len(b.documents) for b in batches), self.stop()]
        )  # fmt: skip
        # DDP averages gradients over the processes; the factor n turns the average into a sum.
        scales = processes.n / max(1, n_masked), processes.n / max(1, n_pairs)
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = torch.zeros(len(batches), N_SUMS, device=processes.device)
        for i, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(self.seed, step, processes.rank + i * processes.n))
            with accumulating(self.objective, is_last=i == len(batches) - 1):
                with self.autocast():
                    arguments = arguments_of(batch, processes.device)
                    loss, sums[i] = self.objective(*arguments, scales, self.counts_right(step))
                loss.backward()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = processes.sum_tensor(sums.sum(0))
        return _Pending(
            step, data, torch.cat([total, norm.reshape(1)]), sums, learning_rate,
            n_masked, n_pairs, n_tokens, n_sequences, bool(stop), self.counts_right(step),
        )  # fmt: skip

    def _clip(self) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _settle(self, state: State) -> None:
        """Reads the numbers of the previous step, and passes them to after_step."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        *sums, norm = pending.numbers.tolist()
        if not all(map(math.isfinite, [*sums, norm])):
            raise FloatingPointError(pending.error(norm))
        scores = Scores.of(sums, pending.n_masked, pending.n_pairs, counted=pending.counted)
        self.after_step(
            state,
            StepReport(
                pending.step + 1, scores, norm, pending.learning_rate, pending.tokens, pending.sequences,
                pending.data.after.epoch, pending.tokens_so_far, pending.ended, pending.waited,
            ),
        )  # fmt: skip


@dataclass
class _Pending:
    """A `_Pending` is a step that was launched and whose numbers have not been read yet."""

    step: int
    data: Any
    numbers: Tensor  # the sums over all processes, and the norm
    sums: Tensor  # of each batch of this process
    learning_rate: float
    n_masked: int
    n_pairs: int
    tokens: int
    sequences: int
    stop: bool
    counted: bool
    tokens_so_far: int = 0
    ended: float = 0.0
    waited: float = 0.0

    def error(self, norm: float) -> str:
        finite = torch.isfinite(self.sums).all(1).tolist()
        batches = [batch for batch, is_finite in zip(self.data.batches, finite, strict=True) if not is_finite]
        subject = "the loss" if batches else f"the gradient (its norm is {norm})" if any(finite) else "a loss elsewhere"
        documents = sorted({int(d) for batch in batches or self.data.batches for d in batch.documents})
        listed = ", ".join(map(str, documents[:20])) + (f" and {len(documents) - 20} more" * (len(documents) > 20))
        return f"step {self.step + 1}: {subject} is not finite; the documents of its batches are {listed}"


def dropout_seed(seed: int, step: int, batch: int) -> int:
    """Returns the seed of the generators for one batch of a step: a 62-bit hash of the three numbers."""
    mixed = 0
    for number in (seed, step, batch):
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
        mixed = mixed * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 27
    return mixed >> 2
