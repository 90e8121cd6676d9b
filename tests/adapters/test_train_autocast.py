"""Accelerated models train under autocast, with parameters in float32, as they do without acceleration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastbert.adapters import counts
from train_cases import FAMILIES, accelerated_copy, assert_rounding, gradients_of_seeds, labelled, loss_of, original

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dtypes_of_outputs(model_type: str, dtype: torch.dtype) -> None:
    """Catches a stream of another dtype than the original's, or gradients of another dtype than the parameters'."""
    model = original(model_type, dtype=torch.float32)
    ours, batch = accelerated_copy(model), labelled(model_type, "BertModel")
    found = []
    for each in (ours, model):
        with torch.autocast("cpu", dtype):
            output = each(**batch, output_hidden_states=True)
        tensors = [output.last_hidden_state, *output.hidden_states, getattr(output, "pooler_output", None)]
        found.append([None if tensor is None else tensor.dtype for tensor in tensors])
        with torch.autocast("cpu", dtype):
            loss_of(each, batch).backward()
    assert found[0] == found[1]
    if model_type != "electra":  # Whose embeddings are projected by a linear, in 16 bits.
        assert found[0][0] == torch.float32
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}
    assert counts(ours) == {"fastbert": 2}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
def test_rounding(model_type: str, name: str, dtype: torch.dtype) -> None:
    """Catches gradients that lose more to rounding under autocast than the original's."""
    assert_rounding(*gradients_of_seeds(model_type, name, torch.float32, dtype), torch.float32)


def steps(model: Any, dtype: torch.dtype, n_steps: int, scale: float) -> tuple[list[float], Any]:
    """The losses of a few steps with a scaler, and the scaler."""
    batch = labelled("bert", "BertForSequenceClassification")
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=scale)
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype if dtype in LOW else None, enabled=dtype in LOW):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler


def test_a_scaler_of_gradients() -> None:
    """Catches gradients in float16 that vanish, or a step that the scaler skips for want of infinite ones."""
    model = original("bert", "BertForSequenceClassification", torch.float32)
    ours, exact = accelerated_copy(model), copy.deepcopy(model)
    found, expected = (steps(each, torch.float16, 12, 1024.0) for each in (ours, model))
    plain, _ = steps(exact, torch.float32, 12, 1.0)
    assert found[1].get_scale() == expected[1].get_scale() == 1024.0
    assert found[0][-1] < 0.9 * found[0][0]
    assert max(abs(a - b) for a, b in zip(found[0], plain, strict=True)) < 0.02
    assert counts(ours) == {"fastbert": 12}


def test_a_scale_that_overflows_is_lowered() -> None:
    """Catches infinite gradients that are hidden from the scaler, which then would not lower its scale."""
    ours = accelerated_copy(original("bert", "BertForSequenceClassification", torch.float32))
    losses, scaler = steps(ours, torch.float16, 8, 2.0**40)
    assert scaler.get_scale() < 2.0**40 and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert all(bool(p.isfinite().all()) for p in ours.parameters())


def test_autocast_around_a_part_alone() -> None:
    """Catches a packed weight, or a product in 16 bits, that outlives the autocast it was made in."""
    model = original("bert", dtype=torch.float32)
    ours, batch = accelerated_copy(model), labelled("bert", "BertModel")
    before = loss_of(ours, batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(ours, batch).item()
    assert loss_of(ours, batch).item() == before != inside
