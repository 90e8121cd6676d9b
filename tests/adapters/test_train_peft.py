"""Adapters of PEFT are trained on accelerated models: the base is frozen, and gradients reach the adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastbert
from fastbert.adapters import counts
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients
from train_cases import classifier, distance, labelled, original, step

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

HEAD = "BertForSequenceClassification"
NON_REENTRANT = {"use_reentrant": False}  # In 4.x the other kind, the original's, gives frozen layers no gradient.
EVERYWHERE = ["query", "key", "value", "dense"]
CONFIGS: dict[str, dict[str, Any]] = {
    "queries and values": {"target_modules": ["query", "value"]},
    "every linear": {"target_modules": EVERYWHERE, "modules_to_save": ["classifier"]},
    "biases": {"target_modules": ["query"], "bias": "all"},
    "DoRA": {"target_modules": ["query", "value"], "use_dora": True},
    "word embeddings": {"target_modules": ["query", "word_embeddings"]},
    "rank-stabilised": {"target_modules": ["value"], "use_rslora": True, "lora_dropout": 0.0},
}


def tuned(model: Any, **changes: Any) -> Any:
    """The model with LoRA, whose matrices are random, both of them."""
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, **{"init_lora_weights": False, "target_modules": ["query", "value"], **changes})
    return peft.get_peft_model(copy.deepcopy(model), config).double().train()


@pytest.mark.parametrize("what", list(CONFIGS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(what: str, checkpointing: bool) -> None:
    """Catches gradients that do not reach an adapter, or reach the frozen base, with checkpointing or without."""
    model = tuned(original("bert", HEAD), **CONFIGS[what])
    ours, batch = fastbert.accelerate(copy.deepcopy(model)), labelled("bert", HEAD)
    if checkpointing:
        for each in (ours, model):
            each.gradient_checkpointing_enable(NON_REENTRANT)
    losses = [step(each, batch) for each in (ours, model)]
    assert_close("loss", *losses)
    assert any(p.grad is not None and p.grad.any() for name, p in ours.named_parameters() if "lora" in name)
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_order_of_both(when: str) -> None:
    """Catches adapters that are put into an accelerated model, or found in one that is accelerated later."""
    model, batch = original("bert", HEAD), labelled("bert", HEAD)
    accelerated = fastbert.accelerate(copy.deepcopy(model)) if when == "before" else model
    ours = tuned(accelerated)
    if when == "after":
        fastbert.accelerate(ours)
    plain = tuned(model)
    for each in (ours, plain):
        step(each, batch)
    assert_gradients(ours, plain, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


def test_dropout_of_adapters() -> None:
    """Catches an adapter's own dropout that is lost, or that goes on in eval mode."""
    model = tuned(original("bert", HEAD), lora_dropout=0.5)
    ours, batch = fastbert.accelerate(copy.deepcopy(model)), labelled("bert", HEAD)
    torch.manual_seed(1)
    first, second = step(ours, batch), step(ours, batch)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(step(ours, batch), first)
    for each in (ours, model):
        each.eval()
    assert_close("eval", step(ours, batch), step(model, batch))
    assert counts(ours) == {"fastbert": 4}


def test_layers_of_adapters_in_other_modes() -> None:
    """Catches the mode of an adapter, or of a part of it, that is changed by a call."""
    ours, batch = fastbert.accelerate(tuned(original("bert", HEAD), lora_dropout=0.5)), labelled("bert", HEAD)
    for i, module in enumerate(m for m in ours.modules() if isinstance(m, torch.nn.Dropout)):
        module.training = bool(i % 2)
    before = {name: module.training for name, module in ours.named_modules()}
    step(ours, batch)
    ours.base_model.model.bert.config.hidden_act = "gelu"  # Looked at again.
    step(ours, batch)
    assert {name: module.training for name, module in ours.named_modules()} == before


def test_merged_after_training() -> None:
    """Catches weights from before the merge, and gradients that do not come back."""
    ours, batch = fastbert.accelerate(tuned(original("bert", HEAD))), labelled("bert", HEAD)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        step(ours, batch)
        optimizer.step()
    ours.eval()
    live = step(ours, batch)
    merged = ours.merge_and_unload()
    assert_close("merged", step(merged.requires_grad_(True), batch), live, 1e-9)
    assert all(p.grad is not None for p in merged.parameters())
    assert set(counts(merged)) == {"fastbert"}


def test_an_adapter_that_mixes_rows_in_training_mode_alone() -> None:
    """Catches a module that works row by row in eval mode, is known for that, and mixes rows in training mode."""

    class Normed(torch.nn.Module):
        """A linear and batch normalisation, which in training mode mixes all rows, those of padding among them."""

        def __init__(self, base: torch.nn.Linear, p: float) -> None:
            super().__init__()
            self.base, self.dropout = base, torch.nn.Dropout(p)
            self.norm = torch.nn.BatchNorm1d(base.out_features).double() if p == 0 else torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.base(self.dropout(x))
            return self.norm(y.flatten(0, -2)).view(y.shape)

    for p in (0.0, 0.5):
        ours, batch = fastbert.accelerate(original().eval()), labelled("bert", "BertModel")
        output = ours.encoder.layer[0].output
        output.dense = Normed(output.dense, p).eval()
        step(ours, batch)
        n_batches = getattr(output.dense.norm, "num_batches_tracked", torch.zeros(())).clone()
        step(ours.train(), batch)
        expected = {"fastbert": 2} if p else {"fastbert": 1, ROWS: 1}
        assert counts(ours) == expected
        if p == 0:  # The original's call alone has counted, and not the trial.
            assert output.dense.norm.num_batches_tracked == n_batches + 1


ROWS = "encoder.layer.0.output.dense, a test_an_adapter_that_mixes_rows_in_training_mode_alone.<locals>.Normed, "
ROWS += "does not work row by row"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(train: Any, checkpointing: bool) -> None:
    """Catches a curve of LoRA in the Trainer that leaves the original's."""
    curves = []
    for accelerated in (True, False):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=8, target_modules=["query", "value", "dense"], modules_to_save=["classifier"])
        model = peft.get_peft_model(classifier(), config)
        changes = {"max_steps": 12, "learning_rate": 1e-2}
        if checkpointing:
            changes |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": NON_REENTRANT}
        curves.append(train(model, accelerated, **changes))
    assert distance(*curves) < 1e-5
    assert sum(curves[0].losses[-4:]) < sum(curves[0].losses[:4])
