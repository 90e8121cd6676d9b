"""A `Run` puts the parts of pre-training together, and does what is due between steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.engine.cpu_encoder import multiplies_bfloat16
from fastbert.text.tokenizer import Tokenizer
from fastbert.training import saving
from fastbert.training.baseline import UnigramBaseline, unigram_baseline
from fastbert.training.checkpoints import Checkpoints, recover, replace_folder
from fastbert.training.corpora import Corpora, open_corpora
from fastbert.training.data.batch import EVALUATION, Batch, Masking, make_batch
from fastbert.training.data.loader import Loader
from fastbert.training.data.plan import Cursor, Plan
from fastbert.training.data.special import SpecialIds
from fastbert.training.data.tokenizing import special_ids
from fastbert.training.distributed import Processes
from fastbert.training.evaluation import Scores, evaluate
from fastbert.training.journal import FILE, Journal, read_journal
from fastbert.training.loop import Loop, State, StepReport
from fastbert.training.model_card import write_card
from fastbert.training.objective import PretrainingObjective
from fastbert.training.optimizer import make_optimizer
from fastbert.training.progress import Progress, duration
from fastbert.training.report import write_curve
from fastbert.training.schedule import learning_rate_factor
from fastbert.training.settings import Settings, n_steps_of
from fastbert.training.starting_model import starting_model
from fastbert.training.statement import facts_of, statement
from fastbert.training.stopping import StopSignals

logger = logging.getLogger("fastbert")

CHECKPOINTS, BEST = "checkpoints", "best"
TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 4_096}
STEPS_TO_ESTIMATE = 20


@dataclass(frozen=True)
class Result:
    """What a run came to.

    scores: of the last evaluation, None without one. signal: the one that stopped the run, or None.
    """

    folder: Path
    steps: int
    scores: Scores | None
    signal: int | None = None


class Run:
    """The parts of one run, and what happens between steps."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.output = Path(settings.output)
        self._check_output()
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
        self.checkpoints = Checkpoints(self.output / CHECKPOINTS, settings.keep)
        self.scores: Scores | None = None

    # What the run is made of

    @property
    def tokens_per_step(self) -> int:
        """The budget of a step of all processes."""
        settings = self.settings
        if settings.sequences_per_step is not None:
            return settings.sequences_per_step * self.max_length
        return max(settings.tokens_per_step, self.max_length)

    @property
    def tokens_per_batch(self) -> int:
        """The budget of what a device takes at once."""
        wanted = self.settings.tokens_per_batch or TOKENS_PER_BATCH.get(self.processes.device.type, 4_096)
        return max(self.max_length, min(wanted, -(-self.tokens_per_step // self.processes.n)))

    def _plan(self, corpus: Any, held_out: int) -> Plan:
        settings = self.settings
        return Plan(
            corpus,
            seed=settings.seed,
            tokens_per_step=self.tokens_per_step,
            tokens_per_batch=self.tokens_per_batch,
            n_processes=self.processes.n,
            max_length=self.max_length,
            nsp=settings.nsp,
            short_probability=settings.short_probability,
            held_out=held_out,
        )

    def _on_device(self) -> torch.nn.Module:
        self.model.to(self.processes.device)
        objective = PretrainingObjective(self.model)
        n_accumulated = self.plan.n_batches // self.processes.n
        return self.processes.wrap(objective, n_accumulated=n_accumulated, fsdp=self.settings.fsdp, bf16=self.bf16)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.processes.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _learning_rate(self, step: int) -> float:
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
        """The batches of held-out documents, with masks that do not change."""
        corpora, settings = self.corpora, self.settings
        corpus, plan = corpora.training, self.plan
        if corpora.evaluation is not None:
            corpus, plan = corpora.evaluation, self._plan(corpora.evaluation, corpora.evaluation.n_documents)
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
                )  # fmt: skip
            )
            first += batches[-1].n_tokens
        return batches

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations."""
        return self.settings.evaluate_every or max(1, self.steps // 20)

    # The folder of the run

    def _check_output(self) -> None:
        output, processes = self.output, self.processes
        has_run = (output / saving.RUN).exists()
        error = None
        if has_run and not self.settings.resume:
            error = f"output: {output} holds a run; go on with it by --resume, or name another folder"
        elif output.exists() and not output.is_dir():
            error = f"output: {output} is a file, expected a folder"
        processes.gather(error)  # nobody writes before all have looked
        if error is not None:
            raise ValueError(error)

    def _facts(self) -> dict[str, Any]:
        """What must be the same when the run resumes."""
        corpora = self.corpora
        evaluation = corpora.evaluation.fingerprint if corpora.evaluation is not None else None
        return {
            "settings": self.settings.as_dict(),
            "corpus": corpora.training.fingerprint,
            "evaluation corpus": evaluation,
            "model": self.model.config.to_dict(),
            "tokenizer": corpora.training.made_of.get("tokenizer"),
            "steps": self.steps,
            "precision": "bf16" if self.bf16 else "fp32",
            "processes": self.processes.n,
        }

    def _begin(self) -> State:
        """Starts the run, or finds where it stopped."""
        if not (self.output / saving.RUN).exists():
            if self.settings.resume and self.processes.is_first:
                logger.warning("%s holds no run to resume: a new one begins", self.output)
            self.processes.wait()
            if self.processes.is_first:
                self.output.mkdir(parents=True, exist_ok=True)
                saving.write_run(self.output, self._facts())
            self.processes.wait()
            return State(cursor=Cursor())
        saving.check_same_run(self.output, self._facts())
        newest = self.processes.gather(self.checkpoints.newest() if self.processes.is_first else None)[0]
        if newest is None:
            return State(cursor=Cursor())
        return saving.load(newest, self.model, self.optimizer)

    # The run

    def train(self, stop: StopSignals) -> Result:
        """Trains to the end, or until a signal comes."""
        settings, processes = self.settings, self.processes
        state = self._begin()
        if state.step >= self.steps and self._is_finished():
            logger.warning("the run in %s is finished: nothing is left to do", self.output)
            return Result(self.output, state.step, None)
        self._open_journal(state)
        if state.step < self.steps:
            self.loader = Loader(
                self.corpora.training, self.plan, self.special, self.masking,
                rank=processes.rank, n_processes=processes.n, workers=settings.workers, start=state.cursor,
            )  # fmt: skip
            loop = Loop(
                objective=self.objective,
                optimizer=self.optimizer,
                steps_of_data=self.loader,
                processes=processes,
                learning_rate=self._learning_rate,
                steps=self.steps,
                seed=settings.seed,
                clip=settings.clip,
                after_step=self._after_step,
                at_rest=lambda state: self._at_rest(state, stop()),
                is_due=self._is_due,
                counts_right=lambda step: self._is_logged(step + 1),
                stop=stop,
                autocast=self._autocast,
            )
            try:
                state = loop.run(state)
            finally:
                self.loader.close()
        if state.step >= self.steps:
            self._finish(state)
        self.progress.close()
        if self.journal is not None:
            self.journal.close()
        return Result(self.output, state.step, self.scores, stop.number if state.step < self.steps else None)

    def _is_finished(self) -> bool:
        """Tells whether the journal has its last line."""
        path = self.output / FILE
        return path.exists() and any(line["kind"] == "end" for line in read_journal(path)[-1:])

    def _open_journal(self, state: State) -> None:
        settings, first = self.settings, self.processes.is_first
        # A run that was killed before its first checkpoint begins anew, and so does its journal.
        is_new = not self.settings.resume
        self.journal = (
            Journal(self.output, resume_step=None if is_new else state.step, tensorboard=settings.tensorboard)
            if first
            else None
        )
        self.progress = Progress(self.steps, state.step, disabled=not (first and settings.progress))
        self.time, self.waited, self.tokens = time.perf_counter(), 0.0, state.tokens
        self.began, self.first_step = self.time, state.step
        if not first:
            return
        if state.step:
            self.progress.write(f"Goes on after step {state.step:,} of {self.steps:,}.")
        self.progress.write(statement(self))
        if self.journal is not None and state.step == 0:
            self.journal.write("start", 0, **facts_of(self))

    @cached_property
    def baseline(self) -> UnigramBaseline:
        """What the masked tokens of the evaluation cost a model that knows frequencies alone."""
        corpus, batches = self.corpora.training, self.evaluation_batches
        labels = np.concatenate([batch.labels for batch in batches]) if batches else None
        counts = None if labels is None else np.bincount(labels, minlength=corpus.vocab_size)
        return unigram_baseline(corpus.counts, counts, self.special.all)

    # Between steps

    def _is_logged(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step in (1, self.steps)

    def _is_due(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step % self.settings.checkpoint_every == 0

    def _after_step(self, state: State, report: StepReport) -> None:
        if report.step - self.first_step == STEPS_TO_ESTIMATE:
            seconds = (time.perf_counter() - self.began) / STEPS_TO_ESTIMATE * (self.steps - report.step)
            self.progress.write(f"The rest takes about {duration(seconds)}.")
        if not self._is_logged(report.step):
            self.progress.update(report.step)
            return
        seconds = max(report.ended - self.time, 1e-9)
        values = {
            **report.scores.as_dict(),
            "learning_rate": report.learning_rate,
            "gradient_norm": report.norm,
            "epoch": report.epoch,
            "tokens": report.tokens_so_far,
            "step_tokens": report.tokens,
            "step_sequences": report.sequences,
            "tokens_per_second": (report.tokens_so_far - self.tokens) / seconds,
            "waiting": min(1.0, (report.waited - self.waited) / seconds),
        }
        self.time, self.waited, self.tokens = report.ended, report.waited, report.tokens_so_far
        self.progress.update(report.step, **values)
        if self.journal is not None:
            self.journal.write("train", report.step, **values)

    def _at_rest(self, state: State, stopping: bool) -> None:
        is_last = state.step >= self.steps
        if self.evaluation_batches and (is_last or state.step % self.evaluate_every == 0):
            self._evaluate(state)
        if is_last or stopping or state.step % self.settings.checkpoint_every == 0:
            self._save(state, must=is_last or stopping)
        # What happened here is no part of the speed of a step.
        self.time, self.waited, self.tokens = time.perf_counter(), self.loader.waited, state.tokens

    def _evaluate(self, state: State) -> None:
        self.scores = scores = evaluate(self.objective, self.evaluation_batches, self.processes, self._autocast)
        if self.journal is not None:
            self.journal.write("evaluation", state.step, tokens=state.tokens, **scores.as_dict())
        parts = ", ".join(f"{name} {value:.4f}" for name, value in scores.as_dict().items())
        self.progress.write(f"Step {state.step:,}, held-out documents: {parts}")
        if scores.loss < state.best:
            state.best = scores.loss
            saved = saving.Saved.of(self.model, self.optimizer, self.tokenizer, self.processes)
            if self.processes.is_first:
                self._attempt(lambda: replace_folder(self.output / BEST, saved.write_model, step=state.step))

    def _save(self, state: State, must: bool) -> None:
        saved = saving.Saved.of(self.model, self.optimizer, self.tokenizer, self.processes)
        if self.processes.is_first:
            if self.journal is not None:
                self.journal.sync()
            self._attempt(lambda: self.checkpoints.save(state.step, lambda folder: saved.write(folder, state)), must)
        self.processes.wait()

    def _attempt(self, write: Callable[[], Any], must: bool = False) -> None:
        """Writes a folder; a disk that is full stops the run at its end alone."""
        try:
            write()
        except OSError as error:
            if must:
                raise
            logger.warning("%s; training goes on", error.strerror or error)

    def _finish(self, state: State) -> None:
        """Leaves the model, its card and the curve in the folder of the run."""
        saved = saving.Saved.of(self.model, self.optimizer, self.tokenizer, self.processes)
        if self.processes.is_first:
            recover(self.output / BEST)
            saved.write_model(self.output)
            if self.journal is not None:
                scores = {} if self.scores is None else self.scores.as_dict()
                self.journal.write("end", state.step, tokens=state.tokens, seconds=state.seconds, **scores)
                self.journal.sync()
            write_curve(self.output)
            write_card(self.output, {**facts_of(self), "seconds": state.seconds, "tokens_seen": state.tokens})
        self.processes.wait()


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Tells whether products are in bfloat16: where that is asked for, or by itself where the device has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and multiplies_bfloat16()
