"""Every parameter of an accelerated model in training mode gets the gradient that it gets without acceleration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastbert
from fastbert.adapters import counts
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients
from train_cases import (
    FAMILIES,
    MODELS,
    accelerated_copy,
    assert_rounding,
    gradients_of_seeds,
    labelled,
    loss_of,
    original,
    step,
)


def skip_without_pooler(model: Any, name: str) -> None:
    if name == "BertForMultipleChoice" and getattr(model.base_model, "pooler", "") is None:
        pytest.skip("transformers 5.0 makes it without the pooler that it reads, and fails by itself")


@pytest.mark.parametrize(("model_type", "name"), MODELS)
def test_every_family_and_head(model_type: str, name: str) -> None:
    """Catches a gradient that is lost, doubled, or leaks from padding, and one where the original has none."""
    model = original(model_type, name)
    skip_without_pooler(model, name)
    ours, batch = accelerated_copy(model), labelled(model_type, name)
    losses = [step(each, batch) for each in (ours, model)]
    assert_close("loss", *losses)
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_rounding_of_every_family(model_type: str, dtype: torch.dtype) -> None:
    """Catches gradients that lose more to rounding than PyTorch's own, in float32 and in 16 bits."""
    assert_rounding(*gradients_of_seeds(model_type, "BertForTokenClassification", dtype), dtype)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_embeddings_as_inputs(model_type: str) -> None:
    """Catches gradients of `inputs_embeds` that are lost, or that padding gets."""
    model = original(model_type)
    ours, batch = accelerated_copy(model), labelled(model_type, "BertModel")
    table = model.get_input_embeddings().weight.detach()
    gradients = []
    for each in (ours, model):
        embeds = table[batch["input_ids"]].requires_grad_()
        loss_of(each, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}).backward()
        gradients.append(embeds.grad)
    assert_close("inputs_embeds", *gradients, GRADIENT_BOUND)
    assert not gradients[0][batch["attention_mask"] == 0].any()
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


def frozen(model: Any, what: str) -> Any:
    """Freezes a part of a model with a head."""
    encoder = model.base_model
    layers = encoder.encoder.layer
    parts: dict[str, list[Any]] = {
        "embeddings": [encoder.embeddings],
        "lower layers": [encoder.embeddings, layers[0]],
        "upper layer": [layers[1]],
        "encoder": [encoder],
        "all but biases": [p for name, p in model.named_parameters() if not name.endswith("bias")],
        "queries": [layer.attention.self.query for layer in layers],
    }
    for part in parts[what]:
        part.requires_grad_(False)
    return model


@pytest.mark.parametrize("what", ["embeddings", "lower layers", "upper layer", "encoder", "all but biases", "queries"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parts(what: str, checkpointing: bool) -> None:
    """Catches a gradient of what is frozen, and one that does not pass through it to what lies below."""
    model = frozen(original("bert", "BertForSequenceClassification"), what)
    ours, batch = accelerated_copy(model), labelled("bert", "BertForSequenceClassification")
    if checkpointing:
        ours.gradient_checkpointing_enable()
    losses = [step(each, batch) for each in (ours, model)]
    assert_close("loss", *losses)
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert counts(ours) == {"fastbert": 1}


def test_hidden_states_in_between() -> None:
    """Catches hidden states that are cut off from the graph, or that a loss on them does not reach."""
    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    valid = batch["attention_mask"].bool()
    for each in (ours, model):
        states = each(**batch, output_hidden_states=True).hidden_states
        torch.stack([state[valid].pow(3).mean() * (i + 1) for i, state in enumerate(states)]).sum().backward()
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradients_add_up() -> None:
    """Catches a second backward pass that overwrites what the first has left, or the graph of another call."""
    model = original("bert", "BertForSequenceClassification")
    ours = accelerated_copy(model)
    batch = labelled("bert", "BertForSequenceClassification")
    other = {**batch, "labels": 1 - batch["labels"], "attention_mask": torch.ones_like(batch["attention_mask"])}
    for each in (ours, model):
        losses = [loss_of(each, one) / 2 for one in (batch, other)]
        losses[1].backward()
        losses[0].backward()
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_padding_on_the_left_trains_as_before() -> None:
    """Catches a batch that our path does not support, trained here, or not counted."""
    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    assert torch.equal(step(ours, batch), step(model, batch))
    assert counts(ours) == {"padding in the first column": 1}


def test_the_loss_s_own_errors() -> None:
    """Catches an in-place change of weights between forward and backward that goes unnoticed."""
    ours, batch = accelerated_copy(original()), labelled("bert", "BertModel")
    loss = loss_of(ours, batch)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_labels_that_do_not_fit() -> None:
    """Catches an error of the head that is taken for one of ours."""
    ours = accelerated_copy(original("bert", "BertForSequenceClassification"))
    batch = labelled("bert", "BertForSequenceClassification")
    with pytest.raises(IndexError):
        ours(**{**batch, "labels": batch["labels"] + 7})
    assert counts(ours) == {"fastbert": 1}


def test_strict_trains() -> None:
    """Catches a call in training mode that strict refuses."""
    ours, batch = fastbert.accelerate(original(), strict=True), labelled("bert", "BertModel")
    step(ours, batch)
    assert counts(ours) == {"fastbert": 1}
