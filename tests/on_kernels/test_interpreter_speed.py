"""What makes the interpreter quicker leaves its language and its numbers as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language import core

from fastbert_kernels import interpreter

OF_3_6 = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="other Tritons have another text")
pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="Triton compiles here, and does not interpret")


@triton.jit
def _shifted(x):
    return tl.where(x > 2, x - 2, x)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, n_cols, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n_cols, other=0.0)
    rows = x[:, None] * tl.full((BLOCK, 4), 2.0, tl.float32)
    tl.store(out_ptr + cols, tl.sum(_shifted(rows), axis=1), mask=cols < n_cols)


@OF_3_6
def test_every_change_fits_the_triton_of_the_tests() -> None:
    """Catches a Triton whose text has changed, so that the tests take twice as long."""
    assert len(interpreter.QUICKENED) == 8 and all(interpreter.QUICKENED.values()), interpreter.QUICKENED


@pytest.mark.parametrize("n_cols", [1, 5, 8])
def test_numbers_of_a_kernel_that_calls_a_function(n_cols: int) -> None:
    """Catches a called function whose operations are not replaced, and a language that stays replaced."""
    x = torch.linspace(-3, 3, 8)[:n_cols].contiguous()
    for _ in range(2):
        out = torch.full((n_cols,), torch.nan)
        _sum_kernel[(1,)](x, out, n_cols, BLOCK=8)
        doubled = 2 * x
        torch.testing.assert_close(out, 4 * torch.where(doubled > 2, doubled - 2, doubled), rtol=1e-6, atol=0)
        for part in (tl.load, tl.arange, tl.tensor.__add__, tl.math.exp2):
            assert core.is_builtin(part)


@triton.jit
def _integers_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr):
    offsets = tl.arange(0, 4)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(out_ptr + offsets, out)


@pytest.mark.parametrize(("operation", "x", "y"), [("add", 2**31 - 1, 5), ("sub", -(2**31), 1), ("mul", 2**16, 2**17)])
def test_integers_wrap_around(operation: str, x: int, y: int) -> None:
    """Catches sums and products of integers that are refused, or computed in other widths: Philox needs them."""
    left, right = (torch.tensor([1, 2, 3, number], dtype=torch.int32) for number in (x, y))
    out = torch.zeros(4, dtype=torch.int32)
    _integers_kernel[(1,)](left, right, out, OPERATION=operation)
    assert torch.equal(out, getattr(torch, operation)(left, right))


@OF_3_6
def test_names_and_types_of_tuples() -> None:
    """Catches a type that is made once and kept after its tuple has changed, or a name that differs."""
    pair = core.tuple([core.constexpr(1), core.constexpr(2)])
    assert str(pair.type) == "[:constexpr_type[1],:constexpr_type[2]]" and pair.type == pair.type
    pair._setitem(0, core.constexpr(7))
    assert str(pair.type) == "[:constexpr_type[7],:constexpr_type[2]]"
    named = core.tuple([tl.int32], core.tuple_type([tl.int32], ["rows"]))
    assert named.type.name == "[rows:int32]" and named.rows is tl.int32
    assert core.tuple([tl.int32], [tl.int64]).type.types == [tl.int64]


def test_equality_of_tuples_and_types() -> None:
    """Catches tuples of constants, of types or of another length that compare otherwise than before."""
    ones, mixed = core.tuple([1, 2]), core.tuple([core.constexpr(1), 2])
    assert ones == [1, 2] and ones == (1, 2) and ones == core.tuple([1, 2]) and ones == mixed
    assert all(ones != other for other in ([1, 3], [1, 2, 3], []))
    assert tl.int32 == core.constexpr(tl.int32) and tl.int32 != tl.int64 and tl.int32 != "int32"
    assert tl.pointer_type(tl.int32) != tl.int32 and tl.block_type(tl.int32, [4]) != tl.int32
    assert hash(tl.int32) == hash(tl.dtype("int32")) and tl.dtype("int32") == tl.int32


def test_shapes() -> None:
    """Catches a shape that is shared with another one, or that is taken without a check."""
    block = tl.block_type(tl.float32, [core.constexpr(4), 8])
    again = tl.block_type(tl.int32, [4, 8])
    assert list(block.shape) == list(again.shape) == [4, 8] and block.numel == again.numel == 32
    assert block != again and block == tl.block_type(tl.float32, (4, 8))
    assert block.name == str(block) == f"<{block.shape}, fp32>"
    tensor = tl.tensor(None, block)
    assert [size.value for size in tensor.shape] == [4, 8] and tensor.numel.value == 32 and tensor.dtype == tl.float32
    scalar = tl.tensor(None, tl.float32)
    assert len(scalar.shape) == 0 and scalar.numel.value == 1 and scalar.type == tl.float32
    for shape, error in (([], TypeError), ([3], ValueError), ([4.0], TypeError), ([2**21], ValueError)):
        for _ in range(2):
            with pytest.raises(error):
                tl.block_type(tl.float32, shape)


def test_types_of_numpy() -> None:
    """Catches a dtype of numpy that is kept for another one of Triton's."""
    from triton.runtime.interpreter import _get_np_dtype

    expected = {
        tl.int1: bool,
        tl.bfloat16: np.uint16,
        tl.float16: np.float16,
        tl.float8e4nv: np.uint8,
        tl.int64: np.int64,
    }
    for dtype, kind in expected.items():
        for _ in range(2):
            assert _get_np_dtype(dtype) == _get_np_dtype(tl.block_type(dtype, [2])) == np.dtype(kind)
            assert _get_np_dtype(tl.pointer_type(dtype)) == np.dtype(np.uint64)
    with pytest.raises(KeyError):
        _get_np_dtype(tl.void)
