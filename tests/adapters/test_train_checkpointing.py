"""Gradient checkpointing of transformers, and what PEFT and Trainer do around it, is followed layer by layer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from fastbert.adapters import counts
from fastbert.bench.memory import saved_for_backward
from fastbert.models.bert import BertEncoder
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients
from train_cases import FAMILIES, accelerated_copy, labelled, loss_of, original, step

MANY = {"bert": {"num_hidden_layers": 4}, "distilbert": {"n_layers": 4}}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Old names of transformers' methods are taken on purpose: every version has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def kept_by(model: Any, batch: dict[str, Any]) -> int:
    """The bytes of the tensors that a forward pass keeps for the backward pass, but for parameters."""
    return saved_for_backward(lambda: loss_of(model, batch), model.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_every_family(model_type: str, options: dict[str, Any] | None) -> None:
    """Catches activations that are kept all the same, other gradients, and checkpointing that never ends."""
    model = original(model_type, **MANY.get(model_type, MANY["bert"]))
    ours, batch = accelerated_copy(model), labelled(model_type, "BertModel")
    plain = kept_by(ours, batch)
    ours.gradient_checkpointing_enable(options)
    assert kept_by(ours, batch) < 0.45 * plain
    losses = [step(each, batch) for each in (ours, model)]
    assert_close("loss", *losses)
    assert_gradients(ours, model, GRADIENT_BOUND)
    with torch.no_grad():
        loss_of(ours, batch)
    ours.eval()
    assert kept_by(ours, batch) > 0.9 * plain
    ours.train().gradient_checkpointing_disable()
    assert kept_by(ours, batch) > 0.9 * plain
    assert counts(ours) == {"fastbert": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers(dtype: torch.dtype) -> None:
    """Catches a fused layer that keeps its activations, in the dtypes that have kernels."""
    ours, batch = accelerated_copy(original(dtype=dtype, **MANY["bert"])), labelled("bert", "BertModel")
    plain = kept_by(ours, batch)
    ours.gradient_checkpointing_enable()
    assert kept_by(ours, batch) < 0.45 * plain
    assert counts(ours) == {"fastbert": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masks_are_drawn_again(dtype: torch.dtype) -> None:
    """Catches a recomputed layer with other dropouts than the first pass had."""
    ours, batch = accelerated_copy(original(dtype=dtype, p=0.4)), labelled("bert", "BertModel")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
            if hasattr(ours, "_require_grads_hook"):  # of transformers 5
                ours.disable_input_require_grads()  # Embeddings with a hook are called, and round in another way.
        torch.manual_seed(7)
        loss = step(ours, batch)
        results.append([loss, *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that are all taken where every second one is asked for, as transformers 5.23 lets one ask."""
    taken: list[list[bool]] = []
    checkpoint_of = BertEncoder.checkpoint_of

    def noted(self: Any, i: int) -> Any:
        function = checkpoint_of(self, i)
        taken[-1].append(function is not None)
        return function

    model = original(**MANY["bert"])
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    ours.gradient_checkpointing_enable()
    monkeypatch.setattr(BertEncoder, "checkpoint_of", noted)
    for layers in ([True] * 4, [True, False, True, False], [False] * 4):
        for layer, active in zip(ours.encoder.layer, layers, strict=True):
            layer.gradient_checkpointing = active
        taken.append([])
        step(ours, batch)
        assert taken[-1] == layers
    step(model, batch)
    assert_gradients(ours, model, GRADIENT_BOUND)
    if "every_n_layers" in inspect.signature(transformers.PreTrainedModel._set_gradient_checkpointing).parameters:
        ours.activation_checkpointing_enable(every_n_layers=2)
        taken.append([])
        step(ours, batch)
        assert taken[-1] == [True, False, True, False]


def test_a_function_of_the_user_s() -> None:
    """Catches a function that replaces PyTorch's checkpoint and is passed over, as one that counts or offloads."""
    calls = []

    def mine(function: Any, *args: Any) -> Any:
        calls.append(1)
        return checkpoint(function, *args, use_reentrant=False)

    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    ours._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=mine)
    for each in (ours, model):
        step(each, batch)
    assert len(calls) == 2
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


def test_inputs_that_require_gradients() -> None:
    """Catches the hook of `enable_input_require_grads` that makes a call run as before, or that is passed over."""
    model = original().requires_grad_(False)
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    assert not loss_of(ours, batch).requires_grad
    for each in (ours, model):
        each.enable_input_require_grads()
        each.encoder.layer[1].output.dense.weight.requires_grad_(True)
        assert each(**batch, output_hidden_states=True).hidden_states[1].requires_grad
        step(each, batch)
    assert_gradients(ours, model, GRADIENT_BOUND)
    ours.disable_input_require_grads()
    assert not ours(**batch, output_hidden_states=True).hidden_states[1].requires_grad
    assert counts(ours) == {"fastbert": 4}


def test_a_checkpoint_around_the_model() -> None:
    """Catches a whole model that is recomputed with other masks, or that runs here in one pass alone."""
    model = original("bert", "BertForSequenceClassification", p=0.3)
    ours, batch = accelerated_copy(model), labelled("bert", "BertForSequenceClassification")
    results = []
    for around in (False, True):
        torch.manual_seed(2)
        ours.zero_grad()
        loss = checkpoint(loss_of, ours, batch, use_reentrant=False) if around else loss_of(ours, batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert counts(ours) == {"fastbert": 3}


def test_a_checkpoint_around_the_encoder() -> None:
    """Catches the error with which PyTorch ends a recomputation, at the pooler here, taken for a fault of our path."""
    model = original("bert", "BertModel", p=0.3)
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    results = []
    for around in (False, True):
        torch.manual_seed(2)
        ours.zero_grad()
        hidden, pooled = (checkpoint(ours, **batch, use_reentrant=False) if around else ours(**batch)).to_tuple()
        (hidden.sin().sum() + pooled.exp().sum()).backward()
        results.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert set(counts(ours)) == {"fastbert"}
