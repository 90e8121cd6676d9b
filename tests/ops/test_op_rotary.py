"""Rotary positions, gated activations and windows of attention give what their formulas give, on PyTorch and in C++."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import packing
from fastbert.ops.dispatch import Policy
from fastbert.ops.window import attend_in_blocks
from fastbert.reference import rotary as reference
from fastbert_kernels import cpu
from helpers import assert_as_accurate
from model_cases import assert_close, randn
from window_cases import holes, within

COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
CPU = Policy("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LENGTHS = [1, 0, 7, 8, 192, 193, 450]


def turned(qkv: Tensor, positions: Tensor, num_heads: int, base: float = 100.0) -> Tensor:
    """The reference's rotation of packed rows."""
    size = qkv.shape[1] // (3 * num_heads)
    parts = qkv.unflatten(1, (3, num_heads, size)).permute(1, 2, 0, 3)[:, None]  # (3, 1, N, T, D)
    frequencies = reference.inverse_frequencies(size, base)
    q, k = (reference.rotate(part, positions[None], frequencies) for part in parts[:2])
    return torch.stack([q, k, parts[2]])[:, 0].permute(2, 0, 1, 3).flatten(1)


@pytest.mark.parametrize(("num_heads", "size"), [(1, 2), (3, 16), (2, 26), (12, 64)])
def test_rotary_in_float64(num_heads: int, size: int) -> None:
    """Catches another pair of elements, a rotation the other way, or a value that turns; and its gradient."""
    qkv, positions = randn(11, 3 * num_heads * size).requires_grad_(), torch.arange(11).flip(0) * 700
    out = ops.rotary(qkv, *ops.rotations(positions, size, 100.0), num_heads, policy=CPU)
    expected = turned(qkv, positions, num_heads)
    assert_close("rotary", out, expected)
    weights = randn(*out.shape, seed=1)
    ours, other = (torch.autograd.grad(y, qkv, weights)[0] for y in (out, expected))
    assert_close("gradient", ours, other)


@COMPILED
@DTYPES
@pytest.mark.parametrize(("num_heads", "size"), [(3, 16), (2, 26), (12, 64)])
def test_rotary_in_cpp(num_heads: int, size: int, dtype: torch.dtype) -> None:
    """Catches lanes that are left out, and rows with a stride that are read as if they had none."""
    qkv, positions = randn(37, 3 * num_heads * size + 5).to(dtype)[:, :-5], torch.arange(37) * 90
    tables = ops.rotations(positions, size, 100.0)
    ours, eager = ops.rotary(qkv, *tables, num_heads, policy=CPU), turned(qkv, positions, num_heads)
    assert_as_accurate("rotary", ours, eager, turned(qkv.double(), positions, num_heads))
    alone = ops.rotary(qkv[5:6], *(table[5:6] for table in tables), num_heads, policy=CPU)
    assert torch.equal(alone, ours[5:6])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("width", [1, 16, 37, 1152])
def test_gated(activation: str, width: int) -> None:
    """Catches the two halves in each other's place, and lanes that are left out."""
    functions = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}
    x = randn(9, 2 * width)
    first, second = x.chunk(2, -1)
    expected = functions[activation](first) * second
    assert_close("gated", ops.gated(x, activation, policy=CPU), expected)
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        first, second = low.chunk(2, -1)
        first64, second64 = low.double().chunk(2, -1)
        exact = functions[activation](first64) * second64
        ours = ops.gated(low, activation, policy=CPU)
        assert_as_accurate(activation, ours, functions[activation](first) * second, exact)
        assert torch.equal(ops.gated(low[4:5], activation, policy=Policy("cpu", batch_invariant=True)), ours[4:5])


@pytest.mark.parametrize("window", [0, 1, 7, 64, 100, 500])
@pytest.mark.parametrize("with_holes", [False, True])
def test_window_in_float64(window: int, with_holes: bool) -> None:
    """Catches a block of queries that misses a key in reach or sees one beyond; and its gradient."""
    qkv = randn(sum(LENGTHS), 3 * 2 * 16).requires_grad_()
    batch = packing.from_lengths(LENGTHS, torch.device("cpu"))
    batch.columns = holes(LENGTHS) if with_holes else None
    out = ops.varlen_attention(qkv, batch, 2, window=window, policy=CPU)
    if window == 500 and with_holes:  # columns say what is in reach, not the number of tokens
        batch.padded_length = 2000
        out = ops.varlen_attention(qkv, batch, 2, window=window, policy=CPU)
    expected = within(qkv, LENGTHS, 2, window, batch.columns)
    assert_close("window", out, expected)
    weights = randn(*out.shape, seed=1)
    ours, other = (torch.autograd.grad(y, qkv, weights)[0] for y in (out, expected))
    assert_close("gradient", ours, other, 1e-9)


@COMPILED
@DTYPES
@pytest.mark.parametrize("window", [0, 1, 7, 64, 100, 400])
@pytest.mark.parametrize("with_holes", [False, True])
def test_window_in_cpp(window: int, with_holes: bool, dtype: torch.dtype) -> None:
    """Catches keys packed for a block of queries that are too few, and a text whose bits depend on the others."""
    qkv = randn(sum(LENGTHS), 3 * 2 * 16).to(dtype)
    batch = packing.from_lengths(LENGTHS, torch.device("cpu"))
    batch.columns = holes(LENGTHS) if with_holes else None
    policy = Policy("cpu", batch_invariant=True)
    ours = ops.varlen_attention(qkv, batch, 2, window=window, policy=policy)
    eager, exact = (within(x, LENGTHS, 2, window, batch.columns) for x in (qkv, qkv.double()))
    assert_as_accurate("window", ours, eager, exact)
    start, length = sum(LENGTHS[:5]), LENGTHS[5]
    alone = packing.from_lengths([length], torch.device("cpu"))
    alone.columns = None if batch.columns is None else batch.columns[start : start + length].contiguous()
    part = ops.varlen_attention(qkv[start : start + length], alone, 2, window=window, policy=policy)
    assert torch.equal(part, ours[start : start + length])


def test_window_with_dropout() -> None:
    """Catches probabilities that are not dropped, or are not scaled for it."""
    q, k = (torch.zeros(1, 1, 300, 16, dtype=torch.float64) for _ in range(2))
    v = torch.ones(1, 1, 300, 16, dtype=torch.float64)
    torch.manual_seed(0)
    out = attend_in_blocks(q, k, v, torch.arange(300)[None], 20, None, 0.25)
    assert abs(out.mean() - 1) < 0.02 and out.std() > 0.02


def test_shapes_are_checked() -> None:
    """Catches tables of other rows or heads of an odd size that are read beyond their end."""
    cos, sin = ops.rotations(torch.arange(4), 16, 100.0)
    with pytest.raises(ValueError, match="qkv: expected shape"):
        ops.rotary(randn(4, 3 * 2 * 15), cos, sin, 2)
    with pytest.raises(ValueError, match="cos: expected shape"):
        ops.rotary(randn(5, 3 * 2 * 16), cos, sin, 2)
    with pytest.raises(ValueError, match="x: expected shape"):
        ops.gated(randn(4, 7))
