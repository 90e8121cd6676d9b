"""Layers that are not BERT's have exact gradients: pre-norm, gated, rotary, within a window, without biases."""

from __future__ import annotations

import pytest
import torch

import form_cases
from fastbert.ops.dispatch import AUTO
from fastbert.ops.training import choose
from fastbert.ops.training.kernels import Kernels
from fastbert.ops.training.layer import encoder_layer, plain_layer
from fastbert.ops.training.parts import NAMES
from fastbert.ops.training.plain import PLAIN
from form_cases import FORMS, compared, eager_form, make
from gradient_cases import assert_gradient
from helpers import assert_as_accurate
from layer_cases import leaves, tensors_of

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
LENGTHS = [5, 1, 9, 0, 17, 3]


def cpu_kernels(dtype: torch.dtype) -> Kernels:
    kernels = choose.kernels("encoder layer", AUTO, torch.device("cpu"), dtype)
    if kernels is None:
        pytest.skip(f"there are no C++ kernels for {dtype} here")
    return kernels


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_plain_gradients_are_autograds(form: str, p: float) -> None:
    """Catches a formula of a backward pass that is not the derivative, in float64 to rounding."""
    ours, eager, exact = compared(form, LENGTHS, PLAIN, FP64, p=p, hidden=32, inner=40, num_heads=2)
    for name in ours:
        assert torch.allclose(ours[name], exact[name], rtol=1e-9, atol=1e-11), name
        assert torch.allclose(eager[name], exact[name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradients_on_a_cpu(dtype: torch.dtype, form: str, p: float) -> None:
    """Catches a gradient that is wrong or less exact than PyTorch's, in each form, with dropout and without."""
    ours, eager, exact = compared(form, [*LENGTHS, 40], cpu_kernels(dtype), dtype, p=p)
    for name in ours:
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_under_autocast(form: str) -> None:
    """Catches a residual stream or parameters' gradients in less than float32 under autocast."""
    ours, eager, exact = compared(form, LENGTHS, cpu_kernels(BF16), BF16, p=0.2, stream=FP32)
    for name in ours:
        assert ours[name].dtype == FP32
        assert_as_accurate(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize(("form", "dtype"), [("middle", BF16), ("last", FP32), ("gte", BF16)], ids=str)
def test_gradients_in_triton(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches a kernel of Triton's that the layer calls with other arguments than it takes."""
    ours, eager, exact = compared(form, [5, 0, 17], choose.TRITON, dtype, p=0.2, hidden=32, num_heads=2, inner=48,
                                  device=device)  # fmt: skip
    for name in ours:
        assert_gradient(name, ours[name], eager[name], exact[name], dtype)


@pytest.mark.parametrize("form", ["first", "middle", "last", "gte"])
@pytest.mark.parametrize(
    "frozen",
    [{"query"}, {"x"}, {*NAMES} - {"down"}, {*NAMES} - {"output_norm"}, {*NAMES} - {"attention_norm", "last_norm"},
     {"up", "x", "out"}, {*NAMES}],
)  # fmt: skip
def test_frozen_parameters(form: str, frozen: set[str]) -> None:
    """Catches a gradient of what needs none, or another one where something is frozen."""
    parameters, settings = make(form, [5, 3], PLAIN, FP64, p=0.2, hidden=32, inner=40, num_heads=2)
    x, parameters = leaves(torch.randn(8, 32), parameters, FP64)
    tensors = {"x": x, **tensors_of(parameters)}
    encoder_layer(x, parameters, settings).square().sum().backward()
    expected = {name: t.grad for name, t in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = None
        tensor.requires_grad_(name not in frozen)
    encoder_layer(x, parameters, settings).square().sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name in frozen), name
        assert name in frozen or torch.allclose(tensor.grad, expected[name], rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("form", ["middle", "nomic"])
def test_second_derivatives(form: str) -> None:
    """Catches a wrong second derivative of a layer of another form."""
    parameters, settings = make(form, [3, 6], PLAIN, FP64, hidden=32, inner=40, num_heads=2)
    x, parameters = leaves(torch.randn(9, 32), parameters, FP64)
    seconds = []
    for layer in (encoder_layer, eager_form):
        (first,) = torch.autograd.grad(layer(x, parameters, settings).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, parameters.query, parameters.up]))
    for ours, eager in zip(*seconds, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-8)


def test_same_bits_for_any_number_of_threads(number_of_threads: None) -> None:
    """Catches sums whose order depends on threads, or on whether another gradient is wanted."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(compared("middle", LENGTHS * 4, cpu_kernels(FP32), FP32, p=0.1)[0])
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_plain_form_is_the_forms() -> None:
    """Catches a comparison with the wrong layer: pre-norm and post-norm differ."""
    parameters, settings = make("gte", [4], PLAIN, FP64, hidden=32, inner=40, num_heads=2)
    x = torch.randn(4, 32, dtype=FP64)
    pre = form_cases.replace(settings, pre_norm=True)
    assert not torch.allclose(plain_layer(x, parameters, settings), plain_layer(x, parameters, pre))
