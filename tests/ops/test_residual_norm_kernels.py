"""Dropout + residual + LayerNorm for training is right in the kernels, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert_kernels import configs, layer_norm_backward
from fastbert_kernels.dropout_rows import dropout_forward
from fastbert_kernels.layer_norm import residual_norm_forward
from fastbert_kernels.layer_norm_backward import residual_norm_backward
from gradient_cases import (
    BF16,
    FP16,
    FP32,
    NEARLY_CONSTANT,
    PAIR_NAMES,
    PAIRS,
    assert_gradient,
    assert_norm_gradients_bounded,
    assert_same_bits,
    dropout,
    kept,
    leaves,
)
from helpers import assert_as_accurate, guarded, rms_error

EPS = 1e-12
NAMES = "x", "bias", "residual", "weight", "ln_bias"


def inputs(n_rows, hidden_size, c, s, device, bias=True, residual=True):
    """x, bias, residual, weight, ln_bias, and the gradients of both outputs."""
    x, r, grad, grad_low = (torch.randn(n_rows, hidden_size).to(device) for _ in range(4))
    b, weight, ln_bias = (torch.randn(hidden_size).to(device, s) for _ in range(3))
    tensors = [x.to(c), b if bias else None, r.to(s) if residual else None, weight, ln_bias]
    return tensors, grad.to(s), grad_low.to(c) if c != s else None


def plain(tensors, mask, out_mask, c):
    """PyTorch's operations: with c they run in that dtype up to the sum, as under autocast. Returns y and y_low."""
    x, bias, residual, weight, ln_bias = tensors
    x = x if bias is None else x + bias.to(c)
    x = x * mask.to(c)
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, ln_bias, EPS) * out_mask.to(weight.dtype)
    return y, y.to(c)


def plain_gradients(tensors, grad, grad_low, mask, out_mask, c):
    y, y_low = plain(tensors, mask, out_mask, c)
    loss = (y * grad.to(y.dtype)).sum() + (0 if grad_low is None else (y_low * grad_low.to(c)).sum())
    wanted = [t for t in tensors if t is not None]
    return dict(zip([n for n, t in zip(NAMES, tensors, strict=True) if t is not None],
                    torch.autograd.grad(loss, wanted), strict=True))  # fmt: skip


def ours(tensors, grad, grad_low, drop, out_drop=None, wrap=lambda t: t):
    """The outputs of the forward kernel, and the gradients by name."""
    x, bias, residual, weight, ln_bias = (None if t is None else wrap(t) for t in tensors)
    y, y_low, total, mean, rstd = residual_norm_forward(x, bias, residual, weight, ln_bias, EPS, drop, True)
    grads = residual_norm_backward(
        wrap(grad), None if grad_low is None else wrap(grad_low), guarded(total), guarded(mean), guarded(rstd), weight,
        drop, out_drop, residual is not None,
    )  # fmt: skip
    return (y, y_low, total, mean, rstd), dict(zip(("x", "residual", "weight", "ln_bias", "bias"), grads, strict=True))


def check(name, tensors, grad, grad_low, drop, c, wrap=lambda t: t, out_drop=None):
    x = tensors[0]
    mask, out_mask = (kept(*x.shape, d, x.device) for d in (drop, out_drop))
    (y, y_low, total, _, _), grads = ours(tensors, grad, grad_low, drop, out_drop, wrap)
    exact = leaves(tensors, torch.float64)
    expected, _ = plain(exact, mask, torch.ones_like(mask), torch.float64)
    eager, eager_low = plain(tensors, mask, torch.ones_like(mask), c)
    assert_as_accurate(f"{name} y", y, eager, expected)
    if y_low is not None:
        assert_as_accurate(f"{name} y_low", y_low, eager_low, expected)
        assert torch.equal(y_low, y.to(c))
    assert total.dtype == c
    exact = plain_gradients(exact, grad.double(), None if grad_low is None else grad_low.double(), mask, out_mask,
                            torch.float64)  # fmt: skip
    eager = plain_gradients(leaves(tensors), grad, grad_low, mask, out_mask, c)
    for which in exact:
        assert_gradient(f"{name} {which}", grads[which], eager[which], exact[which], c)
    assert grads["x"].dtype == c and all(grads[n].dtype == FP32 for n in ("weight", "ln_bias", "bias"))
    assert grads["residual"] is None or grads["residual"].dtype == grad.dtype


def guard(t):
    return guarded(t, extra_columns=3)


@pytest.mark.parametrize(("c", "s"), PAIRS, ids=PAIR_NAMES)
@pytest.mark.parametrize("drop", [None, dropout()], ids=["plain", "dropout"])
def test_kernels(c, s, drop, device, poisoned):
    """Catches a wrong term of a gradient, another mask in the backward pass, or a sum in 16 bits."""
    tensors, grad, grad_low = inputs(37, 96, c, s, device)
    check("T37", tensors, grad, grad_low, drop, c, guard)
    poisoned.check()


@pytest.mark.parametrize("hidden_size", [3, 33, 320, 1023, 2048, 4096])
def test_hidden_sizes(hidden_size, device, poisoned):
    """Catches a tail of a row that enters a mean, a sum or a mask, or that is not written."""
    for c, s in ((FP32, FP32), (BF16, FP32)):
        tensors, grad, grad_low = inputs(5 if hidden_size < 2000 else 2, hidden_size, c, s, device)
        check(f"H{hidden_size}", tensors, grad, grad_low, dropout(), c, guard)
    poisoned.check()


def test_one_column(device, poisoned):
    """Catches a gradient of a row that is always normalised to 0."""
    tensors, grad, _ = inputs(5, 1, FP32, FP32, device)
    _, grads = ours(tensors, grad, None, dropout(), wrap=guard)
    assert not any(grads[name].any() for name in ("x", "residual", "weight", "bias"))
    poisoned.check()


@pytest.mark.parametrize("n_rows", [0, 1, 2, 300])
@pytest.mark.parametrize(("bias", "residual"), [(True, True), (True, False), (False, True), (False, False)])
def test_rows_and_optional_inputs(n_rows, bias, residual, device, poisoned, monkeypatch):
    """Catches a share of the rows left out or counted twice, or a bias or residual that is read though absent."""
    monkeypatch.setattr(layer_norm_backward, "MAX_PROGRAMS", 3)
    tensors, grad, _ = inputs(n_rows, 48, FP32, FP32, device, bias, residual)
    check(f"T{n_rows}", tensors, grad, None, dropout(), FP32, guard)
    poisoned.check()


@pytest.mark.parametrize(("c", "s"), PAIRS, ids=PAIR_NAMES)
@pytest.mark.parametrize(("value", "noise"), NEARLY_CONSTANT)
def test_rows_that_are_nearly_constant(value, noise, c, s, device):
    """Catches gradients that explode because the sum was rounded by many times its deviation."""
    (x, _, residual, weight, ln_bias), grad, _ = inputs(20, 128, c, s, device)
    residual = (value + noise * torch.randn(20, 128, device=device)).to(s)
    (*_, rstd), grads = ours((torch.zeros_like(x), None, residual, weight, ln_bias), grad, None, None)
    assert_norm_gradients_bounded([grads["x"], grads["residual"]], grads["weight"], grad, weight, rstd)


def test_no_rows_give_zeros(device, poisoned):
    """Catches sums over no tokens that are whatever lay in memory."""
    tensors, grad, grad_low = inputs(0, 48, BF16, FP32, device)
    outputs, grads = ours(tensors, grad, grad_low, dropout())
    assert [tuple(t.shape) for t in outputs] == [(0, 48)] * 3 + [(0,)] * 2
    assert grads["x"].shape == grads["residual"].shape == (0, 48)
    assert all(torch.equal(grads[name], torch.zeros(48, device=device)) for name in ("weight", "ln_bias", "bias"))


@pytest.mark.parametrize(("c", "s"), PAIRS, ids=PAIR_NAMES)
def test_dropout_of_the_output(c, s, device, poisoned):
    """Catches a mask of the output that misses the second gradient, or the sums of the vectors."""
    tensors, grad, grad_low = inputs(21, 40, c, s, device, bias=False)
    for drop in (None, dropout(9)):
        check("out", tensors, grad, grad_low, drop, c, guard, out_drop=dropout(3, 0.5))
    poisoned.check()


def test_the_residual_shares_its_gradient_where_it_may(device):
    """Catches a gradient that is written twice, or one tensor for two that differ."""
    for c, drop, shared in ((FP32, None, True), (FP32, dropout(), False), (BF16, None, False)):
        tensors, grad, grad_low = inputs(4, 32, c, FP32, device)
        _, grads = ours(tensors, grad, grad_low, drop)
        assert (grads["x"] is grads["residual"]) is shared
    saved = residual_norm_forward(*tensors, EPS, None, False)
    assert saved[1] is None
    for wide in (grad, grad.to(BF16)):
        grad_x, grad_residual, *_ = residual_norm_backward(
            wide, None, *saved[2:], tensors[3], None, None, want_residual=True, want_x=False
        )
        assert grad_x is None and grad_residual.dtype == wide.dtype
        assert rms_error(grad_residual, grads["residual"]) < 2  # What it is, the other tests say.


@pytest.mark.parametrize("hidden_size", [7, 64, 200])
def test_masks(hidden_size, device, monkeypatch):
    """Catches a mask that is not the one of fastbert.ops.dropout, in either pass or in tiles of another height."""
    drop, n_rows = dropout(p=0.4), 23
    expected = kept(n_rows, hidden_size, drop, device) > 0
    ones, zeros = torch.ones(n_rows, hidden_size, device=device), torch.zeros(n_rows, hidden_size, device=device)
    vector, grad = torch.ones(hidden_size, device=device), torch.randn(n_rows, hidden_size, device=device)
    results = []
    for block_rows in (None, 1, 8):
        if block_rows is not None:
            config = {**configs.rowwise_config(256), "BLOCK_ROWS": block_rows, "BLOCK_COLS": 256}
            monkeypatch.setattr(configs, "rowwise_config", lambda n, config=config: config)
        y, _, total, mean, rstd = residual_norm_forward(ones, None, zeros, vector, vector, EPS, drop, False)
        grad_x, grad_residual, *_ = residual_norm_backward(
            grad, None, total, mean, rstd, vector, drop, None, want_residual=True
        )
        assert torch.equal(total != 0, expected) and torch.equal(
            total[expected].unique().cpu(), torch.tensor([drop.scale])
        )
        assert torch.equal(grad_x != 0, expected & (grad_residual != 0))
        results.append((y, total, grad_x, grad_residual))
    for others in results[1:]:
        assert_same_bits(others[1:], results[0][1:])


@pytest.mark.parametrize("p", [1 / 65536, 1.0])
def test_extreme_probabilities(p, device):
    """Catches an infinite scale where all is dropped, or NaN out of it."""
    tensors, grad, _ = inputs(9, 64, FP32, FP32, device)
    (_, _, total, _, _), grads = ours(tensors, grad, None, dropout(p=p))
    if p == 1.0:
        assert torch.equal(total, tensors[2]) and not grads["x"].any() and not grads["bias"].any()
    check("p", tensors, grad, None, dropout(p=p), FP32)


@pytest.mark.parametrize(("c", "s"), [(FP32, FP32), (BF16, FP32)])
def test_same_bits_twice(c, s, device):
    """Catches a sum whose order changes from run to run."""
    tensors, grad, grad_low = inputs(300, 33, c, s, device)
    runs = [ours(tensors, grad, grad_low, dropout()) for _ in range(2)]
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_bits(list(runs[0][1].values()), list(runs[1][1].values()))


def test_without_dropout_the_output_is_that_of_inference(device):
    """Catches training that normalises in another way than inference."""
    from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward

    tensors, _, _ = inputs(13, 96, BF16, BF16, device)
    assert torch.equal(
        residual_norm_forward(*tensors, EPS, None, True)[0], bias_residual_layer_norm_forward(*tensors, EPS)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("n_rows", "hidden_size"), [(0, 8), (1, 1), (9, 33), (5, 2056)])
def test_dropout_of_rows(n_rows, hidden_size, dtype, device, poisoned):
    """Catches a mask of a block of columns that begins again at column 0, or an edge left out."""
    x, drop = torch.randn(n_rows, hidden_size).to(device, dtype), dropout(p=0.4)
    out, mask = dropout_forward(guarded(x, extra_columns=3), drop), kept(n_rows, hidden_size, drop, device)
    assert torch.equal(out != 0, (mask > 0) & (x != 0))
    assert_as_accurate("rows", out, x * mask.to(dtype), x.double() * mask)
    poisoned.check()
