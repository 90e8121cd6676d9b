"""Disentangled attention is right on every backend, near and far, and a text's bits are its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import BackendError, Policy, disentangled, packing
from fastbert.ops.disentangled import Positions, rows_of_distances
from fastbert.ops.packing import PackedBatch
from fastbert.reference.deberta import disentangled_scores
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of, guarded

HEADS = 2
BUCKETS = (16, 30)  # 8 distances on either side have a row each, and rows end at 30
# Neighbours that share a tile, an empty text, one token, texts beyond the farthest bucket, a tile and a task of C++.
LENGTHS = {"nothing": [0, 0], "short": [5, 1, 0, 9], "long": [70, 3, 41], "longest": [230]}
CASES = [("nothing", False), ("short", True), ("short", False), ("long", False), ("long", True), ("longest", False)]
TERMS = ("c2p p2c", "c2p", "p2c")
COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
BACKENDS = [
    ("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16),
    ("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16),
]  # fmt: skip


def make(
    case: str, holes: bool, device: torch.device, dtype: torch.dtype, terms: str = TERMS[0], head_size: int = 16
) -> tuple[PackedBatch, Tensor, Positions, float]:
    """(batch, qkv, positions, scale) of a case, on the device."""
    generator, lengths = torch.Generator().manual_seed(1), LENGTHS[case]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    qkv, width = randn(sum(lengths), 3 * HEADS * head_size), HEADS * head_size
    keys, queries = (guarded(randn(2 * BUCKETS[0], width)) if name in terms else None for name in ("c2p", "p2c"))
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    if holes:
        columns = [torch.randperm(2 * n + 1, generator=generator)[:n].sort().values for n in lengths]
        batch = replace(batch, columns=torch.cat(columns).int().to(device), padded_length=2 * max(lengths) + 1)
    return batch, qkv, Positions(keys, queries, BUCKETS), (3 * head_size) ** -0.5


def judged(batch: PackedBatch, qkv: Tensor, positions: Positions, scale: float, dtype: torch.dtype) -> Tensor:
    """Attention by the reference's scores, a text at a time, in a dtype."""
    outs, offsets = [], batch.cu_seqlens_cpu.tolist()
    table, radius = torch.tensor(rows_of_distances(*BUCKETS)), len(rows_of_distances(*BUCKETS)) // 2
    tables = [
        None if t is None else t.cpu().to(dtype).unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in positions[:2]
    ]
    for start, end in itertools.pairwise(offsets):
        q, k, v = qkv[start:end].cpu().to(dtype).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)[:, None]
        columns = torch.arange(end - start) if batch.columns is None else batch.columns[start:end].cpu().long()
        rows = table[(columns[:, None] - columns).clamp(-radius, radius) + radius]
        scores = disentangled_scores(q, k, *tables, rows, terms=1)  # divided by the root of the head size
        scores = scores * (scale * q.shape[-1] ** 0.5)
        outs.append((torch.softmax(scores, -1) @ v)[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


@COMPILED
@pytest.mark.parametrize(("case", "holes"), CASES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_outputs(backend: str, dtype: torch.dtype, case: str, holes: bool, device: torch.device, poisoned: Any) -> None:
    """Catches a wrong sign of a distance, a row at an edge, a text that reads another's numbers, a skipped term."""
    for terms in TERMS if case == "short" else TERMS[:1]:
        batch, qkv, positions, scale = make(case, holes, device, dtype, terms)
        policy = Policy(backend, strict=True)
        ours = ops.disentangled_attention(guarded(qkv, 8), positions, batch, HEADS, scale=scale, policy=policy)
        eager, exact = (judged(batch, qkv, positions, scale, kind) for kind in (dtype, torch.float64))
        if case != "nothing":
            assert_as_accurate(terms, ours.cpu(), eager, exact)
        assert ours.shape == exact.shape


@COMPILED
@pytest.mark.parametrize("head_size", [48, 80, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(dtype: torch.dtype, head_size: int) -> None:
    """Catches a head that is no power of two, or longer than a chain of sums, in the C++ kernel."""
    batch, qkv, positions, scale = make("long", False, torch.device("cpu"), dtype, head_size=head_size)
    ours = ops.disentangled_attention(qkv, positions, batch, HEADS, scale=scale, policy=Policy("cpu", strict=True))
    assert disentangled.cpu_obstacle(qkv, positions, HEADS, 0.0) is None
    eager, exact = (judged(batch, qkv, positions, scale, kind) for kind in (dtype, torch.float64))
    assert_as_accurate(str(head_size), ours, eager, exact)


@COMPILED
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.bfloat16)], ids=str
)
def test_bits_of_a_text_alone(backend: str, dtype: torch.dtype, holes: bool, device: torch.device) -> None:
    """Catches a text whose bits change with its neighbours, or with how far the longest of them reaches."""
    batch, qkv, positions, scale = make("long", holes, device, dtype)
    policy = Policy(backend, batch_invariant=True)

    def run(batch: PackedBatch, qkv: Tensor) -> Tensor:
        return ops.disentangled_attention(qkv, positions, batch, HEADS, scale=scale, policy=policy)

    together, offsets = run(batch, qkv), batch.cu_seqlens_cpu.tolist()
    for start, end in itertools.pairwise(offsets):
        alone = packing.from_cu_seqlens(cu_seqlens_of([end - start]), end - start, device)
        if holes:
            assert batch.columns is not None
            alone = replace(alone, columns=batch.columns[start:end], padded_length=2 * (end - start) + 1)
        assert torch.equal(run(alone, qkv[start:end].contiguous()), together[start:end])


def test_gradients() -> None:
    """Catches a kernel without a derivative that runs where one is wanted, and a policy that cannot be followed."""
    batch, qkv, positions, scale = make("short", False, torch.device("cpu"), torch.float64)
    assert positions.keys is not None and positions.queries is not None
    leaves = [t.clone().requires_grad_() for t in (qkv, positions.keys, positions.queries)]
    ours = ops.disentangled_attention(leaves[0], Positions(*leaves[1:], BUCKETS), batch, HEADS, scale=scale)
    expected = judged(batch, leaves[0], Positions(*leaves[1:], BUCKETS), scale, torch.float64)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for mine, other in zip(*(torch.autograd.grad(out, leaves, weights) for out in (ours, expected)), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)
    with pytest.raises(BackendError, match="no Triton kernel for gradients of disentangled attention"):
        ops.disentangled_attention(
            leaves[0], positions, batch, HEADS, scale=scale, policy=Policy("triton", strict=True)
        )
