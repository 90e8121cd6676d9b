"""BertModel trains as transformers' does: gradients, dropout and autocast."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.ops import dispatch
from helpers import rms_error
from model_cases import (
    BATCH,
    GRADIENT_BOUND,
    LENGTH,
    assert_close,
    assert_gradients,
    assert_gradients_as_accurate,
    both_with_gradients,
    in_dtype,
    make_batch,
    place,
    randn,
    run,
    theirs,
    trainable,
    twin,
    valid_of,
)


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("shape", ["minilm", "96x3"])
def test_gradients_match_transformers(shape: str, kind: str) -> None:
    """Catches a forward that is right with a backward that is not, for any parameter."""
    model, batch = trainable(shape), make_batch(kind)
    ours = twin(model)
    assert ours.training
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradients_of_the_reference_path() -> None:
    """Catches output_attentions that cuts the graph, though its path must train too."""
    model, batch = trainable("tiny"), make_batch("right")
    ours = twin(model, strict=False)
    both_with_gradients(ours, [model], batch, output_attentions=True)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradients_of_inputs_embeds() -> None:
    """Catches no gradient, or one at padding, for inputs_embeds."""
    model, batch = trainable("tiny"), make_batch("holes")
    embeds = randn(BATCH, LENGTH, 32)
    gradients = []
    for each in (twin(model), model):
        leaf = embeds.clone().requires_grad_()
        both_with_gradients(each, [], batch | {"input_ids": None, "inputs_embeds": leaf})
        gradients.append(leaf.grad)
    assert_close("inputs_embeds.grad", *gradients, GRADIENT_BOUND)
    assert (gradients[0][~valid_of(batch["attention_mask"])] == 0).all()


def test_gradients_of_an_empty_row_are_finite() -> None:
    """Catches NaN flowing back from a row without tokens."""
    ours = twin(trainable("tiny"))
    output = ours(**make_batch("zero_row"))
    (output.last_hidden_state.square().sum() + output.pooler_output.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_gradients_are_as_accurate(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches a backward pass that recomputes or sums in less precision than transformers'."""
    model, batch = trainable("tiny" if backend == "triton" else "96x3"), make_batch("right")
    at = place(backend, device)
    ours, eager = twin(model, dtype, backend, at), in_dtype(model, dtype, at)
    reference = in_dtype(in_dtype(model, dtype), torch.float64)
    both_with_gradients(ours, [eager, reference], batch)
    assert_gradients_as_accurate(ours, eager, reference)


@pytest.mark.parametrize("frozen", ["embeddings", "encoder.layer.0", "query", "pooler"])
def test_frozen_parameters(frozen: str) -> None:
    """Catches a frozen part that stops the gradient of the parts below it, or that gets one."""
    model, batch = trainable("tiny"), make_batch("right")
    ours = twin(model)
    for each in (model, ours):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen not in name)
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_padding_id_gets_no_gradient() -> None:
    """Catches a gradient for the row of nn.Embedding's padding_idx where the mask leaves a [PAD] in."""
    model, batch = trainable("tiny"), make_batch("none")
    batch["input_ids"][:, 5:] = 0
    ours = twin(model)
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradient_modes_agree() -> None:
    """Catches a fused weight that is made differently, or not remade, with gradients on, off or in inference mode."""
    model, batch = theirs(), make_batch("right")
    ours = twin(model)
    expected = run(model, batch)[0][valid_of(batch["attention_mask"])]
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    for first in modes:
        for second in modes:
            fresh = copy.deepcopy(ours)
            for mode in (first, second):
                with mode():
                    output = fresh(**batch).last_hidden_state
                assert output.requires_grad == (mode is torch.enable_grad)
                assert_close(f"{first} {mode}", output[valid_of(batch["attention_mask"])], expected)
    with torch.inference_mode():
        inside = twin(model)
        assert_close("made in inference mode", run(inside, batch)[0], run(ours, batch)[0])


def moments(model: Any, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every hidden state over n passes of one text, as one batch: 2 x ((L + 1) * S * H,)."""
    with torch.no_grad():
        states = model(ids.expand(n, -1), output_hidden_states=True).hidden_states
    samples = torch.stack(states, 1).flatten(1).double()
    return samples.mean(0), samples.var(0)


@pytest.mark.parametrize(("hidden", "attention"), [(0.3, 0.0), (0.0, 0.4), (0.1, 0.1)])
def test_dropout_has_the_moments_of_transformers(hidden: float, attention: float) -> None:
    """Catches a dropout that is missing, in the wrong place, of the wrong probability or not rescaled."""
    model = theirs("BertModel", "tiny", hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    training = in_dtype(model, torch.float32).train()
    ours = twin(training, torch.float32)
    n, ids = 4000, make_batch()["input_ids"][:1, :5]
    (mean, variance), (other_mean, other_variance) = moments(ours, ids, n), moments(training, ids, n)
    varies = other_variance > 1e-9
    assert torch.equal(variance > 1e-9, varies)
    z = (mean - other_mean)[varies] / ((variance + other_variance)[varies] / n).sqrt()
    assert z.abs().max() < 5 and z.square().mean() < 1.5
    assert (variance / other_variance)[varies].log().abs().max() < 0.25


def test_dropout_differs_between_calls_and_not_in_eval() -> None:
    """Catches dropout that is the same on every call, or that runs in eval mode."""
    ours, batch = twin(theirs()), make_batch("right")
    expected = run(ours, batch)[0]
    ours.train()
    first, second = run(ours, batch)[0], run(ours, batch)[0]
    assert not torch.equal(first, second) and not torch.equal(first, expected)
    torch.manual_seed(1)
    again = run(ours, batch)[0]
    torch.manual_seed(1)
    assert torch.equal(run(ours, batch)[0], again)
    assert torch.equal(run(ours.eval(), batch)[0], expected)


def test_dropout_runs_on_kernels(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Catches dropout that the kernels skip, or that goes to another backend, which a strict policy refuses."""
    model, batch = copy.deepcopy(theirs()).train(), make_batch("right")
    ours = twin(model, torch.float32, "triton", device, strict=True)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        first, second = run(ours, batch)[0], run(ours, batch)[0]
    assert not torch.equal(first, second) and not caplog.records
    plain = twin(model, torch.float32, "torch", device, strict=False)
    outputs = []
    for each in (ours, plain):
        torch.manual_seed(3)
        outputs.append(run(each, batch)[0])
    assert rms_error(*outputs) < 1e-4


def test_dropout_beside_attentions_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Catches training on the reference path, which applies no dropout, without a warning."""
    ours = twin(copy.deepcopy(theirs()).train(), strict=False)
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(ours, make_batch(), output_attentions=True)
    assert "output_attentions takes the reference path, which applies no dropout" in caplog.text


def test_autocast_is_as_accurate(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Catches kernels that take autocast's mixture of dtypes for one dtype, or a fallback that is not logged."""
    model, batch = theirs("BertModel", "96x3"), make_batch("right")
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, torch.float32, "triton", device, strict=False)
    dispatch._log_once.cache_clear()
    eager = in_dtype(model, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16), caplog.at_level(logging.WARNING, "fastbert"):
        mine, other = run(ours, batch), run(eager, batch)
    assert "autocast is on" in caplog.text
    expected = run(in_dtype(eager, torch.float64, "cpu"), batch)
    outputs = [output.last_hidden_state.cpu()[valid] for output in (mine, other, expected)]
    # Both end in a LayerNorm of float32, but behind bfloat16 matrices.
    assert rms_error(outputs[0], outputs[2]) <= 1.25 * rms_error(outputs[1], outputs[2]) + torch.finfo().eps
