"""A `Run` combines the parts of pre-training, and does the work between steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.training import saving
from fastbert.training.checkpoints import Checkpoints, recover, replace_folder
from fastbert.training.data.loader import Loader
from fastbert.training.data.plan import Cursor
from fastbert.training.distributed import Processes
from fastbert.training.evaluation import Scores, evaluate
from fastbert.training.journal import FILE, Journal, read_journal
from fastbert.training.loop import Loop, State, StepReport
from fastbert.training.model_card import write_card
from fastbert.training.parts import Parts
from fastbert.training.progress import Progress, duration
from fastbert.training.report import write_curve
from fastbert.training.settings import Settings
from fastbert.training.statement import facts_of, statement
from fastbert.training.stopping import StopSignals

logger = logging.getLogger("fastbert")

CHECKPOINTS, BEST = "checkpoints", "best"
TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 4_096}
STEPS_TO_ESTIMATE = 20


@dataclass(frozen=True)
class Result:
    """A `Result` is the result of a run.

    scores: those of the last evaluation, or None without one. signal: the signal that stopped the run, or None.
    """

    folder: Path
    steps: int
    scores: Scores | None
    signal: int | None = None


class Run:
    """A `Run` holds one run: its folder, its journal, and the work between steps."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.output = Path(settings.output)
        self._check_output()
        self.parts = Parts(settings, processes)
        self.steps = self.parts.steps
        self.checkpoints = Checkpoints(self.output / CHECKPOINTS, settings.keep)
        self.scores: Scores | None = None

    @property
    def evaluate_every(self) -> int:
        """Returns the number of steps between evaluations."""
        return self.settings.evaluate_every or max(1, self.steps // 20)

    # The folder of the run

    def _check_output(self) -> None:
        output, processes = self.output, self.processes
        has_run = (output / saving.RUN).exists()
        error = None
        if has_run and not self.settings.resume:
            error = f"output: {output} holds a run; continue it with --resume, or name another folder"
        elif output.exists() and not output.is_dir():
            error = f"output: {output} is a file, expected a folder"
        processes.gather(error)  # no process writes before all have checked
        if error is not None:
            raise ValueError(error)

    def _facts(self) -> dict[str, Any]:
        """Returns the facts that must be the same when the run resumes."""
        corpora = self.parts.corpora
        evaluation = corpora.evaluation.fingerprint if corpora.evaluation is not None else None
        return {
            "settings": self.settings.as_dict(),
            "corpus": corpora.training.fingerprint,
            "evaluation corpus": evaluation,
            "model": self.parts.model.config.to_dict(),
            "tokenizer": corpora.training.made_of.get("tokenizer"),
            "steps": self.steps,
            "precision": "bf16" if self.parts.bf16 else "fp32",
            "processes": self.processes.n,
        }

    def _begin(self) -> State:
        """Starts a new run, or loads the newest checkpoint of an existing one."""
        if not (self.output / saving.RUN).exists():
            if self.settings.resume and self.processes.is_first:
                logger.warning("%s holds no run to resume: a new run begins", self.output)
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
        return saving.load(newest, self.parts.model, self.parts.optimizer)

    # The run

    def train(self, stop: StopSignals) -> Result:
        """Trains to the end, or until a signal arrives."""
        settings, processes = self.settings, self.processes
        state = self._begin()
        if state.step >= self.steps and self._is_finished():
            logger.warning("the run in %s is finished: there are no more steps", self.output)
            return Result(self.output, state.step, None)
        self._open_journal(state)
        if state.step < self.steps:
            self.loader = Loader(
                self.parts.corpora.training, self.parts.plan, self.parts.special, self.parts.masking,
                rank=processes.rank, n_processes=processes.n, workers=settings.workers, start=state.cursor,
            )  # fmt: skip
            loop = Loop(
                objective=self.parts.objective,
                optimizer=self.parts.optimizer,
                steps_of_data=self.loader,
                processes=processes,
                learning_rate=self.parts.learning_rate,
                steps=self.steps,
                seed=settings.seed,
                clip=settings.clip,
                after_step=self._after_step,
                at_rest=lambda state: self._at_rest(state, stop()),
                is_due=self._is_due,
                counts_right=lambda step: self._is_logged(step + 1),
                stop=stop,
                autocast=self.parts.autocast,
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
        """Tells whether the journal has its end line."""
        path = self.output / FILE
        return path.exists() and any(line["kind"] == "end" for line in read_journal(path)[-1:])

    def _open_journal(self, state: State) -> None:
        settings, first = self.settings, self.processes.is_first
        # If a run was killed before its first checkpoint, it starts again, and so does its journal.
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
        self.progress.write(statement(self.parts))
        if self.journal is not None and state.step == 0:
            self.journal.write("start", 0, **facts_of(self.parts))

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
        if self.parts.evaluation_batches and (is_last or state.step % self.evaluate_every == 0):
            self._evaluate(state)
        if is_last or stopping or state.step % self.settings.checkpoint_every == 0:
            self._save(state, must=is_last or stopping)
        # The speed of a step does not include this work.
        self.time, self.waited, self.tokens = time.perf_counter(), self.loader.waited, state.tokens

    def _evaluate(self, state: State) -> None:
        self.scores = scores = evaluate(
            self.parts.objective, self.parts.evaluation_batches, self.processes, self.parts.autocast
        )
        if self.journal is not None:
            self.journal.write("evaluation", state.step, tokens=state.tokens, **scores.as_dict())
        parts = ", ".join(f"{name} {value:.4f}" for name, value in scores.as_dict().items())
        self.progress.write(f"Step {state.step:,}, held-out documents: {parts}")
        if scores.loss < state.best:
            state.best = scores.loss
            saved = saving.Saved.of(self.parts.model, self.parts.optimizer, self.parts.tokenizer, self.processes)
            if self.processes.is_first:
                self._attempt(lambda: replace_folder(self.output / BEST, saved.write_model, step=state.step))

    def _save(self, state: State, must: bool) -> None:
        saved = saving.Saved.of(self.parts.model, self.parts.optimizer, self.parts.tokenizer, self.processes)
        if self.processes.is_first:
            if self.journal is not None:
                self.journal.sync()
            self._attempt(lambda: self.checkpoints.save(state.step, lambda folder: saved.write(folder, state)), must)
        self.processes.wait()

    def _attempt(self, write: Callable[[], Any], must: bool = False) -> None:
        """Writes a folder. If the disk is full, it raises only if `must` is true; otherwise it logs a warning."""
        try:
            write()
        except OSError as error:
            if must:
                raise
            logger.warning("%s; training continues", error.strerror or error)

    def _finish(self, state: State) -> None:
        """Writes the model, its card and the curve into the folder of the run."""
        saved = saving.Saved.of(self.parts.model, self.parts.optimizer, self.parts.tokenizer, self.processes)
        if self.processes.is_first:
            recover(self.output / BEST)
            saved.write_model(self.output)
            if self.journal is not None:
                scores = {} if self.scores is None else self.scores.as_dict()
                self.journal.write("end", state.step, tokens=state.tokens, seconds=state.seconds, **scores)
                self.journal.sync()
            write_curve(self.output)
            write_card(self.output, {**facts_of(self.parts), "seconds": state.seconds, "tokens_seen": state.tokens})
            self.progress.write(f"The model is in {self.output}; curve.html there shows its losses.")
        self.processes.wait()
