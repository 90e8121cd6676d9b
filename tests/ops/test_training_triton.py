"""A layer with gradients on Triton kernels: every gradient is as exact as PyTorch's, and the same on every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import gelu
from fastbert.ops.training import choose
from fastbert_kernels import linear
from helpers import assert_as_accurate, rms_error
from layer_cases import LENGTHS, compared

# A query with one key has a gradient of 0, which flash attention gets as the difference of two equal numbers.
ONE_KEY = ("ones", "one token")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [kind for kind in LENGTHS if kind not in ONE_KEY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(dtype: torch.dtype, lengths: str, p: float, device: torch.device) -> None:
    """Catches a gradient that is wrong or less exact than PyTorch's, for any batch, with dropout and without."""
    ours, eager, exact = compared(LENGTHS[lengths], choose.TRITON, dtype, p=p, device=device)
    for name in ours:
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_gradients_of_other_activations(activation: str, device: torch.device) -> None:
    """Catches an activation that the forward pass leaves out and the backward pass has."""
    ours, eager, exact = compared(LENGTHS["mixed"], choose.TRITON, torch.float32, activation=activation, device=device)
    for name in ours:
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", ONE_KEY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_one_key(dtype: torch.dtype, lengths: str, p: float, device: torch.device) -> None:
    """Catches more than rounding where every query has one key, and queries and keys have no gradient."""
    ours, eager, exact = compared(LENGTHS[lengths], choose.TRITON, dtype, p=p, device=device)
    for name in ours:
        bound = 1.25 * rms_error(eager[name], exact[name]) + 6 * torch.finfo(dtype).eps
        assert rms_error(ours[name], exact[name]) <= bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """Catches a residual stream or parameters' gradients in less than float32 under autocast."""
    lengths = LENGTHS["mixed"] * 3
    ours, eager, exact = compared(lengths, choose.TRITON, dtype, p=0.2, stream=torch.float32, device=device)
    for name in ours:
        assert ours[name].dtype == torch.float32
        assert_as_accurate(name, ours[name], eager[name], exact[name])


def test_same_bits_twice(device: torch.device) -> None:
    """Catches sums whose order depends on chance."""
    first, second = (
        compared(LENGTHS["mixed"], choose.TRITON, torch.float32, p=0.1, device=device, hidden=32, num_heads=2)[0]
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("dtype", "activation", "fused"),
    [
        (torch.bfloat16, "gelu", 1),
        (torch.float16, "gelu_tanh", 1),
        (torch.bfloat16, "relu", 0),
        (torch.float32, "gelu", 0),
    ],
)
def test_an_activation_is_in_the_epilogue(dtype, activation, fused, device, monkeypatch) -> None:
    """Catches a pass over memory that inference does without, and an activation or what it came from that is wrong."""
    products, forward = [], linear.linear_forward
    monkeypatch.setattr(linear, "linear_forward", lambda *a, **k: products.append(k["pre"]) or forward(*a, **k))
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((9, 32), (48, 32), (48,)))
    x = x.to(dtype)
    activated, pre = choose.TRITON.activated_linear(x, weight, bias, activation)  # parameters as under autocast
    assert len(products) == fused
    exact = F.linear(x.double(), weight.to(dtype).double(), bias.to(dtype).double())
    eager = F.linear(x, weight.to(dtype), bias.to(dtype))
    assert_as_accurate("pre-activation", pre, eager, exact)
    assert_as_accurate("activated", activated, gelu.activate(eager, activation), gelu.activate(exact, activation))
    assert pre.dtype == activated.dtype == dtype
