"""What the host knows of a batch is written in one call, and what its lengths imply is kept by their numbers alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.engine.buckets import bucket_of
from fastbert.engine.interface import PackedInputs
from fastbert.engine.static_memory import Layout, Shape, fill_on_host
from fastbert.ops import Policy, packing, static_plan
from fastbert_kernels import cpu
from fastbert_kernels.work_list import build_work_list
from helpers import cu_seqlens_of

CPU = torch.device("cpu")
LENGTHS = [5, 0, 17, 1, 9]
needs_cpp = pytest.mark.skipif(cpu.obstacle() is not None, reason=f"no C++ kernels: {cpu.obstacle()}")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those of a GPU: a batch makes them when somebody first asks."""
    monkeypatch.setattr(packing, "makes_later", lambda device: True)


@needs_cpp
@pytest.mark.parametrize("types", [False, True], ids=["no types", "types"])
@pytest.mark.parametrize("positions", ["counted", "given", "columns"])
@pytest.mark.parametrize("invariant", [False, True], ids=["shared", "alone"])
def test_one_call_writes_the_same(
    invariant: bool, positions: str, types: bool, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row, or its padding, that the C++ call leaves as it was, writes elsewhere or takes from another one."""
    layout = Layout(64, Shape(CPU, torch.float16, 32, 16, Policy("triton", batch_invariant=invariant)))
    n_tokens = sum(LENGTHS)
    batch = packing.from_lengths(LENGTHS, CPU)
    if positions == "columns":
        batch.counted, batch.host_columns = False, np.arange(n_tokens, dtype=np.int64) + 300
    ids = torch.randint(1, 1000, (3, n_tokens))
    inputs = PackedInputs(ids[0], ids[1] if types else None, ids[2] if positions == "given" else None)
    full = torch.full
    monkeypatch.setattr(torch, "empty", lambda n, **options: full((n,), -1, **options))
    filled = fill_on_host(layout, batch, inputs, 77)
    monkeypatch.setattr(cpu, "obstacle", lambda: "switched off")
    expected = fill_on_host(layout, batch, inputs, 77)
    assert filled is not None and expected is not None
    assert torch.equal(filled[0], expected[0]) and bool((filled[0] != -1).all())
    assert filled[1:] == expected[1:] == (0, [])


def test_offsets_that_change(later: None) -> None:
    """Catches a batch with the lengths of an earlier one, whose offsets were in the same memory or of another dtype."""
    offsets = cu_seqlens_of([3, 4])
    seen = [packing.from_cu_seqlens(offsets, 7, CPU)]
    offsets[1] = 6
    seen.append(packing.from_cu_seqlens(offsets, 7, CPU))
    seen.append(packing.from_cu_seqlens(offsets.long(), 7, CPU))
    assert [batch.cu_seqlens_cpu.tolist() for batch in seen] == [[0, 3, 7], [0, 6, 7], [0, 6, 7]]
    assert [batch.padded_length for batch in seen] == [4, 6, 6]
    assert all(batch.cu_seqlens_cpu.dtype == torch.int32 for batch in seen)
    for _ in range(2):
        for n_tokens in (6, 8):
            with pytest.raises(ValueError, match="cu_seqlens: expected offsets"):
                packing.from_cu_seqlens(offsets, n_tokens, CPU)


def test_batches_of_one_form_share_no_plans(later: None) -> None:
    """Catches a plan that one batch made and another finds, and offsets that only inference mode may use."""
    batches: list[Any] = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            batches.append(packing.from_cu_seqlens(cu_seqlens_of([2, 40]), 42, CPU))
            batches[-1].plan("key", lambda: object())
    assert batches[0].plan("key", object) is not batches[1].plan("key", object)
    assert not batches[1].cu_seqlens_cpu.is_inference() and batches[0].form == batches[1].form
    batches[0].columns = torch.zeros(42, dtype=torch.int32)
    assert batches[0].form != batches[1].form and batches[1].columns is None


@needs_cpp
def test_lists_of_tiles_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tile, its place in the list, or the span of a row that C++ and NumPy tell differently."""
    rng = random.Random(0)
    for longest in (0, 1, 3, 20, 70, 300):
        for n_seqs in (0, 1, 2, 9, 40):
            lengths = [rng.choice((0, 1, rng.randint(0, longest))) if longest else 0 for _ in range(n_seqs)]
            offsets = cu_seqlens_of(lengths).numpy()
            cuttings = [cpu.Cutting(rows, share) for rows in (1, 16, 128) for share in (True, False)]
            cuttings += [cpu.Cutting(16, False, longer_than=20), cpu.Cutting(16, False, up_to=20)]
            for cutting in cuttings:
                made = build_work_list(offsets, *cutting)
                with monkeypatch.context() as patch:
                    patch.setattr(cpu, "obstacle", lambda: "switched off")
                    expected = build_work_list(offsets, *cutting)
                assert all(torch.equal(*parts) for parts in zip(made, expected, strict=True)), (lengths, cutting)


@needs_cpp
def test_kinds_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches small tiles, or a dense list, that C++ and NumPy do not choose for the same batch."""
    rng, policy, kinds = random.Random(1), Policy("triton"), set()
    sizes = itertools.product((1, 3, 30, 200), (1, 40, 64, 65, 129, 400))
    batches = [[rng.randint(1, longest) for _ in range(n_seqs)] for n_seqs, longest in sizes]
    for lengths in [*batches, [1, 129] * 31, [1, 1, 65] * 9]:
        bucket = bucket_of(sum(lengths))
        if bucket is None:
            continue
        answers = []
        for obstacle in (None, "switched off"):
            monkeypatch.setattr(cpu, "obstacle", lambda obstacle=obstacle: obstacle)
            answers.append(static_plan.kind_of(packing.from_lengths(lengths, CPU), bucket, torch.float16, 64, policy))
        assert answers[0] == answers[1], lengths
        kinds.add(answers[0])
    assert len(kinds) == 4  # all of small or large tiles, and dense or whole lists


@needs_cpp
@pytest.mark.parametrize("policy", [Policy("triton"), Policy("triton", batch_invariant=True)], ids=["shared", "alone"])
def test_batches_without_room(policy: Policy, later: None) -> None:
    """Catches tiles that are written beyond the end of their list, and one list that fits beside one that does not."""
    lengths = [1] * 60
    layout = Layout(
        64, Shape(CPU, torch.float16, 32, 16, policy), n_tiles=(0, 8) if policy.batch_invariant else (0, None)
    )
    ids = torch.ones(60, dtype=torch.int64)
    assert fill_on_host(layout, packing.from_lengths(lengths, CPU), PackedInputs(ids, None, None), 1) is None
    assert fill_on_host(layout, packing.from_lengths([0], CPU), PackedInputs(ids[:0], None, None), 1) is not None
