"""The activation's backward kernel is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert_kernels import gelu
from fastbert_kernels.gelu import activation_backward, bias_gelu_forward
from gradient_cases import BF16, FP16, FP32, assert_gradient, assert_same_bits, leaves
from helpers import guarded

DTYPES = (FP32, BF16, FP16)
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def through(activation, pre, grad):
    """(grad_pre, activated, grad_bias) by PyTorch's autograd, in the dtype of pre; the sum as that of a bias is."""
    (leaf,) = leaves([pre])
    bias = torch.zeros(pre.shape[1], dtype=pre.dtype, device=pre.device, requires_grad=True)
    activated = ACTIVATIONS[activation](leaf + bias)
    activated.backward(grad)
    return leaf.grad, activated.detach(), bias.grad


def check(name, pre, grad, activation):
    ours = activation_backward(guarded(grad, extra_columns=2), guarded(pre, extra_columns=3), activation)
    eager, exact = through(activation, pre, grad), through(activation, pre.double(), grad.double())
    assert ours[2].dtype == FP32
    for which, *three in zip(("grad_pre", "activated", "grad_bias"), ours, eager, exact, strict=True):
        assert_gradient(f"{name} {which}", *three, pre.dtype)
    return ours


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (3, 131), (70, 256), (2, 1025)])
def test_kernel(n_rows, n_cols, dtype, activation, device, poisoned):
    """Catches the derivative of the other form of GELU, a sum in 16 bits, or an edge of a tile left out."""
    pre, grad = (torch.randn(n_rows, n_cols).to(device, dtype) * scale for scale in (2, 1))
    ours = check(f"{n_rows}x{n_cols}", pre, grad, activation)
    poisoned.check()
    if activation != "relu":
        assert torch.equal(ours[1], bias_gelu_forward(pre, None, activation))


@pytest.mark.parametrize("n_rows", [100, 777])
def test_shares_of_the_rows(n_rows, device, poisoned, monkeypatch):
    """Catches a share of the rows that is left out or counted twice, or a sum whose order changes."""
    monkeypatch.setattr(gelu, "MAX_PROGRAMS", 7)
    pre, grad = (torch.randn(n_rows, 131).to(device) for _ in range(2))
    assert_same_bits(check("shares", pre, grad, "gelu"), check("again", pre, grad, "gelu"))
    poisoned.check()


def test_no_rows(device, poisoned):
    """Catches a sum over no tokens that is whatever lay in memory."""
    empty = torch.zeros(0, 40, device=device, dtype=BF16)
    grad_pre, activated, grad_bias = activation_backward(empty, empty, "gelu")
    assert grad_pre.shape == activated.shape == (0, 40) and torch.equal(grad_bias.cpu(), torch.zeros(40))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # numpy, of NaN and the largest
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_input_of_16_bits(dtype, activation, device):
    """Catches a slope that is wrong in the tails, or NaN where PyTorch's is none."""
    pre = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256).to(device)
    ours, _, _ = activation_backward(torch.ones_like(pre), pre, activation)
    exact, eager = (through(activation, t, torch.ones_like(t))[0].double() for t in (pre.double(), pre.float()))
    assert not (ours.isnan() & ~eager.isnan()).any()
    known = exact.isfinite() & ~ours.isnan()
    # One rounding of the result, and what the polynomial of Phi, or 1 - s, errs by in absolute terms.
    bound = exact.abs() * torch.finfo(dtype).eps * 0.52 + (2e-5 if dtype == FP16 else 2e-4)
    assert ((ours.double() - exact).abs() <= bound)[known].all()
    assert (pre.float().abs() < 1e4)[~known].sum() == 0
