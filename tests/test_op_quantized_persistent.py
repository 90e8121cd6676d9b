"""The persistent 8-bit GEMM on tensor descriptors, and when quantized_linear_forward takes it."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import quantized as Q
from fastbert_kernels import launch
from fastbert_kernels.quantized_linear import quantized_linear_forward, quantized_linear_pointer_forward
from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
from helpers import assert_as_accurate, guarded, rms_error
from test_op_quantized import PRECISIONS, TORCH, assert_same_8_bit, exact_product, operands

TILE = {"BLOCK_ROWS": 32, "BLOCK_COLS": 32, "BLOCK_K": 32, "GROUP_ROWS": 2, "num_warps": 4, "num_stages": 2}
WIDE = {**TILE, "BLOCK_COLS": 256}  # worked on in two parts
ONE_PART = {**TILE, "BLOCK_COLS": 128}
SHAPES = [  # T, K, M, group
    (1, 32, 112, None),
    (5, 48, 144, None),
    (70, 96, 272, None),
    (33, 80, 48, 32),
    (33, 192, 400, 64),
]


@pytest.fixture(autouse=True)
def _descriptors(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")


def arguments(x, weight, bias, activation="none"):
    return x.data, x.scale, x.group, weight.data, weight.scale.flatten(), bias, activation


def persistent(x, weight, bias, activation, dtype, tile, sum_outside):
    out = launch.empty((x.data.shape[0], weight.data.shape[0]), like=x.data, dtype=dtype)
    config = {**tile, "WARP_SPECIALIZE": 0}
    given = arguments(x, weight, bias, activation)
    return quantized_linear_persistent_forward(*given, config, out, None, sum_outside)


def by_pointers(x, weight, bias, activation, dtype, tile, sum_outside):
    out = launch.empty((x.data.shape[0], weight.data.shape[0]), like=x.data, dtype=dtype)
    return quantized_linear_pointer_forward(*arguments(x, weight, bias, activation), tile, out, None, sum_outside)


def guard(q):
    """The same operand between bands of other values, which a read past an edge would see."""
    data = torch.full((q.data.shape[0] + 2, q.data.shape[1]), 99, device=q.data.device).to(q.data.dtype)
    data[1:-1] = q.data
    scale = torch.full((q.scale.shape[0] + 2, q.scale.shape[1]), float("nan"), device=q.scale.device)
    scale[1:-1] = q.scale
    return q._replace(data=data[1:-1], scale=scale[1:-1])


@pytest.mark.parametrize(("activation", "with_bias"), [("none", True), ("gelu", True), ("gelu_tanh", False)])
@pytest.mark.parametrize("tile", [TILE, WIDE], ids=["one part", "two parts"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_rows", "k", "n_cols", "group"), SHAPES)
def test_kernel(n_rows, k, n_cols, group, precision, tile, activation, with_bias, device, poisoned):
    """A scale of another group or step, a tail of K, an edge of a descriptor, or a part of a tile that is left out."""
    x, weight, bias = operands(n_rows, k, n_cols, group, precision, device)
    bias = bias if with_bias else torch.zeros_like(bias)
    given = guard(x), guard(weight), guarded(bias) if with_bias else None
    expected = exact_product(x, weight, bias, activation)
    for dtype in (torch.float32, torch.bfloat16):
        for sum_outside in {precision == "fp8", False}:
            ours = persistent(*given, activation, dtype, tile, sum_outside)
            if precision == "fp8" and device.type == "cuda":  # Hopper's tensor cores keep 14 bits of a sum
                assert rms_error(ours, expected) <= 2**-12 + 0.5 * torch.finfo(dtype).eps
            else:
                twin = Q.linear(x, weight, bias, dtype, activation, policy=TORCH)
                assert_as_accurate(f"{n_rows}x{k}x{n_cols}", ours, twin, expected)
    poisoned.check()
