"""CUDA graphs hold models with 8-bit weights; a stand-in captures where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastbert
from fastbert.diagnostics.explain.entry import explain
from fastbert.engine import buckets
from fastbert.ops import Policy
from fastbert.ops import quantized as ops_quantized
from graph_cases import (
    CHANGES,
    UNSUITABLE,
    StandIn,
    cheap,
    encode,
    make,
    random_lengths,
    real,
    take_a_bias,
    without_graphs,
)
from helpers import UNUSED_INT8

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

PRECISIONS = ("fp8", "int8")
LENGTHS = ([3, 7, 1], [31], [0, 5, 0], [33], [70, 2])


def make_8_bit(device: torch.device, precision: str = "int8", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = make(device, dtype, **{"num_hidden_layers": 1, **sizes})
    model.precision = precision
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("precision", "dtype", "arch"),
    [
        ("fp8", torch.float32, 80),
        ("int8", torch.float32, 80),
        ("int8", torch.bfloat16, 80),
        ("fp8", torch.bfloat16, 90),
    ],
    ids=str,
)
def test_same_bits_with_graphs_and_without(
    precision: str,
    dtype: torch.dtype,
    arch: int,
    stand_in: StandIn,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches static inputs that differ from the plain path's, or unwritten memory that reaches a text."""
    from fastbert_kernels import launch

    if device.type == "cpu":  # 90: linears on tensor descriptors
        monkeypatch.setattr(launch, "arch", lambda device: arch)
    model = make_8_bit(device, precision, dtype)
    expected = [without_graphs(model, lengths) for lengths in LENGTHS]

    def empty(shape: tuple[int, ...], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or like.dtype
        return torch.full(shape, UNUSED_INT8 if dtype == torch.int8 else float("nan"), device=like.device, dtype=dtype)

    monkeypatch.setattr(launch, "empty", empty)
    for lengths, right in zip(LENGTHS, expected, strict=True):
        assert torch.equal(encode(model, lengths), right), lengths
    assert stand_in.replays == len(LENGTHS) and stand_in.captures == len(model.engine.graphs)
    model.precision = None
    assert not torch.equal(encode(model, LENGTHS[-1]), expected[-1]), "nothing was quantised"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that goes on with old 8-bit weights, or one that is kept although it reads old memory."""
    model = make_8_bit(device, num_hidden_layers=2)
    before = encode(model, [9, 4])
    if change is take_a_bias:
        model.policy = Policy("triton")  # which then takes the unquantised path
    change(model)
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)
    assert stand_in.captures == 2 and len(model.engine.graphs) == 1
    assert torch.equal(encode(model, [9, 4]), after) and stand_in.captures == 2


def test_writes_that_nobody_counts(stand_in: StandIn, device: torch.device) -> None:
    """Catches a write through .data that the 8-bit weights of a graph do not follow, or a new capture."""
    model = make_8_bit(device)
    before = encode(model, [9, 4])
    at = [t.data_ptr() for t in model.engine.eight_bit.weights.tensors()]
    assert len(at) == 4 * 3
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
        model.encoder.layer[0].get_submodule(name).weight.data.mul_(2.0)
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)
    assert stand_in.captures == 1 and at == [t.data_ptr() for t in model.engine.eight_bit.weights.tensors()]
    for _ in range(3):
        encode(model.eval(), [9, 4])
    assert stand_in.captures == 1, "a server that calls eval() before each batch captures each time"


def test_weights_made_elsewhere(stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that reads 8-bit weights which somebody has dropped since, or made anew for another precision."""
    model = make_8_bit(device)
    first = encode(model, [9, 4])

    def make_others() -> None:
        model.precision = "fp8"
        with torch.no_grad():
            model.engine.eight_bit.addresses(model)
        model.precision = "int8"

    for change in (model.engine.eight_bit.weights.clear, make_others):
        change()
        in_the_way = torch.empty(100_000)  # or the new ones might be put where the old ones were
        assert torch.equal(encode(model, [9, 4]), first) and in_the_way is not None
        _, addresses = model.engine.graph_key(model)
        assert [at for each in addresses for at in each] == [
            t.data_ptr() for t in model.engine.eight_bit.weights.tensors()
        ]


@pytest.mark.parametrize("other", [None, "fp8"])
def test_another_precision(other: str | None, stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph of one precision that is replayed for another."""
    model = make_8_bit(device)
    before = encode(model, [9, 4])
    model.precision = other
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)


@pytest.mark.parametrize("change", UNSUITABLE, ids=lambda change: change.__name__)
def test_what_no_graph_may_hold(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph of a model whose own code a replay would leave out."""
    model = make_8_bit(device)
    model.encoder.layer.append(make(device).encoder.layer[1].requires_grad_(False))
    model.policy = Policy("triton")
    encode(model, [9, 4])
    change(model)
    encode(model, [9, 4])
    assert stand_in.captures == 1 and stand_in.replays <= 2  # the second was launched before anyone looked, in vain


def test_inference_tensors(stand_in: StandIn, device: torch.device) -> None:
    """Catches weights without a count of writes: an error, or 8-bit weights of old numbers."""
    with torch.inference_mode():
        model = make_8_bit(device)
        first = encode(model, [9, 4])
        assert torch.equal(encode(model, [9, 4]), first) and stand_in.captures == 1
        assert model.engine.eight_bit.weights.tensors() == []
        model.encoder.layer[0].output.dense.weight.mul_(2.0)
        assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4]))


def test_where_there_are_no_8_bit_kernels(
    stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a graph of the unquantised path that does not follow the fused matrix it reads, or a strict one."""
    monkeypatch.setattr(ops_quantized, "device_obstacle", lambda *args: "too old a GPU")
    model = make_8_bit(device)
    with pytest.raises(fastbert.BackendError, match="too old a GPU"):
        encode(model, [9, 4])
    model.policy = Policy("triton")
    before = encode(model, [9, 4])
    assert (
        model.engine.eight_bit.weights.tensors() == []
        and len(model.encoder.layer[0].attention.self.derived.tensors()) == 2
    )
    model.encoder.layer[0].attention.self.query.weight.data.mul_(2.0)
    model.eval()
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)
    assert stand_in.captures == 1


def test_no_16_bit_copy(stand_in: StandIn, device: torch.device) -> None:
    """Catches memory for a fused 16-bit matrix that nobody reads."""
    model = make_8_bit(device)
    for _ in range(2):
        encode(model.eval(), [9, 4])
    assert model.encoder.layer[0].attention.self.derived.tensors() == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_warmup_nothing_happens(precision: str, stand_in: StandIn, device: torch.device) -> None:
    """Catches a capture in any of 300 batches of random lengths after a warm-up."""
    model = make_8_bit(device, precision)
    cheap(model)
    report = fastbert.warmup(model, max_tokens=1000)
    assert report.buckets == tuple(b for b in buckets.BUCKETS if b <= 1024) and not report.notes
    before, replays = fastbert.compile_events(), stand_in.replays
    for seed in range(300):
        encode(model, random_lengths(seed, 1100), seed)
    assert (fastbert.compile_events() - before).total == 0 and stand_in.replays - replays > 200


def test_explain(stand_in: StandIn, device: torch.device) -> None:
    """Catches a report of launches one by one where a replay is one."""
    model = make_8_bit(device, num_hidden_layers=2)
    assert "launches: 7 kernels a layer, 15 from ids to last hidden state" in str(explain(model))
    report = explain(model, arch=90, dtype="bfloat16")
    assert "CUDA graphs: a batch of up to 16384 tokens is one launch" in str(report)
    model.train()
    assert "CUDA graphs: none: the model is in training mode" in str(explain(model, arch=90))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpu_same_bits(precision: str) -> None:
    """Catches a capture that records other kernels than those of the plain path, or weights that move under it."""
    device = torch.device("cuda")
    if ops_quantized.device_obstacle(precision, device) is not None:
        pytest.skip("this GPU cannot multiply in this precision")
    model = real(device)
    model.precision = precision
    model.requires_grad_(False)
    for seed in range(30):
        lengths = random_lengths(seed, 3000)
        assert torch.equal(encode(model, lengths, seed), without_graphs(model, lengths, seed)), lengths
    for _ in range(2):
        model.encoder.layer[0].output.dense.weight.data.mul_(2.0)
        captures = fastbert.compile_events().captures
        assert torch.equal(encode(model.eval(), [90, 4]), without_graphs(model, [90, 4]))
        assert fastbert.compile_events().captures == captures
