"""Whether a graph still fits its model is told by a record of objects, and by Python where that says no."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from device_stand_in import EmptyGraphs
from fastbert.engine import capture, graph_key
from fastbert.engine.snapshot import ModuleSnapshot
from fastbert.engine.state import read_switches, roots_of, switches
from fastbert_kernels import cpu
from graph_cases import StandIn, cheap, encode, make, without_graphs

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
    pytest.mark.skipif(cpu.objects.obstacle() is not None, reason=f"no records: {cpu.objects.obstacle()}"),
]


def dense(model: Any) -> Any:
    return model.encoder.layer[1].intermediate.dense


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        dense(model).weight.add_(1.0)


def replace_data(model: Any) -> None:
    dense(model).weight.data = dense(model).weight.data.clone()


def swap(model: Any) -> None:
    torch.utils.swap_tensors(dense(model).weight, nn.Parameter(dense(model).weight.detach().clone()))


def replace_parameter(model: Any) -> None:
    dense(model).bias = nn.Parameter(dense(model).bias.detach().clone())


def lose_parameter(model: Any) -> None:
    dense(model).bias = None


def become_inference_tensor(model: Any) -> None:
    with torch.inference_mode():
        dense(model).weight = nn.Parameter(dense(model).weight.clone())


def add_child(model: Any) -> None:
    model.encoder.layer[0].add_module("more", nn.Identity())


def replace_layer(model: Any) -> None:
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[0])


def replace_encoder(model: Any) -> None:
    model.encoder = copy.deepcopy(model.encoder)


def change_class(model: Any) -> None:
    dense(model).__class__ = type("Other", (nn.Linear,), {})


def change_eps(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm.eps *= 2


def patch(model: Any) -> None:
    dense(model).forward = lambda x: x


def train_a_part(model: Any) -> None:
    dense(model).train()


def hook_before(model: Any) -> None:
    dense(model).register_forward_pre_hook(lambda module, args: None)


def hook_after(model: Any) -> None:
    dense(model).register_forward_hook(lambda module, args, output: None)


def hook_backward(model: Any) -> None:
    dense(model).register_full_backward_hook(lambda module, before, after: None)


def hook_before_backward(model: Any) -> None:
    dense(model).register_full_backward_pre_hook(lambda module, gradient: None)


def ask_for_derived(model: Any) -> None:
    model.encoder.layer[0].attention.self.derived.invalidate()


def ask_for_eight_bit(model: Any) -> None:
    model.engine.eight_bit.weights.invalidate()


def other_policy(model: Any) -> None:
    model.policy = fastbert.ops.Policy("triton")


def other_precision(model: Any) -> None:
    model.precision = "int8"


def other_dtype(model: Any) -> None:
    words = model.embeddings.word_embeddings.weight
    words.data = words.data.view(torch.int32).view(torch.float32).to(torch.float64)


def be_a_replica(model: Any) -> None:
    model._is_replica = True


ENDS = [
    write_in_place, replace_data, swap, replace_parameter, lose_parameter, become_inference_tensor, add_child,
    replace_layer, replace_encoder, change_class, change_eps, patch, train_a_part, hook_before, hook_after,
    hook_backward, hook_before_backward, ask_for_derived, ask_for_eight_bit, other_policy, other_precision, other_dtype,
    be_a_replica,
]  # fmt: skip


def leaf_with_a_child(model: Any) -> None:
    """Adds a module that a leaf never calls."""
    dense(model).add_module("more", nn.Identity())


def same_memory(model: Any) -> None:
    dense(model).bias = nn.Parameter(dense(model).bias.detach())


def hook_and_back(model: Any) -> None:
    dense(model).register_forward_hook(lambda module, args, output: None).remove()


def equal_eps(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = float(repr(model.encoder.layer[0].output.LayerNorm.eps))


def eval_again(model: Any) -> None:
    for module in model.encoder.modules():
        module.training = False


def equal_policy(model: Any) -> None:
    model.policy = copy.copy(model.policy)


def gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


STAYS = [leaf_with_a_child, same_memory, hook_and_back, equal_eps, eval_again, equal_policy, gradients]


@pytest.fixture(params=["record", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to tell: the record, or Python alone."""
    if request.param == "python":
        monkeypatch.setattr(ModuleSnapshot, "record", lambda self, entries=(): None)
    return str(request.param)


def seen_by(model: Any) -> tuple[Callable[[Any], Any], Any]:
    """Returns what asks whether the graphs of a model still fit, given what it last returned, and its first answer."""
    cheap(model)
    encode(model, [9, 4])
    graphs = model.engine.graphs
    shape, state = graphs.shape, graphs._state

    def ask(seen: Any) -> Any:
        return model.engine._graph_key.unchanged(model, shape, state, seen)

    return ask, ask(None)


@pytest.mark.parametrize("change", [*ENDS, *STAYS], ids=lambda change: change.__name__)
def test_both_ways_agree(change: Callable[[Any], None], way: str, stand_in: StandIn) -> None:
    """Catches a change that only one of the two ways notices, and a record that says no where nothing was changed."""
    model = make(torch.device("cpu"))
    ask, seen = seen_by(model)
    assert seen is not None and (seen.objects is not None) == (way == "record")
    if way == "record":
        assert seen.objects.holds() and ask(seen) is seen  # without a comparison
    change(model)
    after = ask(seen)
    assert (after is None) == (change in ENDS)
    if change in STAYS:
        assert ask(after) is after
        assert way == "python" or after.objects.holds()  # made anew, where it said no


def test_results_follow_changes(way: str, stand_in: StandIn) -> None:
    """Catches a result of what a model was, after several batches that a record has let pass."""
    model = make(torch.device("cpu"))
    for change in (write_in_place, replace_encoder, other_policy):
        for _ in range(2):
            before = encode(model, [9, 4])
        change(model)
        if change is replace_encoder:
            dense(model).bias.data.add_(1.0)
        after = encode(model, [9, 4])
        assert torch.equal(after, without_graphs(model, [9, 4]))
        assert torch.equal(after, before) == (change is other_policy)


def test_inference_tensors_have_no_record(stand_in: StandIn) -> None:
    """Catches an error for parameters without a count of writes, or a record tried anew at each batch."""
    with torch.inference_mode():
        model = make(torch.device("cpu"))
        ask, seen = seen_by(model)
        assert seen.objects is None and ask(seen) is seen


def test_a_script_module_has_no_record() -> None:
    """Catches an error for a module whose children are in no dictionary."""
    model = make(torch.device("cpu"))
    model.encoder.layer[0].intermediate.dense = torch.jit.script(nn.Linear(32, 64).eval())
    assert ModuleSnapshot(roots_of(model), model.own_modules).record() is None


def test_few_records(stand_in: StandIn) -> None:
    """Catches a record made at each batch for a model whose record says no each time."""
    model = make(torch.device("cpu"))
    ask, seen = seen_by(model)
    for _ in range(2 * graph_key.MAX_RECORDS):
        equal_eps(model)
        seen = ask(seen)
    assert seen.n_made == graph_key.MAX_RECORDS


def test_graphs_let_a_record_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that stay in memory with the record that names them, or with a model that is gone."""
    graphs = EmptyGraphs()
    monkeypatch.setattr(capture, "capturer", lambda device: graphs)
    model = make(torch.device("cpu"))
    seen_by(model)
    encode(model, [9, 4])
    assert model.engine.graphs._seen.objects is not None
    weight = weakref.ref(dense(model).weight)
    dense(model).weight = nn.Parameter(dense(model).weight.detach().clone())
    model.engine.graphs.clear()
    assert weight() is None
    for _ in range(3):
        encode(model, [9, 4])
    assert model.engine.graphs._seen.objects is not None
    weight = weakref.ref(dense(model).weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_switches_are_pytorchs() -> None:
    """Catches a switch that is read past PyTorch's properties and says something else than they do."""
    matmul, seen = torch.backends.cuda.matmul, set()
    for name in ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        before = getattr(matmul, name)
        try:
            for value in (not before, before):
                setattr(matmul, name, value)
                now = tuple(each[0] if isinstance(each, tuple) else each for each in switches())
                assert now == read_switches()
                seen.add(now)
        finally:
            setattr(matmul, name, before)
    assert len(seen) == 4
