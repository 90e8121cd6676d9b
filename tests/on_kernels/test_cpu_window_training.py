"""Attention within a window has exact gradients in C++, whose time grows with the window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbert.ops import packing
from fastbert.ops.training import choose
from fastbert.ops.training.kernels import Attention
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout, threshold_of
from gradient_cases import assert_gradient
from helpers import assert_as_accurate, guarded
from model_cases import randn
from window_cases import gradients_within, holes

FP32, BF16 = torch.float32, torch.bfloat16
DROPOUT = Dropout(threshold_of(0.2), 0x0123456789ABCDEF, 8)
LENGTHS = [1, 0, 7, 63, 64, 65, 66, 129, 200]

pytestmark = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))


def both_passes(
    qkv: Tensor,
    grad: Tensor,
    lengths: list[int],
    window: int,
    columns: Tensor | None = None,
    dropout: Dropout | None = None,
    num_heads: int = 2,
) -> tuple[Tensor, Tensor]:
    """The result and the gradient of qkv; what is read lies between guard bands."""
    batch = packing.from_lengths(lengths, "cpu")
    settings = Attention(batch, num_heads, (qkv.shape[1] / 3 / num_heads) ** -0.5, dropout, columns, window)
    qkv, grad = guarded(qkv, extra_columns=8), guarded(grad, extra_columns=8)
    out, lse = choose.CPU.attention_forward(qkv, settings)
    return out, choose.CPU.attention_backward(grad, qkv, out, lse, settings)[0]


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["all kept", "dropout"])
@pytest.mark.parametrize("with_holes", [False, True], ids=["no holes", "holes"])
@pytest.mark.parametrize("window", [0, 3, 64, 500])
@pytest.mark.parametrize(("dtype", "size"), [(FP32, 16), (FP32, 48), (BF16, 64)], ids=str)
def test_gradients(dtype: torch.dtype, size: int, window: int, with_holes: bool, dropout: Dropout | None) -> None:
    """Catches a key at the edge of the window, or of a text, whose gradient is lost or made of a row too far away."""
    if not cpu.multiplies(dtype):
        pytest.skip(f"the C++ kernels do not multiply {dtype} here")
    compare(dtype, size, LENGTHS, window, with_holes, dropout)


@pytest.mark.parametrize("window", [5, 64, 300, 599])
def test_texts_of_several_blocks(window: int) -> None:
    """Catches a block of keys or queries in reach that is passed over, and sums that begin or end at another block."""
    compare(FP32, 16, [600, 3, 1301], window, False, DROPOUT)
    compare(FP32, 16, [1301], window, True, None)


def compare(
    dtype: torch.dtype, size: int, lengths: list[int], window: int, with_holes: bool, dropout: Dropout | None
) -> None:
    qkv, grad = (randn(sum(lengths), n * 2 * size, seed=n).to(dtype) for n in (3, 1))
    columns = holes(lengths) if with_holes else None
    ours = both_passes(qkv, grad, lengths, window, columns, dropout)
    eager, exact = (
        gradients_within(x, g, lengths, 2, window, columns, dropout)
        for x, g in ((qkv, grad), (qkv.double(), grad.double()))
    )
    assert_as_accurate("out", ours[0], eager[0], exact[0])
    parts = [x[1].split(2 * size, 1) for x in (ours, eager, exact)]
    for name, our_part, eager_part, exact_part in zip("qkv", *parts, strict=True):
        assert_gradient(f"gradient of {name}", our_part, eager_part, exact_part, dtype)


def test_far_keys_are_not_visited() -> None:
    """Catches keys or queries beyond the window that a pass reads: some are NaN, and 0 times NaN would show."""
    qkv, grad = randn(8192, 3 * 16).to(FP32), randn(8192, 16, seed=1).to(FP32)
    qkv[4000:4010] = float("nan")
    out, grad_qkv = both_passes(qkv, grad, [8192], 64, num_heads=1)
    for rows in (out, grad_qkv):
        assert rows[:3500].isfinite().all() and rows[4510:].isfinite().all()
    assert grad_qkv[4000:4010].isnan().all()


def test_bits_do_not_depend_on_threads(number_of_threads: None) -> None:
    """Catches a sum whose order depends on how many threads share a text."""
    qkv, grad = randn(1400, 3 * 32).to(FP32), randn(1400, 32, seed=1).to(FP32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(both_passes(qkv, grad, [1390, 10], 40, None, DROPOUT))
    assert all(map(torch.equal, *found))
