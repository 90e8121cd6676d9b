"""Kernels with specialised warps are right on a GPU. They come last there: one that is wrong may not end."""

from __future__ import annotations

import pytest
import torch
from test_op_linear_persistent import check, inputs
from test_op_quantized import operands
from test_op_quantized_persistent import arguments

from fastbert_kernels import launch
from fastbert_kernels.linear_specialized import linear_specialized_forward
from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
from fastbert_kernels.quantized_linear_specialized import quantized_linear_specialized_forward
from helpers import rms_error


@pytest.fixture(autouse=True)
def _hopper(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warps are specialised on compute capability 9.0 alone")


@pytest.mark.gpu
@pytest.mark.parametrize(("cols", "stages", "activation"), [(128, 4, "none"), (128, 4, "gelu"), (256, 3, "gelu")])
def test_linear(cols, stages, activation):
    """Catches copies that overrun their buffers, a group of warps with the rows of the other, or a stale stage."""
    tile = {"BLOCK_ROWS": 128, "BLOCK_COLS": cols, "BLOCK_K": 64, "GROUP_ROWS": 8, "num_warps": 4, "num_stages": stages}
    for n_rows, k, n_cols in ((1, 768, 768), (5000, 768, 3072), (3001, 1032, 1016)):
        x, weight, bias, residual = inputs(n_rows, k, n_cols, torch.bfloat16, "cuda")
        out = torch.full_like(residual, float("nan"))
        residual = residual if activation == "none" else None
        linear_specialized_forward(x, weight, bias, activation, residual, tile, out)
        check("sm_90", x, weight, bias, None if activation == "none" else activation, residual, out)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_8_bits(precision):
    """Catches another sum than the persistent kernel's, step by step the same."""
    sizes = {"BLOCK_ROWS": 128, "BLOCK_COLS": 128, "GROUP_ROWS": 8}
    outside = precision == "fp8" and launch.arch(torch.device("cuda")) <= launch.LAST_ARCH_WITH_SHORT_FLOAT8_SUMS
    for n_rows, k, n_cols, group in ((1, 768, 768, 64), (5000, 768, 3072, None), (2000, 3072, 768, 128)):
        x, weight, bias = operands(n_rows, k, n_cols, group, precision, torch.device("cuda"))
        results = []
        for forward, warps in ((quantized_linear_persistent_forward, 8), (quantized_linear_specialized_forward, 4)):
            tile = {**sizes, "BLOCK_K": group or 128, "num_warps": warps, "num_stages": 3}
            out = torch.full((n_rows, n_cols), float("nan"), device="cuda")
            results.append(forward(*arguments(x, weight, bias, "gelu"), tile, out, None, outside))
        assert rms_error(results[1], results[0]) < 1e-6
