"""verify finds a planted fault and names the layer that has it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import BertConfig, BertModel, ops
from fastbert.diagnostics.verify.entry import verify
from fastbert_kernels import cpu
from verify_cases import IDS, config, off_by, wrong_in_layer


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config()).eval().to(device)


def test_weights_that_are_not_finite_are_named(model: BertModel) -> None:
    """Catches NaN or infinite weights that pass, or whose layer the user must find."""
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, :2] = math.nan
        model.encoder.layer[0].attention.self.key.bias[0] = -math.inf
        model.encoder.layer[0].attention.self.key.bias[1] = math.nan
    report = verify(model)
    assert not report.ok and not report
    assert report.problems == [
        "encoder.layer.0.attention.self.key.bias: 1 NaN and 1 infinite of 32 values",
        "encoder.layer.1.output.dense.weight: 2 NaN of 1792 values",
    ]
    assert report.states == () and report.weights[1].n_nan == 2
    assert all(problem in str(report) for problem in report.problems) and "FAILED" in str(report)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_operation_that_is_off_is_found(model: BertModel, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of 2 % in one layer that passes, or is put down to another layer."""
    wrong_in_layer(monkeypatch, layer, 2, lambda out: out.mul_(1.02))
    report = verify(model, IDS)
    assert not report.ok
    assert report.problems[0].startswith(f"encoder.layer.{layer} is the first wrong output: error ")
    assert [state.ok for state in report.states] == [True, layer > 0, False, False]


def test_an_error_in_one_short_text_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error in 2 of a thousand tokens that drowns in the rounding of bf16 in the others."""
    model = BertModel(config()).eval().to(device, torch.bfloat16)
    texts = [torch.randint(101, (250,)).tolist() for _ in range(4)]
    texts.insert(1, [2, 3])
    assert verify(model, texts).ok

    def change(out: Tensor) -> None:
        out[250:252] *= 1.3

    wrong_in_layer(monkeypatch, 0, 2, change)
    report = verify(model, texts)
    state = report.states[1]
    assert state.error <= state.bound, "this test wants an error that the sum over all texts hides"
    assert not report.ok and state.worst_text == 1
    assert "encoder.layer.0 is the first wrong output: error" in report.problems[0]
    assert "for text 1 alone" in report.problems[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_that_is_not_finite_is_found(model: BertModel, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN from finite weights that passes a comparison, or that JSON cannot hold."""

    def change(out: Tensor) -> None:
        out[sum(map(len, IDS)) - 1] = value  # rows of padding may follow

    wrong_in_layer(monkeypatch, 1, 2, change)
    report = verify(model, IDS)
    assert report.problems == ["encoder.layer.1 is the first wrong output: its output is not finite (text 3)"]
    assert [state.finite for state in report.states] == [True, True, False, True]
    d = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert d["ok"] is False and d["states"][2]["error"] is None and d["states"][1]["ok"] is True
    assert "FAILED" in str(report)


def test_weights_that_the_model_does_not_follow_are_found(model: BertModel) -> None:
    """Catches fused weights that are not those of the parameters."""
    with torch.no_grad():
        model(torch.tensor([[5, 6]], device=model.device))  # fuses the projections
        weight, _ = model.encoder.layer[1].attention.self.derived.tensors()
        weight[2 * weight.shape[1] :].mul_(1.02)
    report = verify(model, IDS)
    assert report.problems and report.problems[0].startswith("encoder.layer.1 is the first wrong output")


OPS_OF_A_LAYER = {"linear": 2, "varlen_attention": 1, "linear_residual_layer_norm": 2}  # how often a layer calls them


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_percent_in_the_output_of_a_layer_is_put_down_to_it(
    dtype: torch.dtype, layer: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault of 1e-2 that drowns in what bf16 rounds away in the layers before, or is blamed on another."""
    model = BertModel(config(num_hidden_layers=6)).eval().to(device, dtype)
    assert verify(model, IDS).ok
    right, calls = ops.linear_residual_layer_norm, []

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        out = right(*args, **kwargs)
        return off_by(1e-2, out) if (len(calls) - 1) % 12 == 2 * layer + 1 else out

    monkeypatch.setattr(ops, "linear_residual_layer_norm", wrong)
    report = verify(model, IDS)
    assert not report.ok
    assert report.problems[0].startswith(f"encoder.layer.{layer} is the first wrong output: ")
    at_fault = [s.name for s in report.states if s.alone is not None and s.alone.problem is not None]
    assert at_fault == [f"encoder.layer.{layer}"], str(report)
    assert report.states[layer + 1].alone.error == pytest.approx(1e-2, rel=0.3)  # type: ignore[union-attr]


@pytest.mark.parametrize("op", OPS_OF_A_LAYER)
def test_one_percent_in_the_output_of_an_operation_is_put_down_to_its_layer(
    op: str, model: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault of 1e-2 in what one operation gives, in float32, which the residual makes smaller."""
    right, calls = getattr(ops, op), []
    in_a_layer = OPS_OF_A_LAYER[op]

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        out = right(*args, **kwargs)
        return off_by(1e-2, out) if in_a_layer <= (len(calls) - 1) < 2 * in_a_layer else out

    model.pooler = None  # which calls ops.linear too
    assert verify(model, IDS).ok
    monkeypatch.setattr(ops, op, wrong)
    report = verify(model, IDS)
    assert report.problems[0].startswith("encoder.layer.1 is the first wrong output: error ")
    assert [s.alone is None or s.alone.problem is None for s in report.states] == [True, True, False]


@pytest.mark.parametrize("part", ["attention.self.query", "attention.self.value", "output.dense", "intermediate.dense"])
def test_one_percent_in_the_weights_as_they_are_used(
    part: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy of the weights, fused or in another layout, that is 1e-2 off from the parameters."""
    model = BertModel(config(), backend="torch").eval().to(device)
    right = ops.linear if "self" in part or "intermediate" in part else ops.linear_residual_layer_norm
    calls: list[None] = []
    # The calls of layer 1: the projections, then the intermediate; the attention's output, then the layer's.
    place = 2 if "self" in part else 3
    h, rows = 32, {"attention.self.query": slice(0, 32), "attention.self.value": slice(64, 96)}.get(part, slice(None))

    def wrong(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) - 1 == place:
            weight = weight.clone()
            assert weight.shape[0] == {"self": 3 * h, "intermediate": 56}.get(
                part.split(".")[-2 if "self" in part else 0], h
            )
            weight[rows] = off_by(1e-2, weight[rows])
        return right(x, weight, *args, **kwargs)

    monkeypatch.setattr(ops, right.__name__, wrong)
    report = verify(model, IDS)
    assert report.problems and report.problems[0].startswith("encoder.layer.1 is the first wrong output: error ")


def test_a_stale_fused_copy_one_percent_off(model: BertModel) -> None:
    """Catches a fused copy that is 1e-2 from its parameter, in bf16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        part = model.to(dtype).eval().encoder.layer[1].attention.self
        with torch.no_grad():
            model(torch.tensor([[5, 6]], device=model.device))
        assert verify(model, IDS).ok
        value = part.derived.tensors()[0][2 * part.value.weight.shape[1] :]
        with torch.no_grad():
            value.copy_(off_by(1e-2 if dtype == torch.float32 else 5e-2, value))
        assert verify(model, IDS).problems[0].startswith("encoder.layer.1 is the first wrong output")
        model.train()  # drops the copy


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
def test_fault_of_what_runs_where_nobody_asks_for_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model verified operation by operation alone, where users get the encoder that runs in one call."""
    model = BertModel(
        BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=40,
        )
    ).eval()  # fmt: skip
    assert verify(model).ok
    right = cpu.encoder_forward
    monkeypatch.setattr(cpu, "encoder_forward", lambda *args: right(*args).mul_(1.01))
    report = verify(model)
    assert not report.ok and all(state.ok for state in report.states)
    assert "the last hidden state, as it runs by itself" in report.problems[0]
