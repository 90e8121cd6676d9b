"""Disentangled attention is right on every backend, near and far, and a text's bits are its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distance_cases import CASES, COMPILED, HEADS, TERMS, judged, make
from fastbert import ops
from fastbert.ops import Policy, attention_plan, disentangled, packing
from fastbert.ops.packing import PackedBatch
from helpers import assert_as_accurate, cu_seqlens_of, guarded

BACKENDS = [
    ("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16),
    ("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16),
]  # fmt: skip


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
    assert disentangled.cpu_obstacle(qkv, positions, HEADS) is None
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


@pytest.mark.parametrize("holes", [False, True])
def test_a_graph_multiplies_the_rows_that_its_batch_needs(
    holes: bool, device: torch.device, poisoned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows of distances of the longest text that a graph has room for, or a text without those of its own."""
    from fastbert_kernels import disentangled as kernels

    dtype, policy, head_size, farthest = torch.float32, Policy("triton", strict=True), 16, 100
    lengths = [3, 10, 1] * 10
    rows = torch.arange(max(lengths), device=device)
    batch = packing.from_lengths(lengths, device)
    qkv = torch.randn(sum(lengths), 3 * HEADS * head_size).to(device, dtype)
    keys, queries = (torch.randn(2 * farthest, HEADS * head_size).to(device, dtype) for _ in range(2))
    positions, scale = disentangled.Positions(keys, queries, (-1, farthest)), 0.25
    if holes:  # every other column, so that the longest text reaches 18 of them
        batch.columns = torch.cat([2 * rows[:length] for length in lengths]).int()
        batch.padded_length = 19
    expected = ops.disentangled_attention(qkv, positions, batch, HEADS, scale=scale, policy=policy)
    plan = attention_plan.triton_plan(batch, dtype, head_size, policy)
    static = attention_plan.with_plan(batch, dtype, head_size, policy, plan)
    static = replace(static, cu_seqlens_cpu=torch.tensor([0, 150]), padded_length=150)
    static.plan(attention_plan.LONGEST_IS_BOUND, lambda: True)
    static.columns = batch.columns
    made: list[Tensor] = []
    products = kernels.products
    monkeypatch.setattr(kernels, "products", lambda *args: made.append(products(*args)) or made[-1])
    ours = ops.disentangled_attention(qkv, positions, static, HEADS, scale=scale, policy=policy)
    assert torch.equal(ours, expected)
    assert kernels.product_tile(dtype, head_size)["BLOCK_W"] == 32
    for product in made:  # distances of up to 9 or 18 have rows 91 to 109 or 82 to 118, in blocks 2 and 3
        assert product.shape[2] == 2 * farthest
        assert product.isfinite().all(1).all(0).nonzero()[:, 0].tolist() == list(range(64, 128))
        assert not product[:, :, :64].isfinite().any() and not product[:, :, 128:].isfinite().any()
