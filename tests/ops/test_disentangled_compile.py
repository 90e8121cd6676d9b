"""Disentangled attention under torch.compile is one operation, with gradients and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distance_cases import BUCKETS, HEADS, TERMS, make
from fastbert import BertConfig, DebertaModel, ops
from fastbert.ops import Policy, packing
from fastbert.ops.disentangled import Positions
from fastbert.ops.disentangled_gradients import gradients_by_lengths
from fastbert.ops.distances import attend_by_lengths
from gradient_cases import dropout
from helpers import cu_seqlens_of, rms_error

CPU = torch.device("cpu")
FP32, FP64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    torch._dynamo.reset()


def leaves_of(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def grads_of(out: Tensor, tensors: list[Any], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [t for t in tensors if t is not None], weights))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("holes", "drops"), [(False, False), (True, True)])
def test_formulas(terms: Any, holes: bool, drops: bool) -> None:
    """Catches a term of the gradients that is left out, scaled twice, or added up in another row of distances."""
    batch, qkv, positions, scale = make("short", holes, CPU, FP64, terms)
    tensors = leaves_of(qkv, positions.keys, positions.queries)
    drop = dropout() if drops else None
    rest = batch.cu_seqlens_cpu, *BUCKETS, HEADS, scale, batch.columns, drop
    out = attend_by_lengths(*tensors, *rest)
    weights = torch.randn_like(out)
    expected = iter(grads_of(out, tensors, weights))
    ours = gradients_by_lengths(weights, *tensors, *rest)
    for tensor, gradient in zip(tensors, ours, strict=True):
        if tensor is None:
            assert gradient.shape == ()
        else:
            assert rms_error(gradient, next(expected)) < 1e-9


def attend(qkv: Tensor, keys: Any, queries: Any, batch: Any, scale: float, drop: Any) -> Tensor:
    positions = Positions(keys, queries, BUCKETS)
    return ops.disentangled_attention(qkv, positions, batch, HEADS, scale=scale, dropout=drop, policy=Policy("cpu"))


def test_compiled_with_gradients() -> None:
    """Catches a graph break, other numbers than without the compiler, or lengths that a program keeps."""
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for holes in (False, True):
        batch, qkv, positions, scale = make("short", holes, CPU, FP32, TERMS[0])
        results = []
        for run in (attend, compiled):
            tensors = leaves_of(qkv, positions.keys, positions.queries)
            out = run(*tensors, batch, scale, None)
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
            results.append([out.detach(), *grads_of(out, tensors, weights)])
        for theirs, ours in zip(*results, strict=True):
            assert rms_error(ours, theirs) < 1e-5


def test_compiled_with_dropout() -> None:
    """Catches a mask that is the same at each call, or another one in the backward pass than in the forward pass."""
    batch, qkv, positions, scale = make("short", False, CPU, FP64, TERMS[0])
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tensors = leaves_of(qkv, positions.keys, positions.queries)
        out = compiled(*tensors, batch, scale, 0.3)
        weights = torch.randn(out.shape, dtype=FP64, generator=torch.Generator().manual_seed(3))
        d_v = grads_of(out, tensors, weights)[0].chunk(3, 1)[2]
        # The result is linear in v, so that <d_v, v> = <out, weights>, if both passes have one mask.
        assert torch.allclose((d_v * qkv.chunk(3, 1)[2]).sum(), (out * weights).sum())
        outs.append(out.detach())
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    plain = attend(qkv.detach(), positions.keys, positions.queries, batch, scale, None)
    mean = torch.stack([compiled(qkv.detach(), *positions[:2], batch, scale, 0.3) for _ in range(60)]).mean(0)
    assert rms_error(mean, plain) < 0.2


def test_operation() -> None:
    """Catches a schema, a fake implementation or a registration that breaks PyTorch's rules for operators."""
    batch, qkv, positions, scale = make("short", False, CPU, FP32, TERMS[0])

    arguments = (
        *leaves_of(qkv, positions.keys, positions.queries), batch.cu_seqlens_cpu, *BUCKETS, HEADS, scale, None,
        torch.tensor(5), 0.2,
    )  # fmt: skip
    both: Any = torch.ops.fastbert
    grad, tests = torch.randn(len(qkv), qkv.shape[1] // 3), ("test_schema", "test_faketensor")
    torch.library.opcheck(both.disentangled_attention, arguments, test_utils=(*tests, "test_autograd_registration"))
    torch.library.opcheck(both.disentangled_attention_backward, (grad, *arguments), test_utils=tests)


@pytest.mark.parametrize(("backend", "p"), [("cpu", 0.0), ("triton", 0.1)])
def test_compiled_model(backend: str, p: float, device: torch.device) -> None:
    """Catches a layer of DeBERTa that breaks the graph when it trains, or whose gradients are others."""
    config = BertConfig.from_dict(
        {"model_type": "deberta-v2", "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2,
         "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 40, "type_vocab_size": 0,
         "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
         "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "hidden_dropout_prob": p,
         "attention_probs_dropout_prob": p}
    )  # fmt: skip
    model: Any = DebertaModel(config, backend=backend).to(device).train()
    batch = packing.from_cu_seqlens(cu_seqlens_of([7, 3, 9]), 19, device)
    rows = torch.randn(19, 32, device=device)

    def run(x: Tensor, batch: Any) -> Tensor:
        last: Tensor = model.run_layers(x, batch, False)[-1]
        return last

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        x = rows.clone().requires_grad_()
        out = function(x, batch)
        (out * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
        named = {name: q.grad for name, q in model.encoder.named_parameters()}
        results.append({"out": out.detach(), "x": x.grad, **named})
    for name, ours in results[1].items():
        assert ours is not None and ours.isfinite().all(), name
        if not p and not name.endswith("key_proj.bias"):  # of which the gradient is 0 in BERT, and here nearly
            assert rms_error(ours, results[0][name]) < 1e-4, name
