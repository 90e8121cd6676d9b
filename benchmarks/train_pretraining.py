"""This module times a step of pre-training: plan and loop of `fastbert pretrain` on synthetic shards, and transformers.

fastbert takes packed batches, and one step of its loop is timed: the copy to the device, both losses by masked tokens
alone, backward, clipping, and AdamW in two groups. The others take the same sequences, masks and labels, padded to the
longest and already on the device, with the same clipping and optimiser.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads
from laps import BACKWARD, FORWARD
from peers_train import (
    IGNORED,
    N_INPUTS,
    PRETRAINING,
    SDPA,
    Accelerated,
    Compiled,
    FastBert,
    Flattened,
    Trained,
    TrainTask,
    spread_of,
)
from suites import Built, Work
from synthetic_corpus import SPECIAL, write_corpus
from torch import Tensor, nn

import models
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.tables import si
from fastbert.checkpoint.config import BertConfig
from fastbert.training.data.batch import EVALUATION, Batch, Masking, make_batch
from fastbert.training.data.examples import Examples
from fastbert.training.data.loader import LoadedStep, Loader
from fastbert.training.data.plan import BLOCK_STEPS, Plan
from fastbert.training.distributed import Processes
from fastbert.training.loop import Loop, State, StepReport
from fastbert.training.objective import PretrainingObjective, arguments_of
from fastbert.training.optimizer import make_optimizer
from fastbert.training.settings import Settings

LOOP_STEPS = {"cuda": 24, "cpu": 4}  # from which the share of waiting is measured; the first one is not counted
MASKING = Masking(Settings.mlm_probability)
SEED = workloads.SEED


class PretrainTask(TrainTask):
    """A PretrainTask is MLM and NSP of a model on packed batches of so many tokens at most, one a step."""

    clip = Settings.clip

    def __init__(self, model: str, max_length: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        config = models.CONFIGS[model]
        self.corpus = corpus_of(config.vocab_size, 2 * BLOCK_STEPS * tokens)
        self.plan = Plan(
            self.corpus, seed=SEED, tokens_per_step=tokens, tokens_per_batch=tokens, max_length=max_length,
            short_probability=Settings.short_probability,
        )  # fmt: skip
        steps = list(itertools.islice(self.plan.steps(), N_INPUTS))
        self.steps = [
            LoadedStep(step.cursor.step, [self._packed(step.batches[0], step.cursor.step)], step.after)
            for step in steps
        ]
        # With equal numbers of true and random pairs, the gradients of NSP are almost zero, and only rounding is left.
        pairs = steps[0].batches[0].take(np.flatnonzero(steps[0].batches[0].is_next == 1))
        self.packed_few = self._packed(pairs.take(spread_of(np.argsort(pairs.n_tokens(), kind="stable"))), EVALUATION)
        lengths = np.diff(self.packed[0].cu_seqlens).tolist()
        super().__init__(model, lengths, dtype, device, PRETRAINING)

    def _packed(self, examples: Examples, step: int) -> Batch:
        return make_batch(self.corpus, examples, SPECIAL, seed=SEED, step=step, first_token=0, masking=MASKING)

    @property
    def packed(self) -> list[Batch]:
        return [step.batches[0] for step in self.steps]

    @functools.cached_property
    def inputs(self) -> list[dict[str, Tensor]]:
        return [self._on_device(batch) for batch in self.packed]

    @functools.cached_property
    def checked(self) -> dict[str, Tensor]:
        return self._on_device(self.packed_few)

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(self.device) for name, array in padded(batch).items()}

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(
            model, learning_rate=Settings.learning_rate, weight_decay=Settings.weight_decay,
            betas=(Settings.beta1, Settings.beta2), eps=Settings.epsilon,
        )  # fmt: skip


@functools.cache
def corpus_of(vocab_size: int, n_tokens: int) -> Any:
    return write_corpus(Path(tempfile.mkdtemp(prefix="corpus-", dir=models.workdir())), vocab_size, n_tokens)


def padded(batch: Batch) -> dict[str, np.ndarray]:
    """Returns the batch in the form of transformers: (B, S), padded to the longest sequence."""
    lengths = np.diff(batch.cu_seqlens)
    mask = np.arange(lengths.max()) < lengths[:, None]
    labels = np.full(batch.n_tokens, IGNORED)
    labels[batch.rows] = batch.labels

    def spread_out(flat: np.ndarray, padding: int) -> np.ndarray:
        rows = np.full(mask.shape, padding, np.int64)
        rows[mask] = flat
        return rows

    arrays = {
        "input_ids": spread_out(batch.input_ids, 0),
        "token_type_ids": spread_out(batch.token_type_ids, 0),
        "labels": spread_out(labels, IGNORED),
        "next_sentence_label": batch.next_sentence_label,
    }
    return arrays if mask.all() else arrays | {"attention_mask": mask.astype(np.int64)}


class Marked(Loop):
    """A Marked is the loop with a mark at the end of the backward passes of a step."""

    mark: Callable[[], None]

    def _clip(self) -> Tensor:
        self.mark()
        return super()._clip()


class Pretrained(FastBert):
    """This is one step of the loop of `fastbert pretrain`."""

    task: PretrainTask
    at_work = True  # whether some steps are made with the loader, too

    @property
    def inputs(self) -> list[Any]:
        return self.task.packed

    @property
    def checked(self) -> Any:
        return self.task.packed_few

    def prepare(self) -> None:
        super().prepare()
        self.objective = PretrainingObjective(self.model).train()
        self.loop = self._loop((), N_INPUTS)
        self.loop.mark = self.mark

    def _loop(
        self,
        data: Any,
        steps: int,
        autocast: Callable[[], Any] | None = None,
        after_step: Callable[[State, StepReport], None] = lambda state, report: None,
        log_every: int | None = None,
    ) -> Marked:
        loop = Marked(
            objective=self.objective, optimizer=self.optimizer, steps_of_data=data,
            processes=Processes(0, 1, 0, self.device), learning_rate=lambda step: Settings.learning_rate, steps=steps,
            seed=SEED, clip=self.task.clip, after_step=after_step, at_rest=lambda state: None,
            is_due=lambda step: False, counts_right=lambda step: bool(log_every) and (step + 1) % log_every == 0,
            autocast=autocast or self._marked_autocast,
        )  # fmt: skip
        loop.mark = lambda: None
        return loop

    @contextmanager
    def _marked_autocast(self) -> Iterator[None]:
        with self.autocasting():
            yield
        self.mark()

    def compute(self, batch: Batch) -> Tensor:
        scales = 1 / len(batch.rows), 1 / batch.n_pairs
        return self.objective(*arguments_of(batch, self.device), scales)[0]

    def run(self, i: int) -> Tensor:
        self.start()
        numbers = self.loop._take_step(self.task.steps[i % N_INPUTS]).numbers
        self.mark()
        return numbers

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        if not self.at_work:
            return facts
        rate, waiting = self.with_loader(LOOP_STEPS[self.device.type])
        note = f"with the loader {si(rate)} tokens/s; {waiting:.1%} of the time it waits for data"
        return facts | {"loop_tokens_per_second": rate, "waiting": waiting, "note": note}

    def with_loader(self, steps: int) -> tuple[float, float]:
        """Returns tokens/s of steps of the loop with a running loader, and the share of time that the loop waits for
        it.
        """
        reports: list[StepReport] = []
        task, masking = self.task, MASKING
        with Loader(task.corpus, task.plan, SPECIAL, masking, workers=Settings.workers) as loader:
            self._loop(
                loader, steps, self.autocasting, lambda state, report: reports.append(report), Settings.log_every
            ).run(State())
        first, last = reports[0], reports[-1]
        seconds = last.ended - first.ended
        return (last.tokens_so_far - first.tokens_so_far) / seconds, (last.waited - first.waited) / seconds


class Pretrained32(Pretrained):
    """This is the same in float32; autocast should be faster."""

    name, at_work = f"{OURS} float32", False

    def __init__(self, task: PretrainTask) -> None:
        super().__init__(task, torch.float32)


def pretrain_peers(task: PretrainTask) -> list[Trained]:
    """Returns fastbert, transformers with SDPA (the baseline), and others for the task's device."""
    kinds: list[Any] = [Pretrained, SDPA, Accelerated, Compiled]
    kinds += [Flattened] if task.device.type == "cuda" else []
    kinds += [Pretrained32] if task.dtype != torch.float32 else []
    return [kind(task) for kind in kinds]


def forward_flops(config: BertConfig, lengths: Sequence[int], n_masked: int) -> float:
    """Returns the operations of the encoder, of the MLM head on masked tokens, and of the pooler.

    A masked token: 2 (H^2 + H V); a sequence: 2 H^2.
    """
    hidden = config.hidden_size
    head = n_masked * hidden * (hidden + config.vocab_size) + len(lengths) * hidden * hidden
    return models.flops(config, lengths) + 2.0 * head


def build(task: PretrainTask, peers: Sequence[Peer]) -> Built:
    """Builds the contest of a step."""
    batches = task.packed
    tokens = sum(batch.n_tokens for batch in batches) // N_INPUTS
    n_masked = sum(len(batch.rows) for batch in batches) // N_INPUTS
    forward = forward_flops(task.config, task.lengths, n_masked)
    positions = [len(batch.documents) * int(np.diff(batch.cu_seqlens).max()) for batch in batches]
    extra = {
        "length": task.plan.max_length,
        "batch": len(task.lengths),
        "description": f"{tokens:,} tokens in {len(task.lengths)} sequences of at most {task.plan.max_length}, "
        f"{n_masked:,} masked; 10 % of the sequences shorter, as in the paper",
        "padding_waste_of_workload": 1.0 - sum(batch.n_tokens for batch in batches) / sum(positions),
        "masked_tokens": n_masked,
        "flops_per_token": 3 * forward / task.n_tokens,
    }
    # Each product of the forward pass has two in the backward pass.
    laps = {FORWARD: Work(forward), BACKWARD: Work(2 * forward)}
    return Built(peers, SDPA.name, task.reference(), tokens, len(task.lengths), Work(3 * forward), extra, laps=laps)
