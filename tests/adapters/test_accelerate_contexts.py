"""Accelerated models do what the original does when they are traced, transformed or watched."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert.adapters import register_attention, versions
from fastbert.adapters.state import STATE
from helpers import rms_error

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "return_dict": False,
}  # fmt: skip
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 4 + [0] * 3, [1, 1, 0, 1, 1, 1, 1], [1] * 7])
OTHER = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
X, T = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def pair(kind: str = "BertModel", **config: Any) -> tuple[Any, Any]:
    """The original and an accelerated copy."""
    torch.manual_seed(3)
    settings = transformers.BertConfig(**{**SIZES, "attn_implementation": "eager", **config})
    theirs = getattr(transformers, kind)(settings).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0.0, 0.3)
    return theirs, fastbert.accelerate(copy.deepcopy(theirs))


def counts(model: Any) -> dict[str, int]:
    encoder = next(module for module in model.modules() if STATE in module.__dict__)
    return dict(encoder.__dict__[STATE].counts)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_jit_trace(kind, check, gradients, caplog):
    """Catches a trace of our path, and a call that a trace counts or logs."""
    theirs, ours = pair(kind)
    with torch.set_grad_enabled(gradients), caplog.at_level(logging.WARNING, "fastbert"):
        traced = torch.jit.trace(ours, (IDS, MASK), check_trace=check)
        expected = torch.jit.trace(theirs, (IDS, MASK), check_trace=check)
        for a, b in zip(traced(IDS, OTHER), expected(IDS, OTHER), strict=True):
            assert torch.equal(a, b)
    ran = counts(ours)  # torch checks a trace against the model itself
    assert set(ran) <= ({"fastbert"} if check else set())
    assert "fastbert" not in [record.name for record in caplog.records]


@pytest.mark.parametrize("mode", ["fake", "symbolic", "export"])  # with real tensors the original fails
def test_graphs_and_fake_tensors(mode):
    """Catches a graph of our path, which holds for one mask."""
    theirs, ours = pair()
    with torch.no_grad():
        if mode == "export":
            output = torch.export.export(ours, (IDS, MASK), strict=False).module()(IDS, OTHER)[0]
        else:
            graph = make_fx(lambda *args: ours(*args)[0], tracing_mode=mode, _allow_non_fake_inputs=True)
            output = graph(IDS, MASK)(IDS, OTHER)
        assert rms_error(output[OTHER == 1], theirs(IDS, OTHER)[0][OTHER == 1]) < 1e-6
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert ours(fake.from_tensor(IDS), fake.from_tensor(MASK))[0].shape == (3, 7, 32)
    assert not counts(ours)


def last(model: Any, embeds: Tensor) -> Tensor:
    state: Tensor = model(inputs_embeds=embeds)[0]
    return state


def total(model: Any) -> Any:
    return lambda embeds: last(model, embeds).pow(3).sum()


def forward_mode(model: Any) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(last(model, forward_ad.make_dual(X, T))).tangent


def forward_mode_of_parameters(model: Any) -> Tensor:
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in model.named_parameters()}
        return forward_ad.unpack_dual(functional_call(model, duals, (IDS, MASK))[1]).tangent


def gradient_of_parameters(model: Any) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(lambda p: functional_call(model, p, (IDS, MASK))[1].pow(3).sum())(parameters)
    return torch.cat([g.flatten() for g in gradients.values()])


def ensemble(model: Any) -> Tensor:
    stacked = {name: torch.stack([p.detach(), p.detach() * 1.1]) for name, p in model.named_parameters()}
    with torch.no_grad():
        return vmap(lambda p: functional_call(model, p, (IDS,))[1])(stacked)


def penalty(model: Any) -> Tensor:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(model)(x), x, create_graph=True)
    wanted = [p for name, p in model.named_parameters() if name.startswith("encoder")]
    return torch.cat([g.flatten() for g in torch.autograd.grad(first.pow(2).sum(), wanted)])


def vmapped(model: Any) -> Tensor:
    with torch.no_grad():
        return vmap(lambda row: last(model, row[None])[0])(X)


# Name -> (function of a model, whether it runs as before)
TRANSFORMS = {
    "grad": (lambda m: grad(total(m))(X), True),
    "vjp": (lambda m: vjp(lambda e: last(m, e), X)[1](T)[0], True),
    "jvp": (lambda m: jvp(lambda e: last(m, e), (X,), (T,))[1], True),
    "jacrev": (lambda m: jacrev(lambda e: m(inputs_embeds=e)[1])(X), True),
    "jacfwd": (lambda m: jacfwd(lambda e: m(inputs_embeds=e)[1])(X), True),
    "hessian": (lambda m: hessian(total(m))(X[:1, :2]), True),
    "vmap": (vmapped, True),
    "ensemble": (ensemble, True),
    "gradient of parameters": (gradient_of_parameters, True),
    "forward AD": (forward_mode, True),
    "forward AD of parameters": (forward_mode_of_parameters, True),
    "vectorized jacobian": (
        lambda m: torch.autograd.functional.jacobian(lambda e: m(inputs_embeds=e)[1], X, vectorize=True), False
    ),
    "hessian by autograd": (lambda m: torch.autograd.functional.hessian(total(m), X[:1, :2]), False),
    "jvp by autograd": (lambda m: torch.autograd.functional.jvp(lambda e: last(m, e), X, T)[1], False),
    "gradient penalty": (penalty, False),
}  # fmt: skip


@pytest.mark.parametrize("n_heads", [2, 4])  # head sizes with a C++ kernel, and without
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, n_heads):
    """Catches a transform that fails, or is silently wrong, where the original runs."""
    theirs, ours = pair(num_attention_heads=n_heads)
    function, as_before = TRANSFORMS[name]
    result, expected = function(ours).detach(), function(theirs).detach()
    assert rms_error(result, expected) < (1e-7 if as_before else 1e-5)
    reasons = [reason for reason in counts(ours) if reason != "fastbert"]
    assert all("torch.func" in reason or "forward-mode" in reason for reason in reasons)
    assert bool(reasons) == as_before


def test_strict_refuses_transforms():
    """Catches a strict model that runs as before."""
    ours = fastbert.accelerate(pair()[0], strict=True)
    with pytest.raises(fastbert.ops.BackendError, match=r"torch\.func"):
        grad(total(ours))(X)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * 2 if function is nn.functional.layer_norm else out


def test_modes():
    """Catches a mode that watches or replaces operations, and sees others than the original's."""
    theirs, ours = pair()
    with torch.no_grad():
        with Doubled():
            output, expected = ours(IDS, MASK)[0], theirs(IDS, MASK)[0]
        assert torch.equal(output, expected)
        flops = []
        for model in (ours, theirs):
            with FlopCounterMode(display=False) as counter:
                model(IDS, MASK)
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1]
        ours(IDS, MASK)
    assert counts(ours)["fastbert"] == 1 and sum(counts(ours).values()) == 3


@pytest.mark.parametrize("change", ["meta", torch.float64, torch.bfloat16])
def test_default_device_and_dtype(change):
    """Catches memory of ours that is made on the default device, or in the default dtype."""
    theirs, ours = pair()
    before = torch.get_default_dtype()
    with torch.no_grad():
        expected = theirs(IDS, MASK)[0][MASK == 1]
        if change == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(change)
        try:
            output = ours(IDS, MASK)[0]
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(before)
    assert counts(ours) == {"fastbert": 1}
    assert rms_error(output[MASK == 1], expected) < 1e-6


@pytest.mark.skipif(versions.attention_interfaces() is None, reason="transformers 5 has the interface")
@pytest.mark.parametrize("name", ["grad", "jvp", "jacfwd", "hessian", "vmap", "ensemble", "forward AD"])
def test_registered_attention(name):
    """Catches a transform that reaches our attention in a model that has it by name."""
    register_attention()
    theirs = pair()[0]
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("fastbert")
    function, _ = TRANSFORMS[name]
    assert rms_error(function(ours).detach(), function(theirs).detach()) < 1e-5
