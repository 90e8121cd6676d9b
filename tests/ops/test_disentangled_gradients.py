"""Gradients of disentangled attention are right on every backend, with dropout, and keep no numbers for all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distance_cases import BUCKETS, COMPILED, HEADS, TERMS, judged, make
from fastbert import ops
from fastbert.ops import BackendError, Policy, disentangled
from fastbert.ops.disentangled import Positions
from fastbert.ops.training.choose import as_in_training
from gradient_cases import assert_gradient, assert_same_bits, dropout, leaves
from helpers import cu_seqlens_of, guarded

CPU = torch.device("cpu")
SHORT, LONG, FAR = ("short", False), ("long", True), ("longest", False)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
RUNS = [  # and whether probabilities are dropped
    *(("cpu", dtype, *case, False) for dtype in (FP32, BF16) for case in (SHORT, ("short", True), LONG, FAR)),
    ("cpu", FP32, *LONG, True), ("cpu", BF16, *FAR, True),
    *(("triton", dtype, *SHORT, dtype != FP32) for dtype in (FP32, BF16, FP16)),
    ("triton", FP32, "short", True, True), ("triton", BF16, *LONG, False),
]  # fmt: skip


def gradients(
    batch: Any, tensors: list[Any], scale: float, policy: Policy, drop: Any = None, weights: Tensor | None = None
) -> list[Any]:
    """Attention's result and the gradients of qkv, keys and queries; None for a table that is not there."""
    qkv, keys, queries = tensors
    out = ops.disentangled_attention(
        qkv, Positions(keys, queries, BUCKETS), batch, HEADS, scale=scale, dropout=drop, policy=policy
    )
    wanted = [t for t in tensors if t is not None]
    found = iter(torch.autograd.grad(out, wanted, weights_of(out) if weights is None else weights))
    return [out.detach(), *(None if t is None else next(found) for t in tensors)]


def weights_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device, out.dtype)


@COMPILED
@pytest.mark.parametrize(("backend", "dtype", "case", "holes", "drops"), RUNS, ids=str)
def test_gradients_on_kernels(
    backend: str, dtype: torch.dtype, case: str, holes: bool, drops: bool, device: torch.device, poisoned: Any
) -> None:
    """Catches a pair that is summed into another row, twice or not at all, and masks that differ between passes."""
    for terms in TERMS if case == "short" and dtype == FP32 else TERMS[:1]:
        batch, qkv, positions, scale = make(case, holes, device if backend == "triton" else CPU, dtype, terms)
        drop = dropout() if drops else None
        inputs: list[Any] = [guarded(qkv.detach(), 8), *positions[:2]]
        own = [None if t is None else t.detach().requires_grad_() for t in inputs]
        ours = gradients(batch, own, scale, Policy(backend, strict=True), drop)
        expected = []
        for kind in (dtype, FP64):
            theirs = leaves([qkv.cpu(), *(None if t is None else t.cpu() for t in positions[:2])], kind)
            out = judged(batch, theirs[0], Positions(theirs[1], theirs[2], BUCKETS), scale, kind, drop)
            wanted = [t for t in theirs if t is not None]
            found = torch.autograd.grad(out, wanted, weights_of(ours[0].cpu()).to(kind))
            expected.append([out.detach(), *found])
        mine = [t.cpu() for t in ours if t is not None]
        for i, (gradient, eager, exact) in enumerate(zip(mine, *expected, strict=True)):
            assert gradient.dtype == dtype
            assert_gradient(f"{terms}, {i}", gradient, eager, exact, dtype)


@COMPILED
@pytest.mark.parametrize("head_size", [48, 144])
def test_head_sizes_of_gradients(head_size: int, variant: str) -> None:
    """Catches a head that is no power of two, or longer than a chain of sums, in any library of C++ kernels."""
    batch, qkv, positions, scale = make("long", False, CPU, FP32, head_size=head_size)
    results = [
        gradients(batch, leaves([qkv, *positions[:2]], kind), scale, Policy(backend, strict=True))
        for backend, kind in (("cpu", FP32), ("torch", FP32), ("torch", FP64))
    ]
    for i, (ours, eager, exact) in enumerate(zip(*results, strict=True)):
        assert_gradient(str(i), ours, eager, exact, FP32)


def test_gradients_in_plain_pytorch() -> None:
    """Catches a derivative of plain PyTorch's that is not the reference's, in float64 to 1e-11."""
    batch, qkv, positions, scale = make("short", True, CPU, FP64)
    ours = leaves([qkv, *positions[:2]])
    drop = dropout()
    for mask in (None, drop):
        mine = gradients(batch, ours, scale, Policy("torch", strict=True), mask)
        out = judged(batch, ours[0], Positions(ours[1], ours[2], BUCKETS), scale, FP64, mask)
        expected = [out, *torch.autograd.grad(out, ours, weights_of(out))]
        for gradient, other in zip(mine, expected, strict=True):
            assert torch.allclose(gradient, other, atol=1e-11)


@COMPILED
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_bits_and_rows_of_no_text(backend: str, device: torch.device, number_of_threads: None) -> None:
    """Catches sums whose order depends on threads or chance, garbage beyond the last text, and tables of no text."""
    device = device if backend == "triton" else CPU
    batch, qkv, positions, scale = make("long" if backend == "cpu" else "short", False, device, FP32)
    policy, tensors = Policy(backend, strict=True), leaves([qkv, *positions[:2]])
    with as_in_training(), torch.no_grad():
        alone = ops.disentangled_attention(qkv, positions, batch, HEADS, scale=scale, policy=policy)
    first = gradients(batch, tensors, scale, policy, dropout())
    torch.set_num_threads(3)
    assert_same_bits(first, gradients(batch, tensors, scale, policy, dropout()))
    assert torch.equal(alone, gradients(batch, tensors, scale, policy)[0])
    empty, nothing, *_ = make("nothing", False, device, FP32)
    found = gradients(empty, [leaves([nothing])[0], *tensors[1:]], scale, policy)
    assert all((t == 0).all() for t in found)
    assert found[1].shape == nothing.shape and found[2].shape == tensors[1].shape


@COMPILED
def test_one_group_of_texts_after_the_other() -> None:
    """Catches texts that are left out, or taken twice, where the batch is cut into parts of equal work."""
    from fastbert.ops import packing

    lengths = [1, 0, 40, 2, 2, 0, 90, 1, 1, 17, 3, 0]
    generator = torch.Generator().manual_seed(3)
    tensors = leaves([torch.randn(n, 96 if n == sum(lengths) else 32, generator=generator) for n in (157, 32, 32)])
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), CPU)
    mine, exact = (
        gradients(batch, leaves(tensors, kind), 0.1, Policy(backend, strict=True))
        for backend, kind in (("cpu", FP32), ("torch", FP64))
    )
    for i, (gradient, other) in enumerate(zip(mine, exact, strict=True)):
        assert_gradient(str(i), gradient, other.to(FP32), other, FP32)


@COMPILED
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nothing_is_kept_for_pairs(backend: str, device: torch.device) -> None:
    """Catches a forward pass that keeps numbers for all pairs of tokens, or for all distances of a token."""
    batch, qkv, positions, scale = make("long", False, device if backend == "triton" else CPU, FP32)
    tensors, kept = leaves([qkv, *positions[:2]]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.disentangled_attention(
            tensors[0], Positions(tensors[1], tensors[2], BUCKETS), batch, HEADS, scale=scale, policy=Policy(backend)
        )
    beside_inputs = sum(t.numel() for t in kept) - sum(t.numel() for t in tensors)
    assert beside_inputs <= batch.n_tokens * (qkv.shape[1] // 3 + HEADS)


@COMPILED
def test_second_derivatives() -> None:
    """Catches a derivative of a derivative that is silently wrong."""
    batch, qkv, positions, scale = make("short", False, CPU, FP32)

    def second(backend: str, dtype: torch.dtype, drop: Any = None) -> Any:
        tensors = leaves([qkv, *positions[:2]], dtype)
        out = ops.disentangled_attention(
            tensors[0], Positions(tensors[1], tensors[2], BUCKETS), batch, HEADS, scale=scale, dropout=drop,
            policy=Policy(backend),
        )  # fmt: skip
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [t.grad for t in tensors]

    for mine, exact in zip(second("cpu", FP32), second("torch", FP64), strict=True):
        assert torch.allclose(mine.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        second("cpu", FP32, dropout())


def test_what_has_no_gradients_is_refused() -> None:
    """Catches kernels without a derivative that run where one is wanted, and a fallback without its reason."""
    batch, qkv, positions, scale = make("short", False, CPU, FP64)

    def run(policy: Policy, *tensors: Tensor) -> Tensor:
        return ops.disentangled_attention(
            tensors[0], Positions(tensors[1], tensors[2], BUCKETS), batch, HEADS, scale=scale, policy=policy
        )

    wide = leaves([qkv, *positions[:2]])
    low = leaves(wide, FP32)
    with pytest.raises(BackendError, match=r"no Triton kernels for torch\.float64"):
        run(Policy("triton", strict=True), *wide)
    with pytest.raises(BackendError, match="mixed dtypes"):
        run(Policy("triton", strict=True), low[0], low[1], low[2].bfloat16())
    for backend in ("cpu", "triton"):
        with pytest.raises(BackendError, match="go through a whole batch"):
            run(Policy(backend, batch_invariant=True), *low)
    narrow = Positions(qkv[:, :8].float(), None, BUCKETS)
    for rows, tables, reason in ((qkv, positions, "torch.float64"), (qkv[:, :24].float(), narrow, "head size 4")):
        assert reason in str(disentangled.cpu_obstacle(rows, tables, HEADS, trained=True))
