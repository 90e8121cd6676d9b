"""Varlen attention is right in the Triton kernel, in the grouped PyTorch path and in its work list."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import DTYPES, LENGTHS, check
from fastbert import ops
from fastbert.ops import BackendError, Policy, packing
from helpers import cu_seqlens_of, rms_error

TRITON = Policy("triton", strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LENGTHS)
def test_kernel_at_the_edges(case, dtype, device, poisoned):
    """Catches a mistake in tiles, masks or the work list at the lengths where they happen."""
    check(case, LENGTHS[case], 2, 32, dtype, device, TRITON)
    poisoned.check()


@pytest.mark.parametrize("head_size", [16, 20, 24, 32, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_head_sizes(head_size, dtype, device, poisoned):
    """Catches a head size that is padded to a power of two wrongly, or whose table entry is missing or wrong."""
    check(f"D{head_size}", [70, 3, 1, 140], 3, head_size, dtype, device, TRITON)
    poisoned.check()


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=12), seed=st.integers(0, 2**16))
def test_kernel_on_random_lengths(lengths, seed, device):
    """Catches a wrong result for a mix of lengths that nobody thought of."""
    torch.manual_seed(seed)
    check(str(lengths), lengths, 2, 16, torch.bfloat16, device, TRITON)


def test_large_scores(device):
    """Catches a softmax that overflows, or whose running maximum loses digits, where scores reach hundreds."""
    check("large scores", [200, 7, 90], 2, 32, torch.float32, device, TRITON, gain=8.0)


def test_own_scale(device):
    """Catches a softmax scale that the kernel ignores."""
    check("scale", [40, 9], 2, 32, torch.float32, device, TRITON, scale=0.7)


def test_other_sequences_do_not_matter(device):
    """Catches attention that reaches into a neighbour sharing the tile."""
    lengths = [5, 9, 3, 70, 2]
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    qkv = torch.randn(sum(lengths), 3 * 32, device=device)
    first = ops.varlen_attention(qkv, batch, 2, policy=TRITON)
    changed = qkv.clone()
    changed[5:14] += 10.0
    second = ops.varlen_attention(changed, batch, 2, policy=TRITON)
    assert torch.equal(first[:5], second[:5]) and torch.equal(first[14:], second[14:])
    assert not torch.allclose(first[5:14], second[5:14])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", LENGTHS)
def test_grouped_path(case, dtype):
    """Catches a group of equal lengths gathered from, or put back to, the wrong rows."""
    check(case, LENGTHS[case], 2, 24, dtype, torch.device("cpu"), Policy("cpu"))


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), max_size=20))
def test_grouping_undone(lengths):
    """Catches rows of scattered equal-length sequences that come back in the wrong order."""
    check(str(lengths), lengths, 1, 16, torch.float64, torch.device("cpu"), Policy("torch"))


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(0, 300), max_size=30), block_q=st.sampled_from([16, 64, 128]))
def test_work_list_covers_every_row_once(lengths, block_q):
    """Catches a row computed twice or never, a tile too tall, or one that mixes part of a sequence with another."""
    from fastbert_kernels.work_list import build_work_list

    cu_seqlens = cu_seqlens_of(lengths).tolist()
    spans = [(a, b) for a, b in itertools.pairwise(cu_seqlens) for _ in range(a, b)]  # of each row
    tiles, row_spans = build_work_list(cu_seqlens, block_q)
    assert tiles.dtype == row_spans.dtype == torch.int32 and tiles.shape[1] == 5
    assert row_spans.shape[0] == (sum(lengths) if tiles[:, 4].any() else 0)
    rows = []
    for first_row, end_row, first_key, end_key, shared in tiles.tolist():
        assert 0 < end_row - first_row <= block_q
        own = [spans[row] for row in range(first_row, end_row)]
        assert (first_key, end_key) == (own[0][0], own[-1][1]) and shared == (len(set(own)) > 1)
        if shared:
            assert (first_row, end_row) == (first_key, end_key)
            packed = row_spans[first_row:end_row].tolist()
            assert [(first_key + (x & 0xFFFF), first_key + (x >> 16)) for x in packed] == own
        rows += range(first_row, end_row)
    assert sorted(rows) == list(range(sum(lengths)))
    keys = (tiles[:, 3] - tiles[:, 2]).tolist()
    assert keys == sorted(keys, reverse=True)


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), block_q=st.sampled_from([16, 64]))
def test_neighbours_share_as_long_as_they_fit(lengths, block_q):
    """Catches tiles that are left emptier than the bound on their number allows."""
    from fastbert_kernels.work_list import build_work_list

    expected, filled = [], 0
    for length in filter(None, lengths):
        if length > block_q or not expected or filled + length > block_q:
            filled = length
            expected += [block_q] * (length // block_q) + [length % block_q] * (length % block_q > 0)
            filled = block_q if length > block_q else filled
        else:
            expected[-1] += length
            filled += length
    tiles = build_work_list(cu_seqlens_of(lengths).tolist(), block_q).tiles
    assert sorted((tiles[:, 1] - tiles[:, 0]).tolist()) == sorted(expected)


def test_short_sequences_share_tiles():
    """Catches texts of 20 tokens that take up a tile each."""
    from fastbert_kernels.work_list import build_work_list

    tiles = build_work_list(cu_seqlens_of([20] * 60).tolist(), 128).tiles
    assert tiles.shape[0] == 10


def test_work_list_is_built_once_a_batch(device, monkeypatch):
    """Catches a work list made again for every layer."""
    from fastbert_kernels import work_list

    calls = []
    build = work_list.build_work_list
    monkeypatch.setattr(work_list, "build_work_list", lambda *args: calls.append(args) or build(*args))
    batch = packing.from_cu_seqlens(cu_seqlens_of([4, 30]), 34, device)
    for _ in range(3):
        ops.varlen_attention(torch.randn(34, 3 * 32, device=device), batch, 2, policy=TRITON)
    assert len(calls) == 1


def test_gradient_under_triton(device):
    """Catches a backward pass that is not the derivative of the forward one."""
    lengths = [5, 0, 17, 3]
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    grads = {}
    for policy in (TRITON, Policy("torch")):
        torch.manual_seed(1)
        qkv = torch.randn(sum(lengths), 3 * 32, device=device, requires_grad=True)
        ops.varlen_attention(qkv, batch, 2, policy=policy).square().sum().backward()
        grads[policy.backend] = qkv.grad
    assert rms_error(grads["triton"], grads["torch"]) < 1e-5


@pytest.mark.parametrize(
    ("head_size", "dtype", "dropout_p", "reason"),
    [
        (8, torch.float32, 0.0, "head size 8 is not from 16 to 128"),
        (160, torch.float32, 0.0, "head size 160 is not from 16 to 128"),
        (32, torch.float64, 0.0, "there are no Triton kernels for torch.float64"),
        (32, torch.float32, 0.1, r"dropout \(p = 0.1\) that PyTorch draws has no Triton kernel"),
    ],
)
def test_what_the_kernel_cannot_do(head_size, dtype, dropout_p, reason, device, caplog):
    """Catches a silent fallback, or a strict policy that falls back."""
    batch = packing.from_cu_seqlens(cu_seqlens_of([6]), 6, device)
    qkv = torch.randn(6, 3 * 2 * head_size, device=device, dtype=dtype)
    with pytest.raises(BackendError, match=reason):
        ops.varlen_attention(qkv, batch, 2, dropout=dropout_p, policy=TRITON)
    out = ops.varlen_attention(qkv, batch, 2, dropout=dropout_p, policy=Policy("triton"))
    assert out.shape == (6, 2 * head_size) and out.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 100), (5, 192), (6, 3, 64)])
def test_wrong_shapes(shape):
    """Catches a wrong shape that reaches a kernel."""
    batch = packing.from_cu_seqlens(cu_seqlens_of([6]), 6, torch.device("cpu"))
    with pytest.raises(ValueError, match="qkv: expected shape"):
        ops.varlen_attention(torch.randn(shape), batch, 2)
