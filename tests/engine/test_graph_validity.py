"""Changed weights end a CUDA graph, and what no graph may hold takes the plain path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastbert.ops import Policy
from graph_cases import (
    CHANGES,
    UNSUITABLE,
    StandIn,
    add_adapter,
    add_hook,
    encode,
    make,
    packed,
    patch_forward,
    scale_query,
    without_graphs,
)
from helpers import rms_error

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that goes on with the old weights, or one that is kept although it reads old memory."""
    model = make(device)
    before = encode(model, [9, 4])
    change(model)
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)
    assert stand_in.captures == 2 and len(model.engine.graphs) == 1
    assert torch.equal(encode(model, [9, 4]), after) and stand_in.captures == 2


def test_writes_that_nobody_counts(stand_in: StandIn, device: torch.device) -> None:
    """Catches a fused matrix that does not follow eval() after a write through .data, or a new capture for it."""
    model = make(device)
    encode(model, [9, 4])
    for name in ("query", "key", "value"):
        getattr(model.encoder.layer[1].attention.self, name).weight.data.mul_(2.0)
    model.eval()
    assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4])) and stand_in.captures == 1


def test_eval_alone_ends_no_graph(stand_in: StandIn, device: torch.device) -> None:
    """Catches a server that calls eval() before each batch, and captures each time."""
    model = make(device)
    for _ in range(3):
        encode(model.eval(), [9, 4])
    assert stand_in.captures == 1


def test_mode_dtype_and_policy(stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that outlives train(), another dtype or another policy, or that keeps memory in training."""
    model = make(device)
    for change in (
        lambda: model.train().eval(),
        lambda: model.to(torch.bfloat16),
        lambda: setattr(model, "policy", Policy("triton")),
    ):
        encode(model, [9, 4])
        captures = stand_in.captures
        change()
        out = encode(model, [9, 4])
        assert stand_in.captures == captures + 1 and torch.equal(out, without_graphs(model, [9, 4]))
    assert len(model.engine.graphs) == 1
    model.train()
    assert len(model.engine.graphs) == 0


def test_inference_tensors(stand_in: StandIn, device: torch.device) -> None:
    """Catches weights without a count of writes: an error, or a fused matrix of old numbers."""
    with torch.inference_mode():
        model = make(device)
        first = encode(model, [9, 4])
        assert torch.equal(encode(model, [9, 4]), first) and stand_in.captures == 1
        scale_query(model)
        assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4]))


@pytest.mark.parametrize("change", UNSUITABLE, ids=lambda change: change.__name__)
def test_what_no_graph_may_hold(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph of a model whose own code a replay would leave out."""
    model = make(device)
    before = encode(model, [9, 4])
    change(model)
    after = encode(model, [9, 4])
    assert stand_in.captures == 1 and stand_in.replays <= 2  # the second was launched before anyone looked, in vain
    changed = change in (add_adapter, add_hook, patch_forward)
    assert (rms_error(after, before) > 0.01) == changed
    with torch.no_grad():
        assert list(model.engine.bucket_obstacles(model))


def test_contexts_that_take_the_plain_path(stand_in: StandIn, device: torch.device) -> None:
    """Catches gradients, autocast, embeddings or a count of FLOPs that a replay would lose."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make(device, dtype=torch.float32)
    model.policy = Policy("triton")
    ids, cu_seqlens = packed([9, 4], device)
    assert model.forward_packed(ids, cu_seqlens).requires_grad
    with torch.no_grad():
        with torch.autocast(device.type, torch.bfloat16):
            model.forward_packed(ids, cu_seqlens)
        with FlopCounterMode(display=False) as flops:
            model.forward_packed(ids, cu_seqlens)
        model(inputs_embeds=torch.randn(1, 9, 32, device=device))
        assert flops.get_total_flops() > 0 and stand_in.captures == 0
        model.forward_packed(ids, cu_seqlens)
    assert stand_in.captures == 1


def test_float32_precision(stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph captured in TF32 that is replayed where IEEE float32 is asked for."""
    model = make(device)
    encode(model, [9, 4])
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    try:
        encode(model, [9, 4])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert stand_in.captures == 2
    encode(model, [9, 4])
    assert stand_in.captures == 2


def test_no_padding_where_there_are_no_graphs() -> None:
    """Catches rows of a bucket in plain PyTorch, where they would only cost."""
    model = make(torch.device("cpu"))
    model.policy = Policy("torch")
    rows: list[int] = []
    run_modules = model.engine.modules.run
    model.engine.modules.run = lambda model, batch, inputs, keep_states: (
        rows.append(len(inputs.input_ids)) or run_modules(model, batch, inputs, keep_states)
    )
    encode(model, [9, 4])
    assert rows == [13]


def test_copies_capture_for_themselves(stand_in: StandIn, device: torch.device) -> None:
    """Catches a copy that shares static memory with its model, or that cannot be pickled for its locks."""
    model = make(device)
    expected = encode(model, [9, 4])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.engine.graphs is not model.engine.graphs and len(other.engine.graphs) == 0
        assert torch.equal(encode(other, [9, 4]), expected)
    model.cuda_graphs = False
    assert copy.deepcopy(model).cuda_graphs is False and len(model.engine.graphs) == 0
