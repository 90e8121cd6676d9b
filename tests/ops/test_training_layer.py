"""A layer with gradients: every gradient is as exact as PyTorch's, it keeps what it says, and PyTorch's rules hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layer_cases
from fastbert.bench.memory import saved_for_backward
from fastbert.ops.dispatch import AUTO
from fastbert.ops.training import choose
from fastbert.ops.training.kernels import Kernels
from fastbert.ops.training.layer import LayerParameters, encoder_layer
from fastbert.ops.training.plain import PLAIN
from helpers import assert_as_accurate
from layer_cases import LENGTHS, NAMES, compared, leaves, random_parameters, settings_for, tensors_of

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


def cpu_kernels(dtype: torch.dtype) -> Kernels:
    kernels = choose.kernels("encoder layer", AUTO, CPU, dtype)
    if kernels is None:
        pytest.skip(f"there are no C++ kernels for {dtype} here")
    return kernels


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [*LENGTHS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_on_a_cpu(dtype: torch.dtype, lengths: str, p: float) -> None:
    """Catches a gradient that is wrong or less exact than PyTorch's, for any batch, with dropout and without."""
    ours, eager, exact = compared(LENGTHS[lengths], cpu_kernels(dtype), dtype, p=p)
    for name in ours:
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_under_autocast(p: float) -> None:
    """Catches a residual stream or parameters' gradients in less than float32 under autocast."""
    kernels = cpu_kernels(torch.bfloat16)
    ours, eager, exact = compared(LENGTHS["mixed"], kernels, torch.bfloat16, p=p, stream=torch.float32)
    for name in ours:
        assert ours[name].dtype == torch.float32
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_plain_gradients_are_autograds(activation: str, p: float) -> None:
    """Catches a formula of a backward pass that is not the derivative, in float64 to rounding."""
    ours, _, exact = compared(
        LENGTHS["mixed"], PLAIN, torch.float64, p=p, activation=activation, hidden=32, inner=40, num_heads=2
    )
    for name in ours:
        assert torch.allclose(ours[name], exact[name], rtol=1e-9, atol=1e-11), name


def test_gradcheck() -> None:
    """Catches a derivative that autograd and the layer have wrong alike."""
    settings = settings_for([2, 1], 2, PLAIN, torch.float64, p=0.25, head_size=4)
    x, parameters = leaves(torch.randn(3, 8), random_parameters(8, 6), torch.float64)

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        return encoder_layer(x, LayerParameters(*parameters), settings)

    assert torch.autograd.gradcheck(layer, (x, *parameters.listed()))


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_activation_memory(stream: torch.dtype, p: float) -> None:
    """Catches a tensor more than the backward pass needs: 26 H bytes a token and layer in 16 bits."""
    hidden, n_tokens = 128, 300
    settings = settings_for([200, 100], 2, PLAIN, torch.bfloat16, p=p, head_size=64)
    x, parameters = leaves(torch.randn(n_tokens, hidden), random_parameters(hidden, 4 * hidden), stream)
    own = [t for t in parameters.listed() if t is not None]
    n_bytes = saved_for_backward(lambda: encoder_layer(x, parameters, settings), own)
    assert 20 * hidden * n_tokens < n_bytes <= 26 * hidden * n_tokens


@pytest.mark.parametrize(
    "frozen", [{"query"}, {"query", "key", "value"}, {*NAMES} - {"down", "down_bias"}, {"x"}, {"up", "x"}, {*NAMES}]
)
def test_frozen_parameters(frozen: set[str]) -> None:
    """Catches a gradient of what needs none, or another one where something is frozen."""
    settings = settings_for([5, 3], 2, PLAIN, torch.float64, p=0.2, head_size=16)
    x, parameters = leaves(torch.randn(8, 32), random_parameters(32, 48), torch.float64)
    tensors = {"x": x, **tensors_of(parameters)}
    encoder_layer(x, parameters, settings).square().sum().backward()
    expected = {name: t.grad for name, t in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = None
        tensor.requires_grad_(name not in frozen)
    encoder_layer(x, parameters, settings).square().sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name in frozen), name
        assert name in frozen or torch.allclose(tensor.grad, expected[name], rtol=1e-12), name


def test_changed_weights_raise_pytorchs_error() -> None:
    """Catches gradients made of weights that were written to between the passes."""
    settings = settings_for([5], 2, PLAIN, torch.float32)
    x, parameters = leaves(torch.randn(5, 32), random_parameters(32, 48), torch.float32)
    output = encoder_layer(x, parameters, settings)
    with torch.no_grad():
        parameters.up.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_second_derivatives() -> None:
    """Catches a wrong second derivative, and, where there is none, an error that does not say why."""
    x, parameters = leaves(torch.randn(5, 32), random_parameters(32, 48), torch.float64)
    seconds = []
    for layer in (encoder_layer, layer_cases.eager_layer):
        settings = settings_for([3, 2], 2, PLAIN, torch.float64, head_size=16)
        (first,) = torch.autograd.grad(layer(x, parameters, settings).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, parameters.query, parameters.up]))
    for ours, eager in zip(*seconds, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-8)
    settings = settings_for([3, 2], 2, PLAIN, torch.float64, p=0.1, head_size=16)
    (first,) = torch.autograd.grad(encoder_layer(x, parameters, settings).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative under dropout"):
        first.square().sum().backward()


def test_same_bits_twice(number_of_threads: None) -> None:
    """Catches sums whose order depends on threads or on chance."""
    kernels = cpu_kernels(torch.float32)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(compared(LENGTHS["mixed"] * 6, kernels, torch.float32, p=0.1)[0])
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[1][name], found[2][name]), name
