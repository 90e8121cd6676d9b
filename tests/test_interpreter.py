"""What is mended in Triton's interpreter is what the hardware does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbert_kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="Triton's interpreter is off: kernels are compiled here")


def test_bfloat16_rounding():
    """Truncation, or ties that do not go to even: PyTorch's conversion is the yardstick."""
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
    """A bfloat16 that changes when it becomes float32."""
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16).float()
    assert torch.equal(torch.from_numpy(interpreter._to_float32(bits)).view(torch.int32), expected.view(torch.int32))
