"""Pooling and L2 normalisation are right in the kernel and the plain path."""

from __future__ import annotations

import pytest
import torch

from fastbert import ops, reference
from fastbert.ops import BackendError, Policy
from fastbert.ops.pooling import MODES
from helpers import assert_as_accurate, cu_seqlens_of, guarded, rms_error
from pooling_cases import LENGTHS, eager_pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = Policy("triton", strict=True)


def check(name, lengths, hidden_size, dtype, device, mode, normalize, policy):
    hidden = torch.randn(sum(lengths), hidden_size).to(device, dtype) - 0.3
    cu_seqlens = cu_seqlens_of(lengths, device)
    inputs = guarded(hidden, extra_columns=5), guarded(cu_seqlens)
    ours = ops.pool(*inputs, mode, normalize=normalize, policy=policy)
    expected = reference.pool(hidden.double(), cu_seqlens, mode, normalize)
    assert_as_accurate(name, ours, eager_pool(hidden, lengths, mode, normalize), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(mode, normalize, dtype, device, poisoned):
    """Catches a neighbour's token pooled, the last block left out, a wrong weight or divisor, or NaN for no tokens."""
    check(mode, LENGTHS, 96, dtype, device, mode, normalize, TRITON)
    poisoned.check()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden_size", [96, 256])
def test_kernel_over_long_texts(mode, normalize, hidden_size, device, poisoned):
    """Catches a block left out or counted twice where several are read at a time, or where single ones begin."""
    lengths = [128, 300, 127, 129, 0, 256, 1, 33]
    check(mode, lengths, hidden_size, torch.bfloat16, device, mode, normalize, TRITON)
    poisoned.check()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_gives_a_text_the_same_bits_in_every_batch(mode, normalize, dtype, device):
    """Catches a block of rows counted from the start of the batch, or columns split by the size of the batch."""
    lengths = [1, 200, 3, 128, 0, 40, 129] + [2] * 30
    hidden = torch.randn(sum(lengths), 200).to(device, dtype)
    together = ops.pool(hidden, cu_seqlens_of(lengths, device), mode, normalize=normalize, policy=TRITON)
    for i, x in enumerate(hidden.split(lengths)[:8]):
        alone = ops.pool(x, cu_seqlens_of([len(x)], device), mode, normalize=normalize, policy=TRITON)
        assert torch.equal(alone[0], together[i]), i


@pytest.mark.parametrize("hidden_size", [1, 320, 1023, 4096])
def test_kernel_hidden_sizes(hidden_size, device, poisoned):
    """Catches a tail of the row that enters the norm, or is not written."""
    check(f"H{hidden_size}", [5, 1, 9], hidden_size, torch.float32, device, "mean", True, TRITON)
    poisoned.check()


def test_no_sequences(device):
    """Catches an empty batch that launches an empty grid."""
    out = ops.pool(torch.zeros(0, 32, device=device), cu_seqlens_of([], device), "mean", policy=TRITON)
    assert out.shape == (0, 32)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_plain_path(backend, mode, dtype):
    """Catches a segment sum over the wrong rows, or NaN for no tokens."""
    for normalize in (False, True):
        check(mode, LENGTHS, 40, dtype, torch.device("cpu"), mode, normalize, Policy(backend))
    empty = ops.pool(torch.zeros(0, 8, dtype=dtype), cu_seqlens_of([0, 0]), mode, policy=Policy(backend))
    assert torch.equal(empty, torch.zeros(2, 8, dtype=dtype))


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "mean_sqrt_len"])
def test_plain_path_over_long_texts(mode):
    """Catches a sum that adds row after row, whose rounding errors grow with the length."""
    check(mode, [384, 350, 300, 512], 384, torch.float32, torch.device("cpu"), mode, False, Policy("cpu"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_float32_out_of_bfloat16(backend, device):
    """Catches a mean of many bf16 rows that is summed, or returned, in bf16."""
    hidden = torch.randn(300, 32).to(device, torch.bfloat16)
    cu_seqlens = cu_seqlens_of([300], device)
    out = ops.pool(hidden, cu_seqlens, "mean", out_dtype=torch.float32, policy=Policy(backend))
    assert out.dtype == torch.float32
    assert rms_error(out, hidden.double().mean(0, keepdim=True)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_gradients_under_triton(mode, device):
    """Catches a backward pass that is not the derivative of the forward one."""
    hidden, cu_seqlens = torch.randn(sum(LENGTHS), 24, device=device), cu_seqlens_of(LENGTHS, device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaf = hidden.clone().requires_grad_()
        ops.pool(leaf, cu_seqlens, mode, policy=policy).pow(3).sum().backward()
        grads.append(leaf.grad)
    assert rms_error(*grads) < 1e-5


def test_bad_arguments(device):
    """Catches an unknown mode that pools somehow, or a row too wide for the kernel that is computed wrongly."""
    with pytest.raises(ValueError, match="mode: expected one of cls, mean, .*got 'median'"):
        ops.pool(torch.randn(2, 4), cu_seqlens_of([2]), "median")
    with pytest.raises(BackendError, match="pooling: .*hidden size 5000 is above 4096"):
        ops.pool(torch.randn(2, 5000, device=device), cu_seqlens_of([2], device), "mean", policy=TRITON)
