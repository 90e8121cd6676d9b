"""AdamW decays the matrices alone, and its state goes by the names of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastbert import BertConfig, BertForPreTraining
from fastbert.training.optimizer import (
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parameter_groups,
)

SIZES = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 20}  # fmt: skip


def bert() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(**SIZES))


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    ids = set(map(id, parameters))
    return {name for name, p in model.named_parameters() if id(p) in ids}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One update with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_groups() -> None:
    """Catches a bias or a norm that decays, a matrix that does not, and tied weights that are updated twice."""
    model = bert()
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    every = dict(model.named_parameters())
    assert len(decayed) + len(kept) == len(every) and not set(map(id, decayed)) & set(map(id, kept))
    assert names_of(model, kept) == {name for name in every if "LayerNorm" in name or name.endswith("bias")}
    assert "bert.embeddings.word_embeddings.weight" in names_of(model, decayed)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_frozen_parameters_are_left_out() -> None:
    """Catches a frozen embedding that decays, and a model with nothing to train that is trained in silence."""
    model = bert()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert "bert.embeddings.word_embeddings.weight" not in names_of(model, groups[0]["params"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: it has no parameter to train"):
        parameter_groups(model, 0.1)


def test_a_norm_of_two_dimensions_does_not_decay() -> None:
    """Catches a LayerNorm over two axes whose weight is taken for a matrix."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 2)))
    assert names_of(model, parameter_groups(model, 0.1)[0]["params"]) == {"0.weight"}


def test_constants_and_fused() -> None:
    """Catches constants that are not BERT's, and the slow loop over parameters on a CPU."""
    optimizer = make_optimizer(bert(), learning_rate=1e-3)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_state_survives_another_order(tmp_path: Path) -> None:
    """Catches a state by number, which another order of groups would put on other parameters, and a lossy one."""
    model, twin = bert(), bert()
    optimizer = make_optimizer(model, learning_rate=1e-2)
    stepped(model, optimizer, 1)
    torch.save(optimizer_state(optimizer, model), tmp_path / "optimizer.pt")

    twin.load_state_dict(model.state_dict())
    groups = parameter_groups(twin, 0.01)[::-1]
    for group in groups:
        group["params"].reverse()
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, fused=True)
    load_optimizer_state(other, twin, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in (2, 3):
        stepped(model, optimizer, seed)
        stepped(twin, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loaded_state_is_a_copy() -> None:
    """Catches two optimizers that update the same moments."""
    model = bert()
    optimizer = make_optimizer(model, learning_rate=1e-2)
    stepped(model, optimizer, 1)
    state = optimizer_state(optimizer, model)
    before = {name: values["exp_avg"].clone() for name, values in state["state"].items()}
    twin = bert()
    other = make_optimizer(twin, learning_rate=1e-2)
    load_optimizer_state(other, twin, state)
    stepped(twin, other, 2)
    assert all(torch.equal(before[name], values["exp_avg"]) for name, values in state["state"].items())


def test_a_state_before_the_first_step() -> None:
    """Catches a checkpoint of step 0 that cannot be loaded."""
    model = bert()
    optimizer = make_optimizer(model, learning_rate=1e-2)
    load_optimizer_state(optimizer, model, optimizer_state(optimizer, model))
    stepped(model, optimizer, 1)


def test_another_model_is_refused() -> None:
    """Catches a state that is loaded in part, or onto weights of another shape."""
    model = bert()
    optimizer = make_optimizer(model, learning_rate=1e-2)
    stepped(model, optimizer, 1)
    state: dict[str, Any] = optimizer_state(optimizer, model)
    small = BertForPreTraining(BertConfig(**SIZES | {"vocab_size": 47}))
    with pytest.raises(ValueError, match="word_embeddings.weight has the shape .53, 16., expected .47, 16."):
        load_optimizer_state(make_optimizer(small, learning_rate=1e-2), small, state)
    deep = BertForPreTraining(BertConfig(**SIZES | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"it lacks the model's \['bert.encoder.layer.1"):
        load_optimizer_state(make_optimizer(deep, learning_rate=1e-2), deep, state)
    with pytest.raises(ValueError, match="parameters are not of this model"):
        optimizer_state(optimizer, deep)
