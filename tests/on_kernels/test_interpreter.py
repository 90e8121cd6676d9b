"""What we mend in Triton's interpreter does what the hardware does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbert_kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="Triton's interpreter is off: kernels are compiled here")


def test_bfloat16_rounding():
    """Catches truncation, or ties that do not go to even as in PyTorch's conversion."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 2**32, 2**15, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.4e38, 1e-45, -1e-40]).view(torch.int32)
    x = torch.cat([bits, ties, special]).view(torch.float32)
    ours = torch.from_numpy(interpreter._to_bfloat16(x.numpy()).astype(np.int32))
    expected = x.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    nan = x.isnan()
    assert torch.equal(ours[~nan], expected[~nan])
    assert torch.from_numpy(interpreter._to_float32(ours[nan].numpy().astype(np.uint16))).isnan().all()


def test_bfloat16_widening():
    """Catches a bfloat16 that changes when it becomes float32."""
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16).float()
    assert torch.equal(torch.from_numpy(interpreter._to_float32(bits)).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", [(64, 16, 128), (128, 32, 16)], ids=str)
def test_dot_sums_every_row_alike(shape, dtype):
    """Catches a row of a product whose bits depend on its place in the tile, which on tensor cores they do not."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    (m, k, n), kind = shape, {np.float32: tl.float32, np.float16: tl.float16}[dtype]
    rng = np.random.default_rng(0)
    a, b, acc = (rng.standard_normal(size).astype(t) for size, t in (((m, k), dtype), ((k, n), dtype), ((m, n), "f4")))
    order = rng.permutation(m)

    def dot(rows):
        handles = TensorHandle(a[rows], kind), TensorHandle(b, kind), TensorHandle(acc[rows], tl.float32)
        return InterpreterBuilder().create_dot(*handles, None, 0).data

    out = dot(np.arange(m))
    assert (dot(order) == out[order]).all()
    expected = a.astype(np.float64) @ b.astype(np.float64) + acc
    assert np.abs(out - expected).max() < 1e-5 and out.dtype == np.float32
