"""Fixtures of the tests of C++ kernels."""

from __future__ import annotations

import pytest
import torch

from fastbert_kernels import cpu
from helpers import Outputs
from row_cases import PAIRS


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """Outputs and scratch of C++ kernels full of NaN, between guard bands."""
    buffers = Outputs()
    monkeypatch.setattr(cpu.library, "empty", buffers.empty)
    return buffers


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    """C and S, the dtypes of products and of the residual stream."""
    return PAIRS[request.param]
