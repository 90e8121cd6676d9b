"""Accelerated models of ModernBERT, Nomic and GTE train layer by layer, with the gradients of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from family_cases import head_names, theirs
from fastbert.adapters import counts
from fastbert.engine.training import Training
from helpers import rms_error
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients, in_dtype
from train_cases import accelerated_copy, labelled, loss_of, step

FAMILIES = ("modernbert", "nomic_bert", "gte")
DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout", "hidden_dropout_prob", "classifier_dropout")
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 48}  # for which C++ has kernels
MODELS = [(family, name) for family in FAMILIES for name in ("BertModel", *head_names(family))]


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away transformers' cast to float32, which would hide errors below 1e-8."""
    from transformers.models.gte.modeling_gte import apply_rotary_pos_emb
    from transformers.models.modernbert import modeling_modernbert

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", apply_rotary_pos_emb)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the layers as nodes of autograd ran."""
    ran: list[Any] = []
    run = Training.run

    def noted(self: Training, model: Any, batch: Any, *arguments: Any) -> Any:
        ran.append(batch)
        return run(self, model, batch, *arguments)

    monkeypatch.setattr(Training, "run", noted)
    return ran


def original(model_type: str, name: str = "BertModel", p: float = 0.0) -> Any:
    """A random model of transformers in training mode, all of whose dropouts have the probability p."""
    config = theirs(model_type, name).config
    dropouts = {key: p for key in DROPOUTS if hasattr(config, key)}
    return theirs(model_type, name, **SIZES, **dropouts).train()


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model in a dtype; its frequencies stay in float32, as in a model that was loaded in it."""
    frequencies = {name: buffer.float() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model = in_dtype(model, dtype)
    for name, buffer in frequencies.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = buffer
    return model


@pytest.mark.parametrize(("model_type", "name"), MODELS)
def test_every_head(model_type: str, name: str) -> None:
    """Catches a gradient that is lost, doubled, or leaks from padding, and one where the original has none."""
    model, batch = original(model_type, name), labelled(model_type, name)
    ours = accelerated_copy(model)
    assert_close("loss", *(step(each, batch) for each in (ours, model)))
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_rounding(model_type: str, dtype: torch.dtype, batches: list[Any]) -> None:
    """Catches gradients that lose more to rounding than PyTorch's own, and layers that run operation by operation."""
    name = "BertForTokenClassification"
    eager = rounded(original(model_type, name), dtype)
    exact, ours, batch = in_dtype(eager, torch.float64), accelerated_copy(eager), labelled(model_type, name)
    for each in (exact, ours, eager):
        step(each, batch)
    errors = [0.0, 0.0]
    for name, parameter in exact.named_parameters():
        truth = parameter.grad
        if truth is None or not truth.any():
            continue
        for i, each in enumerate((ours, eager)):
            difference = each.get_parameter(name).grad.double() - truth
            errors[i] += (difference.square().sum() / truth.square().mean()).item()
    n = sum(p.numel() for p in exact.parameters() if p.grad is not None and p.grad.any())
    ours_error, eager_error = ((error / n) ** 0.5 for error in errors)
    assert ours_error <= 1.25 * eager_error + 0.5 * torch.finfo(dtype).eps
    assert len(batches) == 1 and counts(ours) == {"fastbert": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dropout_and_checkpointing(model_type: str, batches: list[Any]) -> None:
    """Catches dropouts that are not the live model's, and layers that are computed again with other masks."""
    model, batch = rounded(original(model_type, p=0.3), torch.float32), labelled(model_type, "BertModel")
    ours, found = accelerated_copy(model), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()  # whose hook on the embeddings has our layers run one by one
        ours.zero_grad()
        torch.manual_seed(4)
        loss_of(ours, batch).backward()
        found.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert all(rms_error(one, other) < 1e-5 for one, other in zip(*found, strict=True)) and len(batches) == 1
    assert counts(ours) == {"fastbert": 2}
    torch.manual_seed(5)
    other = loss_of(ours, batch).item()
    torch.manual_seed(4)
    assert other != loss_of(ours, batch).item() != loss_of(ours.eval(), batch).item()
