"""Training and inference alternate on an accelerated model, whose weights change by every kind of optimizer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert.adapters import counts
from fastbert.ops import silent_writes
from model_cases import GRADIENT_BOUND, assert_close, assert_gradients
from train_cases import accelerated_copy, labelled, loss_of, original, step

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-2),
}


def evaluated(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return loss_of(model, batch)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_and_evaluation_alternate(optimizer: str, dtype: torch.dtype) -> None:
    """Catches weights that are derived for inference and outlive a step, and training on those of an earlier one."""
    name = "BertForSequenceClassification"
    model = original("bert", name, dtype)
    ours, batch = accelerated_copy(model), labelled("bert", name)
    bound = 1e-9 if dtype == torch.float64 else 2e-5
    optimizers = [OPTIMIZERS[optimizer](each.parameters()) for each in (ours, model)]
    before = evaluated(ours, batch).item()
    for i in range(6):
        for each, its in zip((ours, model), optimizers, strict=True):
            each.train()
            for _ in range(1 + i % 2):
                loss = step(each, batch)
                its.step()
        assert_close("evaluated", evaluated(ours, batch), evaluated(model, batch), bound)
        assert_close("a copy", evaluated(ours, batch), evaluated(fastbert.restore(copy.deepcopy(ours)), batch), bound)
        if i == 3:  # Some evaluate without a change of modes.
            with torch.no_grad():
                assert_close("in training mode", loss_of(ours.train(), batch), loss_of(model.train(), batch), bound)
    assert loss.item() < 0.8 * before
    assert set(counts(ours)) == {"fastbert"}


def write_unseen(weight: nn.Parameter) -> None:
    """Writes one number through `.data`, which is none of those that are looked at."""
    place = next(i for i in range(weight.numel()) if i not in silent_writes._places(weight))
    weight.data.view(-1)[place] += 3.0


def test_writes_that_nothing_counts() -> None:
    """Catches inference on weights from before a write through `.data`, in training mode or between two modes."""
    ours, batch = accelerated_copy(original(dtype=torch.float32)), labelled("bert", "BertModel")
    plain = fastbert.restore(copy.deepcopy(ours))
    evaluated(ours, batch)
    for each in (ours, plain):  # In training mode.
        step(each.train(), batch)
        write_unseen(each.encoder.layer[0].attention.self.query.weight)
    assert_close("training", step(ours, batch), step(plain, batch), 1e-5)
    assert_close("evaluated", evaluated(ours, batch), evaluated(plain, batch), 1e-5)
    for each in (ours, plain):  # Between eval and eval, with no call in training mode.
        write_unseen(each.train().encoder.layer[1].output.dense.weight)
    assert_close("evaluated again", evaluated(ours, batch), evaluated(plain, batch), 1e-5)
    for each in (ours, plain):  # Modes without train() and eval().
        for module in each.modules():
            module.training = True
        step(each, batch)
        write_unseen(each.encoder.layer[1].attention.self.key.weight)
        write_unseen(each.encoder.layer[0].intermediate.dense.weight)
        for module in each.modules():
            module.training = False
    with torch.no_grad():
        assert_close("by hand", loss_of(ours, batch), loss_of(plain, batch), 1e-5)


def test_parameters_that_are_frozen_and_thawed() -> None:
    """Catches a graph that remembers which parameters required gradients in the last call."""
    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    for active in (True, False, True):
        for each in (ours, model):
            each.embeddings.requires_grad_(active)
            each.encoder.layer[0].requires_grad_(active)
            step(each, batch)
        assert_gradients(ours, model, GRADIENT_BOUND)


def test_modules_that_are_replaced_between_steps() -> None:
    """Catches training of a module that is no longer there: another vocabulary, another linear, another dtype."""
    model = original("bert", "BertForMaskedLM")
    ours, batch = accelerated_copy(model), labelled("bert", "BertForMaskedLM")
    step(ours, batch)
    for each in (ours, model):
        torch.manual_seed(1)
        each.resize_token_embeddings(120)
        each.bert.encoder.layer[0].output.dense = nn.Linear(37, 32, bias=False).double()
    for each in (ours, model):
        step(each, batch)
    assert_gradients(ours, model, GRADIENT_BOUND)
    assert set(counts(ours)) == {"fastbert"}


def test_another_attempt_after_an_error() -> None:
    """Catches an error in a step that leaves a wrong mode, or half of a graph, behind."""
    model = original()
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    with pytest.raises(IndexError, match="input_ids"):
        step(ours, {**batch, "input_ids": batch["input_ids"] + 1000})
    for each in (ours, model):
        step(each, batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_what_is_left_to_the_original() -> None:
    """Catches a hook, a replica or a transform that is passed over in training mode."""
    ours, batch = accelerated_copy(original()), labelled("bert", "BertModel")
    seen: list[Any] = []
    handle = ours.encoder.layer[1].register_full_backward_hook(lambda *args: seen.append(args))
    step(ours, batch)
    handle.remove()
    assert len(seen) == 1
    replica = ours._replicate_for_data_parallel()
    replica._modules, replica._parameters = dict(ours._modules), dict(ours._parameters)
    loss_of(replica, batch).backward()
    with FlopCounterMode(display=False):
        step(ours, batch)
    ours(**batch, output_attentions=True)
    assert counts(ours) == {
        "a module inside has hooks": 1,
        "a replica of DataParallel": 1,
        "a dispatch mode observes every operation": 1,
        "attentions are requested": 1,
    }
    with pytest.raises(fastbert.BackendError, match="attentions are requested"):
        fastbert.accelerate(ours, strict=True)(**batch, output_attentions=True)


def test_the_gradients_of_functions() -> None:
    """Catches a transform of torch.func over a model in training mode."""
    model = original("bert", "BertForSequenceClassification")
    ours, batch = accelerated_copy(model), labelled("bert", "BertForSequenceClassification")
    gradients = []
    for each in (ours, model):
        parameters = {name: p.detach() for name, p in each.named_parameters()}

        def loss(parameters: dict[str, torch.Tensor], each: Any = each) -> torch.Tensor:
            return torch.func.functional_call(each, parameters, kwargs=batch).loss

        gradients.append(torch.func.grad(loss)(parameters))
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, 1e-9, 1e-12), name


@pytest.mark.slow
def test_compiled_around() -> None:
    """Catches torch.compile around a model that trains, which must break the graph at our forward and no more."""
    name = "BertForSequenceClassification"
    model = original("bert", name, torch.float32)
    ours, batch = accelerated_copy(model), labelled("bert", name)
    compiled = torch.compile(ours)
    for _ in range(2):
        loss = compiled(**batch).loss
        ours.zero_grad()
        loss.backward()
    assert_close("loss", loss.detach(), step(model, batch), 1e-5)
    for (parameter, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, 1e-3, 1e-5), parameter
    assert counts(ours) == {"fastbert": 2}


def test_steps_cost_little_beside_the_work() -> None:
    """Catches modules that are looked through one by one, or made anew, at every step of training."""
    ours = fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**SIZES))).train()
    encoder = ours.__dict__["_fastbert"].encoder(ours)
    best = min(_seconds(lambda: (ours.__dict__["_fastbert"].encoder(ours), encoder.obstacle())) for _ in range(20))
    assert best < 2e-3


SIZES = {
    "vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 12, "intermediate_size": 32
}  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
