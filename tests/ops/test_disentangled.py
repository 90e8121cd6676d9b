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
from fastbert.ops import Policy, disentangled, packing
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
