"""The backward pass of pooling is right, in the kernels and in the plain path."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastbert import ops, reference
from fastbert.ops import Policy
from fastbert.ops.pooling import MODES
from fastbert_kernels.pooling_backward import pool_backward
from gradient_cases import BF16, FP16, FP32, assert_gradient, leaves
from helpers import cu_seqlens_of, guarded, rms_error
from pooling_cases import LENGTHS, eager_pool

TRITON = Policy("triton", strict=True)
LONG = [128, 300, 127, 0, 1, 33]


def gradients(hidden, lengths, mode, normalize, grad):
    """The gradient of hidden by plain PyTorch in its dtype, and by the reference in float64."""
    cu_seqlens = cu_seqlens_of(lengths, hidden.device)
    (eager,) = leaves([hidden])
    eager_pool(eager, lengths, mode, normalize).backward(grad.to(hidden.dtype))
    (exact,) = leaves([hidden], torch.float64)
    reference.pool(exact, cu_seqlens, mode, normalize).backward(grad.double())
    return eager.grad, exact.grad


def check(name, lengths, hidden_size, dtype, grad_dtype, device, mode, normalize):
    hidden = torch.randn(sum(lengths), hidden_size).to(device, dtype) - 0.3
    grad = torch.randn(len(lengths), hidden_size).to(device, grad_dtype)
    wide = guarded(grad, extra_columns=3), guarded(hidden, extra_columns=5), guarded(cu_seqlens_of(lengths, device))
    ours = pool_backward(*wide, mode, normalize)
    assert ours.dtype == dtype
    assert_gradient(name, ours, *gradients(hidden, lengths, mode, normalize, grad), dtype)
    assert torch.equal(ours, pool_backward(*wide, mode, normalize))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)], ids=str
)
def test_kernel(mode, normalize, dtype, grad_dtype, device, poisoned):
    """Catches a wrong weight, a neighbour's gradient, a row without one, or a norm's gradient left out."""
    check(mode, LENGTHS, 40, dtype, grad_dtype, device, mode, normalize)
    poisoned.check()


@pytest.mark.parametrize("mode", MODES)
def test_kernel_over_long_texts(mode, device, poisoned):
    """Catches a block of rows that no program writes, or that two do."""
    check(mode, LONG, 130, BF16, FP32, device, mode, False)
    poisoned.check()


@pytest.mark.parametrize("hidden_size", [1, 320, 1023, 4096])
def test_kernel_hidden_sizes(hidden_size, device, poisoned):
    """Catches a tail of the row that enters the norm's gradient, or is not written."""
    for mode in ("mean", "max"):
        lengths = [5, 1, 9] if hidden_size < 2000 else [2]
        check(f"H{hidden_size}", lengths, hidden_size, FP32, FP32, device, mode, hidden_size > 1)
    poisoned.check()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_ties(backend, device):
    """Catches equal rows that share the gradient of a maximum, where torch.max gives it to the first one."""
    hidden = torch.randint(0, 3, (sum(LENGTHS), 24), device=device).to(BF16)
    (ours,) = leaves([hidden])
    grad = torch.randn(len(LENGTHS), 24, device=device)
    ops.pool(ours, cu_seqlens_of(LENGTHS, device), "max", out_dtype=FP32, policy=Policy(backend)).backward(grad)
    assert torch.equal(ours.grad, gradients(hidden, LENGTHS, "max", False, grad)[1].to(BF16))


def test_one_value(device):
    """Catches a maximum of minus infinity, or of a zero vector's norm, whose gradient goes nowhere or is NaN."""
    hidden, cu_seqlens = torch.full((3, 8), float("-inf"), device=device), cu_seqlens_of([3], device)
    grad = pool_backward(torch.ones(1, 8, device=device), hidden, cu_seqlens, "max", False)
    assert grad.tolist() == [[1.0] * 8, [0.0] * 8, [0.0] * 8]
    grad = pool_backward(torch.ones(1, 8, device=device), torch.zeros(3, 8, device=device), cu_seqlens, "cls", True)
    (leaf,) = leaves([torch.zeros(3, 8, device=device)])
    torch.nn.functional.normalize(leaf[:1], eps=1e-12).sum().backward()
    assert torch.equal(grad, leaf.grad)


def test_nothing_to_pool(device):
    """Catches an empty grid that is launched."""
    for lengths in ([], [0, 0]):
        none = torch.zeros(0, 8, device=device)
        grad = torch.ones(len(lengths), 8, device=device)
        assert pool_backward(grad, none, cu_seqlens_of(lengths, device), "max", True).shape == (0, 8)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_second_derivatives(backend, mode, normalize, device):
    """Catches a gradient without a derivative where one is asked for."""
    lengths = [3, 1, 17, 2]
    (hidden,) = leaves([torch.randn(sum(lengths), 6, device=device)])
    (exact,) = leaves([hidden], torch.float64)
    cu_seqlens, penalties = cu_seqlens_of(lengths, device), []
    pooled = ops.pool(hidden, cu_seqlens, mode, normalize=normalize, policy=Policy(backend))
    for leaf, out in ((hidden, pooled), (exact, reference.pool(exact, cu_seqlens, mode, normalize))):
        (first,) = torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(first.pow(2).sum(), leaf)[0])
    assert rms_error(*penalties) < 1e-5


@pytest.mark.parametrize("length", [1, 3, 70, 300])
@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
def test_maximum_of_nan(backend, length, device):
    """Catches a NaN that a maximum overlooks, in whole blocks of rows or in the rest, with a gradient or without."""
    for place in {0, length // 2, length - 1}:
        hidden = torch.randn(length + 2, 40, device=device)
        hidden[1 + place, 3], hidden[0] = float("nan"), float("inf")
        for leaf in (hidden, hidden.clone().requires_grad_()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, under the interpreter
                pooled = ops.pool(leaf, cu_seqlens_of([1, length, 1], device), "max", policy=Policy(backend))
            expected = torch.zeros(3, 40, dtype=torch.bool, device=device)
            expected[1, 3] = True
            assert torch.equal(pooled.isnan(), expected)
