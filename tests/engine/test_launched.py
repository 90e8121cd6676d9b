"""Layers whose kernels are launched without a call of their modules compute the same, where nobody would see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import BertModel, ops
from fastbert.engine.launched import LaunchedLayers
from fastbert.engine.layer_forms import OUTPUT
from fastbert.ops import launched, packing, recording
from graph_cases import encode
from graph_cases import make as make_model

LENGTHS = [3, 20, 1, 33]


def make(device: torch.device, dtype: torch.dtype = torch.float32, **sizes: Any) -> BertModel:
    """A model that captures no graphs, in which other calls would count."""
    model: BertModel = make_model(device, dtype, **sizes)
    model.cuda_graphs = False
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the layers' kernels were launched without their modules, call by call."""
    taken: list[bool] = []
    run = LaunchedLayers.run

    def noted(*arguments: Any) -> list[Tensor] | None:
        states = run(*arguments)
        taken.append(states is not None)
        return states

    monkeypatch.setattr(LaunchedLayers, "run", noted)
    return taken


def by_modules(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The hidden states as the modules compute them."""
    with monkeypatch.context() as patch:
        patch.setattr(LaunchedLayers, "run", lambda *arguments: None)
        return encode(model, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_same_bits(
    dtype: torch.dtype,
    invariant: bool,
    act: str,
    device: torch.device,
    runs: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches another kernel, order of sums or place of a bias than the operations have."""
    model = make(device, dtype, hidden_act=act)
    model.policy = ops.Policy("triton", strict=True, batch_invariant=invariant)
    states = encode(model, LENGTHS)
    assert runs == [True]
    assert torch.equal(states, by_modules(model, monkeypatch))


def _in_place(model: BertModel) -> None:
    model.encoder.layer[1].output.dense.weight.data.copy_(model.encoder.layer[1].output.dense.weight * 1.5)
    model.eval()  # which is what the documentation asks for


def _counted(model: BertModel) -> None:
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key.weight.mul_(1.5)


def _other_data(model: BertModel) -> None:
    bias = model.encoder.layer[0].attention.self.value.bias
    bias.data = torch.full_like(bias, 2.0)


def _other_module(model: BertModel) -> None:
    model.encoder.layer[1].intermediate.dense = torch.nn.Linear(32, 64).to(model.device).eval()


def _eps(model: BertModel) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _optimizer(model: BertModel) -> None:
    parameter = model.encoder.layer[1].attention.self.query.weight
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], 0.3).step()


CHANGES = _in_place, _counted, _other_data, _other_module, _eps, _optimizer


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_followed(
    change: Callable[[BertModel], None], device: torch.device, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches layers that are kept though a weight, a module or the mode has changed since."""
    model = make(device)
    before = encode(model, LENGTHS)
    change(model)
    after = encode(model, LENGTHS)
    assert runs == [True, True] and not torch.equal(before, after)
    assert torch.equal(after, by_modules(model, monkeypatch))


def _hooked(model: BertModel) -> None:
    model.encoder.layer[0].output.register_forward_hook(lambda module, inputs, output: 2 * output)


def _patched(model: BertModel) -> None:
    dense = model.encoder.layer[0].intermediate.dense
    dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight)


def _without_bias(model: BertModel) -> None:
    model.encoder.layer[0].intermediate.dense.bias = None


def _one_dtype_less(model: BertModel) -> None:
    model.encoder.layer[0].output.LayerNorm.double()


@pytest.mark.parametrize("change", [_hooked, _patched, _without_bias], ids=lambda change: change.__name__)
def test_modules_are_called(change: Callable[[BertModel], None], device: torch.device, runs: list[bool]) -> None:
    """Catches a hook, a patch or a missing bias that is passed by."""
    model = make(device)
    before = encode(model, LENGTHS)
    change(model)
    assert not torch.equal(encode(model, LENGTHS), before)
    assert runs == [True, False]


def test_watched_operations(device: torch.device, runs: list[bool]) -> None:
    """Catches operations that a recorder, a mode, autograd or a caller of attention weights does not see."""
    model = make(device)
    with recording.recorded() as recorder:
        encode(model, LENGTHS)
    assert runs == [False] and len([r for r in recorder.records if r.op == "attention"]) == 2
    ids = torch.ones(1, 4, dtype=torch.int64, device=device)
    model(ids).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    flexible = make(device)
    flexible.policy = ops.Policy("triton")
    with torch.no_grad():
        assert len(flexible(ids, output_attentions=True).attentions) == 2
    assert not any(runs)


def test_wrong_dtype_raises_as_before(device: torch.device) -> None:
    """Catches kernels that read a weight of another dtype, where the operations say what is wrong."""
    model = make(device)
    _one_dtype_less(model)
    with pytest.raises((ops.BackendError, TypeError, RuntimeError)):
        encode(model, LENGTHS)


def test_hidden_states(device: torch.device, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches states in between that are missing or in another order."""
    model = make(device)
    ids = torch.randint(1, 101, (2, 9), device=device)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        monkeypatch.setattr(LaunchedLayers, "run", lambda *arguments: None)
        expected = model(ids, output_hidden_states=True).hidden_states
    assert runs == [True] and len(states) == 3
    assert all(map(torch.equal, states, expected))


def test_training_lets_the_weights_go(device: torch.device, runs: list[bool]) -> None:
    """Catches a fused matrix that is held through training, a quarter of a layer's weights."""
    model = make(device)
    encode(model, LENGTHS)
    launched = model.engine.modules.launched
    assert launched._kept[1] is not None
    model.train()
    assert launched._kept == (None, None)


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "modules"])
def test_a_graph_needs_no_copy_of_its_result(
    by_kernels: bool, device: torch.device, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a last LayerNorm that does not write where a graph leaves its result, or other bits where it does."""
    model = make_model(device, torch.bfloat16)
    if not by_kernels:
        monkeypatch.setattr(LaunchedLayers, "run", lambda *arguments: None)
    outputs: list[Any] = []
    layer_norm = launched.bias_residual_layer_norm

    def noted(*arguments: Any, out: Tensor | None = None) -> Tensor:
        outputs.append(out)
        return layer_norm(*arguments, out=out)

    monkeypatch.setattr(launched, "bias_residual_layer_norm", noted)
    result = encode(model, LENGTHS)
    (graph,) = model.engine.graphs._graphs.values()
    # Two norms a layer, in what runs when it is captured and when it is replayed.
    assert [out is graph.out for out in outputs] == 2 * by_kernels * [False, False, False, True]
    model.cuda_graphs = False
    assert torch.equal(encode(model, LENGTHS), result)
    assert not outputs or outputs[-1] is None


def test_layers_are_not_derived_in_a_capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are derived while a CUDA graph is captured, and kept though nothing has run yet."""
    model, layers = make(device), LaunchedLayers()
    encode(model, LENGTHS)
    batch = packing.from_lengths(LENGTHS, device)
    out = batch.plan(OUTPUT, lambda: torch.empty(sum(LENGTHS), 32, device=device))
    x = torch.randn(sum(LENGTHS), 32, device=device)

    def run_in_a_capture() -> list[Tensor] | None:
        with monkeypatch.context() as patch:
            for name in ("launched", "state"):
                patch.setattr(f"fastbert.engine.{name}.observer_obstacle", lambda device: "a graph is captured")
            return layers.run(model, x, batch, False)

    with torch.no_grad():
        assert run_in_a_capture() is None
        states = layers.run(model, x, batch, False)
        assert states is not None and states[0] is out
        states = run_in_a_capture()
        assert states is not None and states[0] is out
