"""`Parts` holds the parts of a pre-training run: model, data, plan and optimiser."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastbert.text.tokenizer import Tokenizer
from fastbert.training.baseline import UnigramBaseline, unigram_baseline
from fastbert.training.corpora import Corpora, open_corpora
from fastbert.training.data.batch import EVALUATION, Batch, Masking, make_batch
from fastbert.training.data.plan import Plan
from fastbert.training.data.special import SpecialIds
from fastbert.training.data.tokenizing import special_ids
from fastbert.training.distributed import Processes
from fastbert.training.objective import PretrainingObjective
from fastbert.training.optimizer import make_optimizer
from fastbert.training.precision import takes_bf16
from fastbert.training.schedule import learning_rate_factor
from fastbert.training.settings import Settings, n_steps_of
from fastbert.training.starting_model import starting_model

TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 4_096}
EVALUATION_BATCH = 4_096  # tokens, equal on every device because masks depend on the batches


class Parts:
    """A `Parts` makes the parts of a run from its settings. All processes make the same parts, on their devices."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.tokenizer = Tokenizer.from_pretrained(settings.tokenizer)
        self.special: SpecialIds = special_ids(self.tokenizer)
        self.model: Any = starting_model(settings, self.tokenizer)
        self.max_length = settings.max_length or min(512, self.model.config.max_length)
        self.corpora: Corpora = open_corpora(
            settings, self.tokenizer, show_progress=settings.progress and processes.is_first
        )
        processes.check_equal("text", self.corpora.training.fingerprint)
        self.masking = Masking(probability=settings.mlm_probability, whole_words=settings.whole_words)
        self.plan = self._plan(self.corpora.training, self.corpora.held_out)
        self.steps = settings.steps or max(
            1, round(settings.epochs * self.plan.tokens_per_epoch / self.tokens_per_step)
        )
        self.bf16 = takes_bf16(settings.precision, processes.device)
        self.objective = self._on_device()
        self.optimizer = make_optimizer(
            self.model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )

    @property
    def tokens_per_step(self) -> int:
        """Returns the token budget of a step, over all processes."""
        settings = self.settings
        if settings.sequences_per_step is not None:
            return settings.sequences_per_step * self.max_length
        return max(settings.tokens_per_step, self.max_length)

    @property
    def tokens_per_batch(self) -> int:
        """Returns the token budget of one batch on a device."""
        wanted = self.settings.tokens_per_batch or TOKENS_PER_BATCH.get(self.processes.device.type, 4_096)
        return max(self.max_length, min(wanted, -(-self.tokens_per_step // self.processes.n)))

    def _plan(self, corpus: Any, held_out: int, **budgets: int) -> Plan:
        settings = self.settings
        budgets = budgets or {
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_batch": self.tokens_per_batch,
            "n_processes": self.processes.n,
        }
        return Plan(
            corpus,
            seed=settings.seed,
            max_length=self.max_length,
            nsp=settings.nsp,
            short_probability=settings.short_probability,
            held_out=held_out,
            **budgets,
        )

    def _on_device(self) -> torch.nn.Module:
        self.model.to(self.processes.device)
        objective = PretrainingObjective(self.model)
        n_accumulated = self.plan.n_batches // self.processes.n
        return self.processes.wrap(objective, n_accumulated=n_accumulated, fsdp=self.settings.fsdp, bf16=self.bf16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context for a forward pass."""
        return torch.autocast(self.processes.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        settings, steps = self.settings, self.steps
        return settings.learning_rate * learning_rate_factor(
            step,
            steps=steps,
            warmup=n_steps_of(settings.warmup, steps),
            decay=n_steps_of(settings.decay, steps),
            kind=settings.schedule,
        )

    @cached_property
    def evaluation_batches(self) -> list[Batch]:
        """Returns the batches of held-out documents. Their masks are always the same."""
        corpora, settings = self.corpora, self.settings
        corpus, held_out = corpora.training, corpora.held_out
        if corpora.evaluation is not None:
            corpus, held_out = corpora.evaluation, corpora.evaluation.n_documents
        budget = max(EVALUATION_BATCH, self.max_length)
        plan = self._plan(corpus, held_out, tokens_per_step=budget, tokens_per_batch=budget)
        first = 0
        batches = []
        for examples in plan.evaluation(settings.evaluation_tokens):
            batches.append(
                make_batch(
                    corpus,
                    examples,
                    self.special,
                    seed=settings.seed,
                    step=EVALUATION,
                    first_token=first,
                    masking=self.masking,
                )
            )
            first += batches[-1].n_tokens
        return batches

    @cached_property
    def baseline(self) -> UnigramBaseline:
        """Returns the baseline for the evaluation's masked tokens: the score of a model that knows only frequencies."""
        corpus, batches = self.corpora.training, self.evaluation_batches
        labels = np.concatenate([batch.labels for batch in batches]) if batches else None
        counts = None if labels is None else np.bincount(labels, minlength=corpus.vocab_size)
        return unigram_baseline(corpus.counts, counts, self.special.all)
