"""bias + residual + LayerNorm is right in the kernel and the plain path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, reference
from fastbert.ops import BackendError, Policy
from helpers import assert_as_accurate, guarded, rms_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = Policy("triton", strict=True)


def inputs(n_rows, hidden_size, dtype, device, bias=True, residual=True, offset=0.0):
    x, r = (torch.randn(n_rows, hidden_size) + offset for _ in range(2))
    b, weight, ln_bias = (torch.randn(hidden_size) for _ in range(3))
    tensors = (x, b if bias else None, r if residual else None, weight, ln_bias)
    return [None if t is None else t.to(device, dtype) for t in tensors]


def check(name, tensors, eps, policy, wrap=lambda t: t):
    x, bias, residual, weight, ln_bias = tensors
    ours = ops.bias_residual_layer_norm(*(None if t is None else wrap(t) for t in tensors), eps, policy=policy)
    expected = reference.bias_residual_layer_norm(*(None if t is None else t.double() for t in tensors), eps)
    eager = x if bias is None else x + bias
    eager = eager if residual is None else eager + residual
    assert_as_accurate(name, ours, F.layer_norm(eager, weight.shape, weight, ln_bias, eps), expected)


def guard(t):
    return guarded(t, extra_columns=3)


@pytest.mark.parametrize("hidden_size", [1, 33, 96, 320, 384, 768, 1023, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_hidden_sizes(hidden_size, dtype, device, poisoned):
    """Catches a hidden size whose tail is computed with garbage, left unwritten, or counted into the mean."""
    check(f"H{hidden_size}", inputs(5, hidden_size, dtype, device), 1e-12, TRITON, guard)
    poisoned.check()


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 33])
@pytest.mark.parametrize(("bias", "residual"), [(True, True), (True, False), (False, True), (False, False)])
def test_kernel_rows_and_optional_inputs(n_rows, bias, residual, device, poisoned):
    """Catches a last block of rows that is cut off, or a bias or residual that is read though absent."""
    check(f"T{n_rows}", inputs(n_rows, 48, torch.float32, device, bias, residual), 1e-5, TRITON, guard)
    poisoned.check()


def test_large_mean(device):
    """Catches a variance computed as E[x^2] - E[x]^2, which cancels where the mean is large.

    The numbers are whole, their sums below 2^24 and 256 of them, so that their mean is exact in float32, added up in
    any order: else the error would be that of the mean, of which one right order may have twice as much as another.
    """
    x, bias, residual, weight, ln_bias = inputs(9, 256, torch.float32, device)
    x, bias, residual = ((4 * t).round() + offset for t, offset in ((x, 8192), (bias, 0), (residual, 8192)))
    check("large mean", (x, bias, residual, weight, ln_bias), 1e-12, TRITON)


def test_constant_rows(device):
    """Catches a division by zero where a row has no variance and the result is ln_bias."""
    x, bias, residual, weight, ln_bias = inputs(3, 64, torch.float32, device)
    out = ops.bias_residual_layer_norm(torch.full_like(x, 2.0), None, None, weight, ln_bias, 1e-12, policy=TRITON)
    assert torch.equal(out, ln_bias.expand(3, 64))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_plain_path(backend, dtype):
    """Catches a plain path that adds in another order than the policy allows, or that drops an input."""
    check(backend, inputs(6, 96, dtype, torch.device("cpu")), 1e-12, Policy(backend))


@pytest.mark.parametrize(("bias", "residual"), [(True, True), (False, True), (False, False)])
def test_gradients_under_triton(bias, residual, device):
    """Catches a backward pass that is not the derivative of the forward one, for any input."""
    grads = {}
    for policy in (TRITON, Policy("torch")):
        torch.manual_seed(1)
        tensors = inputs(4, 40, torch.float32, device, bias, residual)
        for t in tensors:
            if t is not None:
                t.requires_grad_()
        ops.bias_residual_layer_norm(*tensors, 1e-5, policy=policy).pow(3).sum().backward()
        grads[policy.backend] = [t.grad for t in tensors if t is not None]
    for ours, theirs in zip(grads["triton"], grads["torch"], strict=True):
        assert rms_error(ours, theirs) < 1e-5


def test_hidden_size_above_4096(device):
    """Catches a row that does not fit the kernel's one block, computed wrongly instead of refused."""
    tensors = inputs(2, 4100, torch.float32, device)
    with pytest.raises(BackendError, match="layer_norm: .*hidden size 4100 is above 4096"):
        ops.bias_residual_layer_norm(*tensors, 1e-5, policy=TRITON)
    check("fallback", tensors, 1e-5, Policy("triton"))


def test_dropout_acts_before_the_residual():
    """Catches dropout applied to the residual too, or not at all."""
    x, _, _, weight, ln_bias = inputs(400, 32, torch.float64, torch.device("cpu"))
    residual = torch.full_like(x, 100.0)
    out = ops.bias_residual_layer_norm(x, None, residual, weight, ln_bias, 1e-5, dropout=0.5)
    normal = ops.bias_residual_layer_norm(x, None, residual, weight, ln_bias, 1e-5)
    assert not torch.allclose(out, normal)
    # A dropped x leaves the residual: rows without any kept x would be constant, rows with dropped residual far apart.
    assert out.isfinite().all() and out.abs().max() < 50


@pytest.mark.parametrize(
    ("index", "shape", "name"),
    [(1, (8,), "bias"), (2, (5, 9), "residual"), (3, (8,), "weight"), (4, (10,), "ln_bias")],
)
def test_wrong_shapes(index, shape, name):
    """Catches a wrong shape that broadcasts in silence."""
    tensors = inputs(5, 10 if name == "residual" else 9, torch.float32, torch.device("cpu"))
    tensors[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ops.bias_residual_layer_norm(*tensors, 1e-5)
