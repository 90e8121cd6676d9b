"""A position bias in attention is right on every backend, forward and backward, at near and far distances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import ops, reference
from fastbert.ops import Policy, packing
from fastbert.ops.packing import PackedBatch
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of

HEADS, RADIUS = 2, 20
# Neighbours that share a tile, an empty text, one token, and texts beyond the farthest distance and beyond a tile.
LENGTHS = {"short": [5, 1, 0, 9], "long": [70, 3, 41], "longest": [150]}
CASES = [("short", True), ("long", False), ("long", True), ("longest", False)]
COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
BACKENDS = [
    ("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16),
    ("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16),
]  # fmt: skip


def make(case: str, holes: bool, device: torch.device, dtype: torch.dtype, head_size: int = 16) -> tuple[Any, ...]:
    """(batch, qkv, table, gradient) of a case, on the device."""
    generator = torch.Generator().manual_seed(1)
    lengths = LENGTHS[case]
    shapes = (sum(lengths), 3 * HEADS * head_size), (HEADS, 2 * RADIUS + 1), (sum(lengths), HEADS * head_size)
    tensors = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    if holes:
        columns = [torch.randperm(2 * n + 1, generator=generator)[:n].sort().values for n in lengths]
        batch = replace(batch, columns=torch.cat(columns).int().to(device))
    return batch, *tensors


def judged(batch: PackedBatch, qkv: Tensor, table: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The reference's output and the gradients of qkv and of the table, in a dtype, on the CPU."""
    leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in (qkv, table)]
    columns = None if batch.columns is None else batch.columns.cpu()
    out = reference.varlen_attention(leaves[0], batch.cu_seqlens_cpu, HEADS, position_bias=leaves[1], columns=columns)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.cpu().to(dtype))]


def run(backend: str, batch: PackedBatch, qkv: Tensor, table: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, table)]
    policy = Policy(backend, strict=True)
    out = ops.varlen_attention(leaves[0], batch, HEADS, position_bias=leaves[1], policy=policy)
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad))]


@COMPILED
@pytest.mark.parametrize(("case", "holes"), CASES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_outputs_and_gradients(
    backend: str, dtype: torch.dtype, case: str, holes: bool, device: torch.device, poisoned: Any
) -> None:
    """Catches a distance that is counted from the key, or in packed rows where a mask has holes; a far key's number."""
    batch, *tensors = make(case, holes, device if backend == "triton" else torch.device("cpu"), dtype)
    exact, eager = judged(batch, *tensors, torch.float64), judged(batch, *tensors, dtype)
    mine = run(backend, batch, *tensors)
    for name, *values in zip(("out", "qkv", "table"), mine, eager, exact, strict=True):
        assert_as_accurate(f"{backend}, {name}", *values)
    with torch.no_grad():  # another kernel than in training
        out = ops.varlen_attention(tensors[0], batch, HEADS, position_bias=tensors[1], policy=Policy(backend))
    assert_as_accurate(f"{backend}, inference", out.cpu(), eager[0], exact[0])
    assert all(map(torch.equal, mine, run(backend, batch, *tensors)))  # no sum in another order
    if backend == "triton":
        poisoned.check()


@COMPILED
@pytest.mark.parametrize("backend", ["cpu", "triton", "torch"])
@pytest.mark.parametrize("holes", [False, True])
def test_a_table_that_learns_nothing(backend: str, holes: bool, device: torch.device) -> None:
    """Catches a table without gradients (ALiBi) for which holes are an obstacle, or whose gradient is made."""
    place = device if backend == "triton" else torch.device("cpu")
    batch, qkv, table, grad = make("short", holes, place, torch.float32)
    leaf = qkv.detach().clone().requires_grad_()
    out = ops.varlen_attention(leaf, batch, HEADS, position_bias=table, policy=Policy(backend, strict=True))
    out.backward(grad)
    exact, eager = (judged(batch, qkv, table, grad, dtype) for dtype in (torch.float64, torch.float32))
    for name, *values in zip(("out", "qkv"), (out.detach().cpu(), leaf.grad.cpu()), eager, exact, strict=False):
        assert_as_accurate(name, *values)


@COMPILED
@pytest.mark.parametrize(("backend", "holes"), [("cpu", False), ("triton", False), ("triton", True)])
def test_dropout(backend: str, holes: bool, device: torch.device) -> None:
    """Catches a mask that the gradient of the bias leaves out, or a factor that it lacks."""
    batch, qkv, table, grad = make(
        "short", holes, device if backend == "triton" else torch.device("cpu"), torch.float32
    )
    dropout = ops.dropout.Dropout(20_000, 7, 3)
    results = []
    for kernels, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (qkv, table)]
        out = ops.varlen_attention(
            leaves[0], batch, HEADS, position_bias=leaves[1], dropout=dropout, policy=Policy(kernels)
        )
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for mine, exact in zip(*results, strict=True):
        assert ((mine.double() - exact).norm() / exact.norm()).item() < 2e-6


@COMPILED
@pytest.mark.parametrize("head_size", [16, 160])
def test_long_texts_in_parts(head_size: int) -> None:
    """Catches blocks of keys that overlap in the sums along diagonals, and sums that threads make in another order."""
    lengths, threads = [1100, 3], torch.get_num_threads()
    generator = torch.Generator().manual_seed(2)
    qkv, grad = (torch.randn(1103, n * head_size, generator=generator) for n in (3, 1))
    table, offsets = torch.randn(1, 257, generator=generator), cu_seqlens_of(lengths)
    judges = []
    for dtype in (torch.float32, torch.float64):
        leaves = [qkv.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()]
        judge = reference.varlen_attention(leaves[0], offsets, 1, position_bias=leaves[1])
        judges.append(torch.autograd.grad(judge, leaves, grad.to(dtype)))
    bias, found = cpu.PositionBias.of(table, None), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out, lse = cpu.attention_training_forward(qkv, offsets, 1, head_size**-0.5, None, bias)
            found.append(cpu.attention_backward(grad, qkv, out, lse, offsets, 1, head_size**-0.5, None, bias))
    finally:
        torch.set_num_threads(threads)
    for name, mine, again, *values in zip(("qkv", "table"), *found, *judges, strict=True):
        assert torch.equal(mine, again)
        assert_as_accurate(name, mine, *values)


@COMPILED
def test_bits_alone_and_together() -> None:
    """Catches a bias whose rounding depends on the other texts of a batch."""
    batch, qkv, table, _ = make("long", False, torch.device("cpu"), torch.bfloat16)
    policy = Policy("cpu", batch_invariant=True)
    together = ops.varlen_attention(qkv, batch, HEADS, position_bias=table, policy=policy)
    for part, rows in zip(qkv.split(LENGTHS["long"]), together.split(LENGTHS["long"]), strict=True):
        alone = packing.from_cu_seqlens(cu_seqlens_of([len(part)]), len(part), part.device)
        assert torch.equal(ops.varlen_attention(part, alone, HEADS, position_bias=table, policy=policy), rows)


def test_second_derivatives() -> None:
    """Catches a gradient of a gradient that leaves out the bias."""
    batch, qkv, table, _ = make("short", False, torch.device("cpu"), torch.float64)
    leaves = qkv[:, ::1].requires_grad_(), table.requires_grad_()

    def function(qkv: Tensor, table: Tensor) -> Tensor:
        return ops.varlen_attention(qkv, batch, HEADS, position_bias=table, policy=Policy("torch"))[:3]

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_what_does_not_fit() -> None:
    """Catches a table that is read past its end."""
    batch, qkv, table, _ = make("short", True, torch.device("cpu"), torch.float32)
    for wrong in (table[:1], table[:, 1:], table[0]):
        with pytest.raises(ValueError, match=r"position_bias: expected shape \(N, 2 R \+ 1\) with N = 2, got"):
            ops.varlen_attention(qkv, batch, HEADS, position_bias=wrong)


def test_holes_are_found() -> None:
    """Catches padding on the left taken for a hole, or a hole at the end of one row that starts the next."""

    def columns(mask: list[list[int]]) -> Any:
        batch = packing.unpad(torch.tensor(mask))
        packing.find_holes(batch)
        return None if batch.columns is None else batch.columns.tolist()

    assert columns([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]]) is None
    assert columns([[0, 1, 1], [1, 0, 1]]) == [1, 2, 0, 2]
    assert columns([[1, 0, 0], [0, 1, 1], [1, 0, 1]]) == [0, 1, 2, 0, 2]
