"""What the host knows of a batch is written in one call, and what its lengths imply is kept by their numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastbert.engine.interface import PackedInputs
from fastbert.engine.static_memory import Layout, Shape, fill_on_host
from fastbert.ops import Policy, packing
from fastbert_kernels import cpu
from helpers import cu_seqlens_of

CPU = torch.device("cpu")
LENGTHS = [5, 0, 17, 1, 9]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those of a GPU: a batch makes them when somebody first asks."""
    monkeypatch.setattr(packing, "makes_later", lambda device: True)


@pytest.mark.skipif(cpu.obstacle() is not None, reason=f"no C++ kernels: {cpu.obstacle()}")
@pytest.mark.parametrize("types", [False, True], ids=["no types", "types"])
@pytest.mark.parametrize("positions", ["counted", "given", "columns"])
def test_one_call_writes_the_same(positions: str, types: bool, later: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row, or its padding, that the C++ call leaves as it was, writes elsewhere or takes from another one."""
    layout = Layout(64, Shape(CPU, torch.float16, 32, 16, Policy("triton")))
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
