"""Settings of transformers' Trainer, its checkpoints and all families work with accelerated models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from train_cases import classifier, distance

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_resumed(train: Any, tmp_path: Path, p: float) -> None:
    """Catches a run from a checkpoint that is another than the one without a break, or masks that start anew."""
    saving = {"max_steps": 16, "save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    whole = train(classifier(p=p), True, **saving)
    losses = whole.losses
    rest = train(classifier(p=p, seed=1), True, str(tmp_path / "checkpoint-8"), **saving)
    assert rest.losses[-8:] == losses[8:]
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.model.parameters(), strict=True))
    if not p:
        plain = train(classifier(seed=1), False, str(tmp_path / "checkpoint-8"), **saving)
        assert max(abs(a - b) for a, b in zip(plain.losses[-8:], losses[8:], strict=True)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"optim": "adamw_torch_fused", "max_grad_norm": 0.1},
        {"label_smoothing_factor": 0.1},
        {"group_by_length": True},
        {"auto_find_batch_size": True, "lr_scheduler_type": "cosine"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_settings(train: Any, changes: dict[str, Any]) -> None:
    """Catches a setting of the Trainer under which the curves differ, or a call runs as before."""
    known = inspect.signature(transformers.TrainingArguments).parameters
    if "group_by_length" in changes and "group_by_length" not in known:
        changes = {"train_sampling_strategy": "group_by_length"}
    ours, theirs = (train(classifier(), accelerated, max_steps=6, **changes) for accelerated in (True, False))
    assert len(ours.losses) >= 6 and distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "distilbert", "electra"])
def test_other_families(train: Any, model_type: str) -> None:
    """Catches a family whose curve leaves the original's."""
    ours, theirs = (train(classifier(model_type), accelerated, max_steps=8) for accelerated in (True, False))
    assert distance(ours, theirs) < 1e-5
