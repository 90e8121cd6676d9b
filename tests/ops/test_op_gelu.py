"""bias + GELU is right in the kernel and the plain path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, reference
from fastbert.ops import BackendError, Policy
from helpers import assert_as_accurate, guarded, rms_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = Policy("triton", strict=True)
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def check(name, x, bias, activation, policy):
    guarded_bias = None if bias is None else guarded(bias)
    ours = ops.bias_gelu(guarded(x, extra_columns=5), guarded_bias, activation, policy=policy)
    zero = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    summed = x.double() + (zero if bias is None else bias).double()
    expected = reference.gelu(summed, APPROXIMATE[activation])
    eager = F.gelu(x if bias is None else x + bias, approximate=APPROXIMATE[activation])
    assert_as_accurate(name, ours, eager, expected)


@pytest.mark.parametrize("activation", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (3, 131), (33, 1024), (2, 1025), (5, 3072)])
def test_kernel(n_rows, n_cols, dtype, activation, device, poisoned):
    """Catches the wrong form of GELU, or an edge of a tile left out."""
    x, bias = torch.randn(n_rows, n_cols).to(device, dtype) * 2, torch.randn(n_cols).to(device, dtype)
    check(f"{n_rows}x{n_cols}", x, bias, activation, TRITON)
    poisoned.check()


@pytest.mark.parametrize("activation", APPROXIMATE)
def test_kernel_without_bias(activation, device, poisoned):
    """Catches a bias that is read though absent."""
    check("no bias", torch.randn(7, 96).to(device), None, activation, TRITON)
    poisoned.check()


@pytest.mark.parametrize("activation", APPROXIMATE)
def test_extremes(activation, device):
    """Catches NaN or infinity for large x: GELU is 0 far on the left and x far on the right."""
    x = torch.tensor([[-1e4, -50.0, -0.0, 0.0, 50.0, 1e4]], device=device)
    out = ops.bias_gelu(x, None, activation, policy=TRITON)
    assert torch.equal(out.cpu(), torch.tensor([[0.0, 0.0, 0.0, 0.0, 50.0, 1e4]]))


# The largest error in units of the result's last place, where the result is larger than so much.
IN_16_BITS = {torch.bfloat16: (0.56, 1e-7), torch.float16: (0.52, 0.0)}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of NaN
@pytest.mark.parametrize("dtype", IN_16_BITS, ids=str)
def test_every_input_of_16_bits(dtype, device):
    """Catches a polynomial that errs in the negative tail, at its cut-off, at infinity or for subnormals."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = ops.bias_gelu(x.view(256, 256).to(device), None, "gelu", policy=TRITON).cpu().flatten().double()
    x = x.double()
    assert torch.equal(out.isnan(), x.isnan())
    assert out[x == float("inf")].item() == float("inf") and out[x == -float("inf")].item() == 0.0
    x, out = x[x.isfinite()], out[x.isfinite()]
    expected = x * torch.special.log_ndtr(x).exp()
    error, (ulps, least) = (out - expected).abs(), IN_16_BITS[dtype]
    binade = torch.ldexp(torch.ones_like(x), torch.frexp(expected).exponent - 1)
    ulp = binade.clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    large = expected.abs() > least
    assert (error / ulp)[large].max() <= ulps
    assert error[~large].max() <= 1e-9
    assert (out[x < -15.0] == 0.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_row(dtype, device):
    """Catches a NaN that a maximum or minimum turns into a number, as on a GPU unless told to keep it."""
    x = torch.tensor([[1.0, float("nan"), -1.0]], dtype=dtype, device=device)
    for activation in APPROXIMATE:
        assert ops.bias_gelu(x, None, activation, policy=TRITON).isnan().tolist() == [[False, True, False]]


def test_erf_is_not_tanh(device):
    """Catches one form of GELU in the place of the other, from which it differs by up to 4.7e-4."""
    x = torch.linspace(-4, 4, 1001, device=device)[None]
    difference = ops.bias_gelu(x, None, "gelu", policy=TRITON) - ops.bias_gelu(x, None, "gelu_tanh", policy=TRITON)
    assert 4e-4 < difference.abs().max() < 5e-4


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("activation", APPROXIMATE)
def test_plain_path(backend, activation):
    """Catches the wrong form of GELU in the plain path."""
    check(backend, torch.randn(7, 96, dtype=torch.float64), torch.randn(96).double(), activation, Policy(backend))


@pytest.mark.parametrize("activation", APPROXIMATE)
def test_gradients_under_triton(activation, device):
    """Catches a backward pass that is not the derivative of the forward one."""
    x, bias = torch.randn(6, 20, device=device), torch.randn(20, device=device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        ops.bias_gelu(*leaves, activation, policy=policy).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rms_error(ours, theirs) < 1e-5


def test_relu_has_no_kernel(device):
    """Catches an activation without a kernel that is computed as GELU."""
    x = torch.randn(3, 8, device=device)
    with pytest.raises(BackendError, match="there is no Triton kernel for 'relu'"):
        ops.bias_gelu(x, None, "relu", policy=TRITON)
    assert torch.equal(ops.bias_gelu(x, None, "relu", policy=Policy("triton")), x.relu())


def test_bad_arguments():
    """Catches an unknown activation or a bias that broadcasts in silence."""
    with pytest.raises(ValueError, match="activation: expected 'gelu', 'gelu_tanh' or 'relu', got 'xielu'"):
        ops.bias_gelu(torch.randn(2, 4), None, "xielu")
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(1,\)"):
        ops.bias_gelu(torch.randn(2, 4), torch.randn(1))
