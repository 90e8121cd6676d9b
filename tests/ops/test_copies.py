"""Little is copied from the host to a GPU, and from memory that a GPU reads by itself.

The device "meta" stands for a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import ops
from fastbert.ops import attention_plan, groups, packing
from fastbert.pipelines.batching import in_batches
from fastbert.text.encoding import PackedEncoding
from helpers import cu_seqlens_of

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """The number of elements of each copy from the host to another device. What `to_device` copies is in `by_us`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.others: list[int] = []
        self.by_us: list[int] = []
        original = packing.to_device

        def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            before = list(self.others)
            moved = original(tensor, device)
            self.others = before
            self.by_us.append(tensor.numel())
            return moved

        for module in (packing, groups, attention_plan):
            monkeypatch.setattr(module, "to_device", to_device)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if op == torch.ops.aten._to_copy.default else args[1]
            if source.device.type == "cpu" and out.device.type != "cpu":
                self.others.append(source.numel())
        return out


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


LENGTHS = [700, 300, 0, 24]


def test_no_positions_are_copied(copies: Copies) -> None:
    """Catches positions, 8 bytes a token, that are copied to the GPU with every batch, while the host waits."""
    with copies:
        batch = packing.from_lengths(LENGTHS, META)
        again = packing.from_cu_seqlens(cu_seqlens_of(LENGTHS), sum(LENGTHS), META)
    assert batch.position_ids.device == again.position_ids.device == META
    assert batch.position_ids.shape == (1024,) and batch.position_ids.dtype == torch.int64
    assert copies.others == [] and copies.by_us == [5, 5]  # cu_seqlens


def test_nothing_is_copied_for_a_batch_without_padding(copies: Copies) -> None:
    """Catches offsets that are made on the host, though the GPU can count."""
    with copies:
        batch = packing.without_padding(4, 256, META)
    assert batch.cu_seqlens.device == META and batch.cu_seqlens.dtype == torch.int32
    assert copies.others == copies.by_us == []
    assert batch.cu_seqlens_cpu.tolist() == [0, 256, 512, 768, 1024]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_work_lists(batch_invariant: bool, copies: Copies) -> None:
    """Catches a work list in memory that the GPU cannot copy from by itself, so that the host waits."""
    policy = ops.Policy("triton", strict=True, batch_invariant=batch_invariant)
    with copies:
        batch = packing.from_lengths(LENGTHS, META)
        attention_plan.triton_plan(batch, torch.bfloat16, 64, policy)
    assert copies.others == [] and len(copies.by_us) == 2 + batch_invariant  # tiles and spans


def test_groups_of_the_plain_path(copies: Copies) -> None:
    """Catches rows of equal lengths, 8 bytes a token, copied while the host waits."""
    with copies:
        groups.group_by_length(cu_seqlens_of([3, 5, 3, 5]), META)
    assert copies.others == [] and copies.by_us


def test_batches_of_texts(copies: Copies) -> None:
    """Catches ids of a batch of texts that are copied one by one, and not with all else that the batch needs."""
    ids = torch.arange(1024)
    tokens = PackedEncoding(ids, torch.zeros_like(ids), cu_seqlens_of(LENGTHS), 0, 0)
    with copies:
        batches = list(in_batches(tokens, 800, None, META))
    assert len(batches) == 2 and copies.others == copies.by_us == []
    assert all(ids.device.type == "cpu" for _, _, *both in batches for ids in both)  # ids and segments


def test_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy out of memory that is not pinned, for which the host waits unnoticed."""
    pinned, moved = torch.zeros(3), torch.ones(3)
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin") or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: calls.append((tensor, options)) or moved)
    assert packing.to_device(torch.zeros(3), "cuda:1") is moved
    assert calls[0] == "pin" and calls[1][0] is pinned and calls[1][1] == {"non_blocking": True}
    calls.clear()
    packing.to_device(torch.zeros(3), "cpu")
    assert "pin" not in calls


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_positions_made_on_the_device(lengths: list[int]) -> None:
    """Catches positions that count on into the next sequence, or are of another dtype than those of the host."""
    expected = packing.from_lengths(lengths, torch.device("cpu")).position_ids
    cu_seqlens = cu_seqlens_of(lengths)
    seq_ids = packing.sequence_ids(cu_seqlens, sum(lengths))
    ours = packing.within_sequences(torch.arange(sum(lengths)), cu_seqlens, seq_ids)
    assert ours.dtype == expected.dtype == torch.int64 and torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5], [3, 0, 5], [0, 0], [], [700, 300, 24]], ids=str)
def test_gpu_batches(lengths: list[int]) -> None:
    """Catches a batch on a GPU that differs from the same one on a CPU."""
    ours, expected = (packing.from_lengths(lengths, torch.device(device)) for device in ("cuda", "cpu"))
    for name in ("cu_seqlens", "cu_seqlens_cpu", "position_ids", "seq_ids"):
        ours_is, expected_is = getattr(ours, name), getattr(expected, name)
        assert ours_is.dtype == expected_is.dtype and torch.equal(ours_is.cpu(), expected_is), name
    assert ours.padded_length == expected.padded_length
