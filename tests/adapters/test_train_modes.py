"""An accelerated model drops out where the original would: by each module's own probability and mode.

A dropout with the probability 1 leaves nothing to chance, so that both models must agree to the last digits.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert.adapters import counts, live_encoder, versions
from fastbert.adapters.state import STATE
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients
from train_cases import FAMILIES, accelerated_copy, labelled, loss_of, original, step


def dropouts_of(model: Any) -> dict[str, nn.Module]:
    """The dropouts inside of the encoder by name."""
    return {name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.Dropout)}


def attentions_of(model: Any) -> list[Any]:
    return [m for m in model.base_model.modules() if hasattr(m, "dropout") and hasattr(m, "is_causal")]


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def assert_same(ours: Any, model: Any, batch: dict[str, Any]) -> None:
    """Both give the same loss and gradients, in modes that stay."""
    before = modes_of(ours)
    losses = [step(each, batch) for each in (ours, model)]
    assert_close("loss", *losses)
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert modes_of(ours) == before == modes_of(model)


def set_probability(models: list[Any], name: str, p: float) -> None:
    """Sets the probability of one dropout, and the copy that attention by SDPA has of it in 4.x."""
    for model in models:
        around, _, _ = name.rpartition(".")
        model.base_model.get_submodule(name).p = p
        if hasattr(model.base_model.get_submodule(around), "dropout_prob"):
            model.base_model.get_submodule(around).dropout_prob = p


EAGER = [(model_type, "eager") for model_type in FAMILIES]


@pytest.mark.parametrize(("model_type", "attention"), [*EAGER, ("bert", "sdpa"), ("distilbert", "sdpa")])
def test_every_place(model_type: str, attention: str) -> None:
    """Catches a dropout that is missing, or that the family has not, and one that drops out in eval mode."""
    model = original(model_type, attn_implementation=attention)
    ours, batch = accelerated_copy(model), labelled(model_type, "BertModel")
    names = list(dropouts_of(model))
    n_sites = 1 + 2 * (2 if model_type == "distilbert" else 3)
    assert len(names) == n_sites
    plain, losses = step(model, batch), []
    for name in names:
        set_probability([ours, model], name, 1.0)
        assert_same(ours, model, batch)
        losses.append(step(ours, batch).item())
        for each in (ours, model):
            each.eval()
        assert_close("eval", step(ours, batch), plain)
        for each in (ours, model):
            each.train()
        set_probability([ours, model], name, 0.0)
    assert len({round(loss, 9) for loss in losses}) == n_sites and plain.item() not in losses
    assert counts(ours) == {"fastbert": 3 * n_sites}


def dropping_all(model: Any) -> Any:
    """Sets every probability to 1."""
    for name in dropouts_of(model):
        set_probability([model], name, 1.0)
    return model


def mixes(model: Any) -> dict[str, list[nn.Module]]:
    """Modules whose mode is the other one, for every mix of modes."""
    encoder = model.base_model
    dropouts = list(dropouts_of(model).values())
    return {
        "nothing": [],
        "a layer": list(encoder.encoder.layer[0].modules()),
        "the embeddings": list(encoder.embeddings.modules()),
        "one dropout": dropouts[-1:],
        "all dropouts": dropouts,
        "attentions": attentions_of(model),
        "the dropouts of attention": [attention.dropout for attention in attentions_of(model)],
        "the model alone": [encoder],
    }


@pytest.mark.parametrize("what", list(mixes(original())))
@pytest.mark.parametrize("training", [True, False])
def test_mixed_modes(what: str, training: bool) -> None:
    """Catches a part in another mode that drops out with the rest, or does not: frozen layers, Monte Carlo dropout."""
    model = dropping_all(original().train(training))
    for module in mixes(model)[what]:
        module.training = not training
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    for _ in range(2):
        assert_same(ours, model, batch)
    for each in (ours, model):
        for module in each.modules():
            module.training = not module.training
    assert_same(ours, model, batch)
    assert counts(ours) == {"fastbert": 3}


def test_identities_in_the_place_of_dropouts() -> None:
    """Catches a dropout that somebody has taken out, and that drops out all the same."""
    model = dropping_all(original())
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    step(ours, batch)
    for each in (ours, model):
        each.embeddings.dropout = nn.Identity()
        for layer in each.encoder.layer:
            layer.attention.output.dropout = nn.Identity()
            layer.output.dropout = nn.Identity()
            layer.attention.self.dropout.p = 0.0
    assert_same(ours, model, batch)
    assert counts(ours) == {"fastbert": 2}


@pytest.mark.skipif(versions.transformers_version()[0] < 5, reason="4.x calls the dropout of attention")
def test_attention_without_a_probability() -> None:
    """Catches a training step where the original raises an error."""
    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    ours.encoder.layer[1].attention.self.dropout = nn.Identity()
    with pytest.raises(AttributeError, match="'p'"):
        step(ours, batch)
    step(ours.eval(), batch)
    assert counts(ours) == {"encoder.layer.1.attention.self.dropout has no p": 1, "fastbert": 1}


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
def test_statistics(model_type: str) -> None:
    """Catches another distribution of the outputs than the original's, as of a wrong rate or scale somewhere."""
    model = original(model_type, dtype=torch.float32, p=0.2)
    ours = accelerated_copy(model)
    batch = {"input_ids": torch.randint(1, 100, (1, 13)).expand(600, -1), "attention_mask": torch.ones(600, 13)}
    batch["attention_mask"][::2, 9:] = 0
    found: list[list[Tensor]] = []
    for each in (ours, model):
        with torch.no_grad():
            states = each(**batch, output_hidden_states=True).hidden_states
        found.append([state[:, :9, :16].double() for state in states])
    for ours_state, their_state in zip(*found, strict=True):
        for first in (0, 1):  # Rows with padding, and rows without.
            a, b = ours_state[first::2], their_state[first::2]
            spread = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
            distances = (a.mean(0) - b.mean(0)) / spread
            assert distances.abs().max() < 5 and distances.pow(2).mean() < 1.5
            assert ((a.std(0) / b.std(0)).log()).mean().abs() < 0.05
    zeros = (found[0][0] == 0).double().mean()
    assert model_type == "electra" or abs(zeros - 0.2) < 0.01  # The first states: what the embeddings drop out.


def test_seeds() -> None:
    """Catches masks that a seed does not govern, that two layers or calls share, and numbers that nothing needs."""
    model = original("bert", "BertForSequenceClassification", torch.float32, p=0.3)
    ours, batch = accelerated_copy(model), labelled("bert", "BertForSequenceClassification")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(step(ours, batch).item())
        last = {name: p.grad.clone() for name, p in ours.named_parameters()}
        if len(losses) == 1:
            first = last
        if len(losses) == 2:
            assert all(torch.equal(first[name], last[name]) for name in first)
    assert losses[0] == losses[1] != losses[2]
    assert step(ours, batch).item() != losses[2]
    for module in dropouts_of(ours).values():
        module.p = 0.0
    ours.dropout.p = 0.0
    before = torch.get_rng_state()
    assert step(ours, batch).item() == step(ours, batch).item()
    assert torch.equal(before, torch.get_rng_state())


def test_one_encoder_for_all_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches modules that are looked through anew at every step, as a Trainer calls train() before each."""
    made = []
    init = live_encoder.LiveEncoder.__init__
    monkeypatch.setattr(live_encoder.LiveEncoder, "__init__", lambda *args: (made.append(1), init(*args))[1])
    ours, batch = fastbert.accelerate(original()), labelled("bert", "BertModel")
    made.clear()
    for _ in range(3):
        for _ in range(2):
            step(ours.train(), batch)
        with torch.no_grad():
            ours.eval()(**batch)
    assert len(made) == 1 and counts(ours) == {"fastbert": 9}
    assert ours.__dict__[STATE].encoder(ours).model.training is False


def test_copies_in_training_mode() -> None:
    """Catches a copy of a model in training mode that comes back in eval mode, or without its dropouts."""
    ours, batch = fastbert.accelerate(dropping_all(original())), labelled("bert", "BertModel")
    loss = step(ours, batch)
    copied = copy.deepcopy(ours)
    assert copied.training and torch.equal(step(copied, batch), loss)
    copied.eval()
    assert not torch.equal(step(copied, batch), loss) and torch.equal(step(ours, batch), loss)


def test_restored_in_training_mode() -> None:
    """Catches modes or probabilities that accelerate has written to the model."""
    model = original(p=0.25)
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    step(ours, batch)
    fastbert.restore(ours)
    assert modes_of(ours) == modes_of(model)
    assert [d.p for d in dropouts_of(ours).values()] == [0.25] * 7
    results = []
    for each in (ours, model):
        torch.manual_seed(5)
        results.append(loss_of(each, batch))
    assert torch.equal(*results)
