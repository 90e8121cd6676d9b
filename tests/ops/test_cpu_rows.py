"""The C++ kernels between the products of a training step are right in each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import dropout as masks
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout
from gradient_cases import NEARLY_CONSTANT, assert_gradient, assert_norm_gradients_bounded, assert_same_bits
from helpers import assert_as_accurate, guarded
from row_cases import (
    BF16,
    DROPOUT,
    EPS,
    F32,
    OUT_DROPOUT,
    SIZES,
    differentiate,
    norm_inputs,
    residual_norm,
)

ACTIVATED = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: F.relu(x),
}
NORM_ARGUMENTS = ("x", "bias", "residual", "weight", "ln_bias")
DROPOUTS = {
    "none": {},
    "dropout": {"dropout": DROPOUT},
    "out_dropout": {"out_dropout": OUT_DROPOUT},
    "both": {"dropout": DROPOUT, "out_dropout": OUT_DROPOUT},
}


def padded(tensor):
    return None if tensor is None else guarded(tensor, 5 if tensor.dim() > 1 else 0)


def norm_forward(inputs, dropout=None, low=True):
    return cpu.residual_norm_forward(*(padded(inputs.get(name)) for name in NORM_ARGUMENTS), EPS, dropout, low)


def norm_backward(forward, inputs, grad, grad_low, dropout=None, out_dropout=None, want_residual=True, want_x=True):
    saved = (guarded(each) for each in (forward.total, forward.mean, forward.rstd))
    return cpu.residual_norm_backward(
        padded(grad), padded(grad_low), *saved, padded(inputs["weight"]), dropout, out_dropout, want_residual, want_x
    )


def norm_grads(n_rows, width, compute, stream):
    """Gradients of y and y_low, and their sum as one gradient."""
    grad = torch.randn(n_rows, width).to(stream)
    grad_low = None if compute == stream else torch.randn(n_rows, width).to(compute)
    return grad, grad_low, grad.double() + (0 if grad_low is None else grad_low.double())


def check_norm(inputs, n_rows, width, pair, without=(), **dropouts):
    inputs = inputs | dict.fromkeys(without)
    grad, grad_low, total = norm_grads(n_rows, width, *pair)
    _, exact = differentiate(residual_norm, inputs | dropouts, total, torch.float64)
    _, eager = differentiate(residual_norm, inputs | dropouts, total)
    forward = norm_forward(inputs, dropouts.get("dropout"))
    back = norm_backward(forward, inputs, grad, grad_low, **dropouts)
    for name in set(NORM_ARGUMENTS) - set(without):
        assert_gradient(name, getattr(back, f"grad_{name}"), eager[name], exact[name], pair[0])
    return back


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["kept", "dropped"])
@pytest.mark.parametrize(("n_rows", "width"), SIZES)
def test_the_forward_pass_is_as_accurate_as_eager(n_rows, width, dropout, pair, variant, outputs):
    """Catches a wrong formula, lanes beyond a row, a mask of another row, or statistics of what was rounded."""
    inputs = norm_inputs(n_rows, width, *pair)
    in_double = {name: t.double() for name, t in inputs.items()}
    ours = norm_forward(inputs, dropout)
    exact, eager = (residual_norm(**each, dropout=dropout) for each in (in_double, inputs))
    if width > 1:
        assert_as_accurate("y", ours.y, eager, exact)
    total = masks.apply(in_double["x"] + in_double["bias"], dropout) + in_double["residual"]
    torch.testing.assert_close(ours.total, total.to(pair[0]))
    torch.testing.assert_close(ours.mean.double(), total.mean(1), rtol=1e-5, atol=1e-6)
    variance = (total - total.mean(1, keepdim=True)).pow(2).mean(1)
    torch.testing.assert_close(ours.rstd.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=1e-6)
    assert ours.y_low is None if pair[0] == pair[1] else torch.equal(ours.y_low, ours.y.to(pair[0]))
    outputs.check()


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize(("n_rows", "width"), [size for size in SIZES if size[1] > 1])
def test_gradients_are_as_accurate_as_eager(n_rows, width, dropouts, pair, variant, outputs):
    """Catches a wrong formula, a row that no block has, lanes beyond a row, or sums over rows that lose bits."""
    check_norm(norm_inputs(n_rows, width, *pair), n_rows, width, pair, **dropouts)
    outputs.check()


@pytest.mark.parametrize("without", [("bias",), ("residual",), ("bias", "residual")], ids=str)
def test_gradients_without_bias_or_residual(without, pair, variant):
    """Catches an address that is taken for a tensor's where there is none."""
    stream = pair[0] if "residual" in without else pair[1]
    check_norm(norm_inputs(40, 72, pair[0], stream), 40, 72, (pair[0], stream), without, dropout=DROPOUT)


def test_parameters_of_the_other_dtype(variant):
    """Catches parameters that are read as if they had the rows' dtype, as a norm without a residual has in autocast."""
    inputs = norm_inputs(40, 72, BF16, BF16)
    widened = inputs | {name: inputs[name].float() for name in ("bias", "weight", "ln_bias")}
    grad = torch.randn(40, 72).to(BF16)
    results = [(f := norm_forward(each), norm_backward(f, each, grad, None)) for each in (inputs, widened)]
    for ours, others in zip(*results, strict=True):
        assert_same_bits(ours, others)


def test_weights_of_zero(pair, variant, outputs):
    """Catches a gradient that divides by the weight."""
    inputs = norm_inputs(33, 100, *pair)
    back = check_norm(inputs | {"weight": torch.zeros_like(inputs["weight"])}, 33, 100, pair)
    assert back.grad_x.abs().max() == back.grad_residual.abs().max() == back.grad_bias.abs().max() == 0
    assert back.grad_weight.abs().max() > 0


@pytest.mark.parametrize(("value", "noise"), NEARLY_CONSTANT)
def test_rows_that_are_nearly_constant(value, noise, pair, variant):
    """Catches gradients that explode because the sum was rounded by many times its deviation."""
    inputs = norm_inputs(20, 128, *pair)
    inputs |= {"x": torch.zeros_like(inputs["x"]), "bias": None}
    inputs["residual"] = (value + noise * torch.randn(20, 128)).to(pair[1])
    grad = torch.randn(20, 128).to(pair[1])
    forward = norm_forward(inputs)
    back = norm_backward(forward, inputs, grad, None)
    grads = back.grad_x, back.grad_residual
    assert_norm_gradients_bounded(grads, back.grad_weight, grad, inputs["weight"], forward.rstd)


def test_rows_of_one_element(pair, variant, outputs):
    """Catches a gradient where the result does not depend on x, beyond the rounding of terms that cancel."""
    inputs, (grad, grad_low, total) = norm_inputs(65, 1, *pair), norm_grads(65, 1, *pair)
    forward = norm_forward(inputs)
    back = norm_backward(forward, inputs, grad, grad_low)
    size = total.abs() * inputs["weight"].double() * forward.rstd[:, None] * torch.finfo(F32).eps
    assert (back.grad_x.abs() <= size).all() and (back.grad_residual.abs() <= size).all()
    assert back.grad_weight.abs() <= 1e-6
    torch.testing.assert_close(back.grad_ln_bias.double(), total.sum(0), rtol=1e-5, atol=1e-5)
    outputs.check()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["kept", "dropped"])
def test_the_gradient_of_the_residual(dropout, pair, variant):
    """Catches a second tensor where one does, or one for both where they differ."""
    inputs, (grad, grad_low, _) = norm_inputs(9, 32, *pair), norm_grads(9, 32, *pair)
    forward = norm_forward(inputs, dropout)
    wanted, only_x, only_residual, neither = (
        norm_backward(forward, inputs, grad, grad_low, dropout, None, *want)
        for want in ((True, True), (False, True), (True, False), (False, False))
    )
    assert_same_bits(only_x, (wanted.grad_x, None, *wanted[2:]))
    assert_same_bits(only_residual, (None, *wanted[1:]))
    assert_same_bits(neither, (None, None, *wanted[2:]))
    assert (wanted.grad_residual is wanted.grad_x) == (dropout is None and pair[0] == pair[1])
    assert wanted.grad_residual.dtype == pair[1] and wanted.grad_x.dtype == pair[0]


@pytest.mark.parametrize("width", [7, 72, 384, 4096])
def test_masks_of_both_passes(width, pair, variant):
    """Catches a forward and a backward pass that drop different elements, or others than the definition says."""
    ones = torch.ones(35, width).to(pair[0])
    inputs = {"x": 100 * ones, "weight": torch.ones(width), "ln_bias": torch.zeros(width)}
    forward = norm_forward(inputs, DROPOUT)
    keep = masks.keep(torch.arange(35), width, DROPOUT)
    assert torch.equal(forward.total != 0, keep)
    grad = torch.randn(35, width).to(pair[0])
    assert torch.equal(norm_backward(forward, inputs, grad, None, DROPOUT).grad_x != 0, keep)
    dropped = cpu.dropout_forward(padded(grad), DROPOUT)
    assert torch.equal(dropped, torch.where(keep, grad.float() * DROPOUT.scale, 0.0).to(pair[0]))


def test_dropout_of_everything_and_of_nothing(variant):
    """Catches a scale of 1 / 0, or a threshold that does not fit into 16 bits."""
    x = torch.randn(5, 70)
    assert torch.equal(cpu.dropout_forward(x, Dropout(1 << 16, 3, 1)), torch.zeros(5, 70))
    assert torch.equal(cpu.dropout_forward(x, Dropout(0, 3, 1)), x)


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("n_rows", "width"), [*SIZES, (33, 2500)])
def test_activations_are_as_accurate_as_eager(n_rows, width, dtype, activation, variant, outputs):
    """Catches a wrong derivative, a strip or row left out, lanes beyond a row, or sums over rows that lose bits."""
    pre, grad = (2 * torch.randn(n_rows, width).to(dtype) for _ in range(2))

    def biased(x, bias):
        return ACTIVATED[activation](x + bias)

    inputs = {"x": pre, "bias": torch.zeros(width, dtype=dtype)}
    exact, exact_grads = differentiate(biased, inputs, grad, torch.float64)
    eager, eager_grads = differentiate(biased, inputs, grad)
    grad_pre, activated, grad_bias = cpu.activation_backward(padded(grad), padded(pre), activation)
    assert_as_accurate("activated", activated, eager, exact)
    assert_as_accurate("grad_pre", grad_pre, eager_grads["x"], exact_grads["x"])
    assert grad_bias.dtype == F32
    if width == 1:  # One sum has no typical error, only a largest one.
        assert (grad_bias - exact_grads["bias"]).abs() <= 2 * torch.finfo(F32).eps * exact_grads["x"].abs().sum()
    else:
        assert_gradient("grad_bias", grad_bias, eager_grads["bias"], exact_grads["bias"], dtype)
    outputs.check()


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_slopes_over_the_whole_range(activation, dtype, variant):
    """Catches a polynomial that leaves its range, a tail that is not 0 or 1, or a NaN that is lost."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e30, -200.0, -20.0, 20.0, 200.0, 1e30, 0.0])])
    x = x.to(dtype)[:, None]
    exact, grads = differentiate(ACTIVATED[activation], {"x": x}, torch.ones_like(x), torch.float64)
    slope, activated, _ = cpu.activation_backward(torch.ones_like(x), x, activation)
    tolerance = {"rtol": 3e-6, "atol": 3e-7} if dtype == F32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(slope.double(), grads["x"], **tolerance)
    torch.testing.assert_close(activated.double(), exact, **tolerance)
    ends = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]]).to(dtype)
    slope, _, grad_bias = cpu.activation_backward(torch.ones_like(ends), ends, activation)
    torch.testing.assert_close(slope[:2], torch.tensor([[1.0], [0.0]]).to(dtype))
    assert slope[2].isnan().all() or activation == "relu"
    assert activation == "relu" or grad_bias.isnan().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_are_recomputed_as_the_linear_has_them(activation, variant):
    """Catches a weight gradient of activations that the forward pass did not have."""
    pre = 3 * torch.randn(50, 80)
    linear = cpu.linear_forward(pre, cpu.pack_weight(torch.eye(80)), 80, None, activation)
    assert torch.equal(cpu.activation_backward(pre, pre, activation)[1], linear)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads, pair, variant, number_of_threads):
    """Catches bits of a gradient that depend on the number of threads."""
    inputs, (grad, grad_low, _) = norm_inputs(150, 200, *pair), norm_grads(150, 200, *pair)

    def run():
        forward = norm_forward(inputs, DROPOUT)
        back = norm_backward(forward, inputs, grad, grad_low, DROPOUT, OUT_DROPOUT)
        wide = torch.cat([inputs["x"]] * 6, dim=1)
        return [*forward, *back, *cpu.activation_backward(wide, wide, "gelu"), cpu.dropout_forward(grad, DROPOUT)]

    torch.set_num_threads(1)
    expected = run()
    torch.set_num_threads(threads)
    assert_same_bits(run(), expected)


def test_nan_reaches_the_gradients(pair, variant):
    """Catches a NaN that is lost, so that a step with a broken loss looks like a good one."""
    inputs, (grad, grad_low, _) = norm_inputs(40, 48, *pair), norm_grads(40, 48, *pair)
    grad[35, 3] = float("nan")
    back = norm_backward(norm_forward(inputs), inputs, grad, grad_low)
    assert back.grad_x[35].isnan().all() and back.grad_x[:35].isfinite().all()
    assert back.grad_ln_bias.isnan().sum() == 1 and back.grad_bias.isnan().all()


def test_what_the_kernels_do_not_take():
    """Catches memory that is overwritten by rows that are too wide, and dtypes that are read as another."""
    if cpu.obstacle() is not None:
        pytest.skip(str(cpu.obstacle()))
    wide = norm_inputs(2, cpu.MAX_HIDDEN + 1, F32, F32)
    with pytest.raises(ValueError, match="H: expected at most 4096, got 4097"):
        norm_forward(wide)
    for dtypes in ((F32, BF16), (torch.float16, F32), (torch.float64, torch.float64)):
        with pytest.raises(TypeError, match="residual_norm: expected float32, bfloat16, or"):
            norm_forward(norm_inputs(2, 16, *dtypes))
