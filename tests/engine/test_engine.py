"""The engine says every reason why an arithmetic or a graph does not run, and models describe layers as Blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbert import BackendError, BertConfig, BertForMaskedLM, BertModel
from fastbert.engine import Block, Options, eight_bit_layers, training
from fastbert.engine.block import FEATURES, feature_obstacles
from fastbert.ops import Policy
from fastbert_kernels import cpu
from helpers import cu_seqlens_of

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
VALUES: dict[str, Any] = {
    "pre_norm": True, "rotary": 1e4, "position_bias": torch.zeros(2, 9), "window": 128, "scale": 0.1,
    "distances": object(), "convolution": SimpleNamespace(activation="gelu"),  # of which nobody reads more here
}  # fmt: skip
COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))


def make(kind: Any = BertModel, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES), **settings).eval()


def with_feature(block: Block, name: str) -> Block:
    of_layer = {"gate": block.up, "query_norm": block.output_norm, "second_norm": block.output_norm}
    return replace(block, **{name: of_layer[name] if name in of_layer else VALUES[name]})


def encode(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 13)
    with torch.no_grad():
        return model.forward_packed(ids, cu_seqlens_of([5, 7]))


# Blocks


def test_a_block_is_the_layer() -> None:
    """Catches a description of a layer that names other weights, or other sizes, than the layer has."""
    model = make()
    layer, block = model.encoder.layer[1], list(model.blocks())[1]
    assert block.query.weight is layer.attention.self.query.weight and block.down.bias is layer.output.dense.bias
    assert (block.hidden_size, block.intermediate_size, block.head_size, block.activation) == (64, 96, 32, "gelu")
    assert torch.equal(block.fuse_qkv().weight[:64], layer.attention.self.query.weight)
    assert block.features() == [] and list(block.products()) == ["qkv", "out", "up", "down"]
    assert block.attention_norm.eps == layer.attention.output.LayerNorm.eps


def test_a_block_has_room_for_other_families() -> None:
    """Catches a feature of other families that a Block cannot hold, or that it holds and does not name."""
    block = next(make().blocks())
    for name in FEATURES:
        assert with_feature(block, name).features() == [name]
    gated = with_feature(block, "gate")
    assert gated.products()["up"] == (block.up, block.up)
    mapped = gated.mapped(torch.Tensor.double)
    assert mapped.gate is not None and mapped.gate.weight.dtype == mapped.fuse_qkv().weight.dtype == torch.float64


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_an_engine_lacks_is_named(name: str, precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers of another family that an engine runs as if they were BERT's."""
    model = make(precision=precision, backend="triton" if precision else "auto")
    plain = BertModel.blocks

    def blocks(self: BertModel) -> Iterator[Block]:
        for block in plain(self):
            yield with_feature(block, name)

    monkeypatch.setattr(BertModel, "blocks", blocks)
    obstacles = model.engine.arithmetic_obstacles(model, 12)
    engine = "the 8-bit encoder" if precision else "the arithmetic with gradients"
    reason = f"the model has {FEATURES[name]}, which {engine} does not support"
    arithmetic, supported = model.engine.training, training.FEATURES
    if precision:
        arithmetic, supported = model.engine.eight_bit, eight_bit_layers.FEATURES
    assert (reason in "; ".join(obstacles[arithmetic.name])) == (name not in supported)
    assert obstacles[model.engine.modules.name] == []
    assert list(feature_obstacles([name], frozenset({name}), engine)) == []


# Choices


@COMPILED
def test_every_reason_is_said() -> None:
    """Catches a report of the first obstacle alone, after whose removal the next one shows up."""
    model = make()
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reasons = list(model.engine.one_call.obstacles(model, 2, True, True))
    for part in ("hidden states", "are embeddings", "2 tokens", "gradients are on", "autocast is on", "has hooks"):
        assert any(part in reason for reason in reasons), (part, reasons)


@COMPILED
def test_the_choice_is_the_first_without_an_obstacle() -> None:
    """Catches a choice that the reasons do not explain, in either direction."""
    for settings in ({}, {"backend": "torch"}, {"precision": "int8"}, {"precision": "int8", "backend": "torch"}):
        model = make(**settings)
        with torch.no_grad():
            obstacles = model.engine.arithmetic_obstacles(model, 12)
            chosen = model.engine.choose_arithmetic(model, 12)
        assert chosen.name == next(name for name, reasons in obstacles.items() if not reasons), settings


def test_strict_errors_say_every_reason() -> None:
    """Catches a strict error that names one obstacle of several."""
    model = make(precision="fp8", strict=True)
    model.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(BackendError) as caught:
        encode(model)
    assert "autocast is on" in str(caught.value) and "encoder.layer.1" in str(caught.value)


@COMPILED
def test_prepare_derives_ahead() -> None:
    """Catches a warm-up that leaves the weights of the one call to the first batch."""
    model = make()
    with torch.no_grad():
        captured, obstacles = model.engine.prepare(model, 64)
    assert captured == () and "no CUDA graphs on cpu" in obstacles[0]
    kept = model.engine.cpu_encoder._kept[1]
    encode(model)
    assert kept is not None and model.engine.cpu_encoder._kept[1] is kept


# Options


def test_options_are_one() -> None:
    """Catches an option that a model takes under another name, drops, or reports otherwise than it runs."""
    options = Options(backend="cpu", strict=True, cuda_graphs=False)
    for model in (make(options=options), make(backend="cpu", strict=True, cuda_graphs=False)):
        assert model.options == options and model.policy == Policy("cpu", True) == options.policy
    head = make(BertForMaskedLM, options=options, precision="int8")
    assert head.options == head.bert.options == replace(options, precision="int8")
    with pytest.raises(TypeError, match="fast: not an option; expected one of backend, strict, batch_invariant"):
        make(fast=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tpu"}, "backend: expected one of"),
        ({"precision": "int4"}, "precision"),
        ({"batch_invariant": True, "backend": "torch"}, "batch_invariant"),
        ({"batch_invariant": True, "precision": "fp8"}, "not supported together with precision='fp8'"),
        ({"batch_invariant": True, "precision": "int8", "backend": "triton"}, "not supported together"),
    ],
)
def test_options_that_nothing_supports(settings: dict[str, Any], message: str) -> None:
    """Catches a pair of options that is found out only when a batch runs."""
    with pytest.raises(ValueError, match=message):
        Options(**settings)
    with pytest.raises(ValueError, match=message):
        make(**settings)
