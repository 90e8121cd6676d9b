"""The tests of adapters share Trainers of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import fastbert
from fastbert.adapters import counts
from train_cases import NotesLosses, classification_data, settings

FAST = {"learning_rate": 3e-3, "per_device_train_batch_size": 32}


@pytest.fixture(scope="session")
def tokenizer(minilm: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a Trainer know nothing of the precision that one before it had."""
    state = pytest.importorskip("accelerate.state", reason="Trainers need accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(tokenizer: Any, tmp_path: Path, trainers: None) -> Any:
    """Trains a model, accelerated or not, by transformers' Trainer on the task of `passages`, and returns that."""
    examples, others = classification_data(tokenizer)

    class Trainer(NotesLosses, transformers.Trainer):
        """transformers' Trainer, which notes its losses."""

    def run(model: Any, accelerated: bool, resume: str | None = None, **changes: Any) -> Any:
        if accelerated:
            fastbert.accelerate(model, strict=True)
        arguments = transformers.TrainingArguments(**settings(tmp_path, **{**FAST, **changes}))
        trainer = Trainer(
            model, arguments, train_dataset=examples, eval_dataset=others,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        if accelerated:
            assert set(counts(model)) == {"fastbert"}
        return trainer

    return run
