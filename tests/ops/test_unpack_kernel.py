"""Batches that a kernel packs are those that the host packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.engine.interface import PackedInputs
from fastbert.engine.static_memory import Layout, Shape
from fastbert.ops import Policy, attention_plan, masked, packing, static_plan

TRITON, INVARIANT = Policy("triton", True), Policy("triton", True, batch_invariant=True)
BUCKET = 512


def lengths_mask(lengths: list[int], length: int) -> Tensor:
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def random_mask(batch_size: int, length: int, share: float = 0.6) -> Tensor:
    return (torch.rand(batch_size, length, generator=torch.Generator().manual_seed(batch_size * length)) < share).long()


MASKS = {
    "right": lengths_mask([5, 17, 1, 0, 9], 17),
    "left": lengths_mask([5, 17, 1, 0, 9], 17).flip(1),
    "holes": random_mask(7, 23),
    "no token": torch.zeros(3, 8, dtype=torch.long),
    "one place": torch.ones(1, 1, dtype=torch.long),
    "one text": lengths_mask([301], 333),
    "one column": random_mask(37, 1),
    "many short": random_mask(170, 3),
    "all of them": torch.ones(4, 128, dtype=torch.long),
    "some empty": lengths_mask([0, 0, 64, 0, 64, 1, 0, 65, 0], 70)[:7],
    "full and ends": lengths_mask([0, 64, 63, 1, 0, 0, 100, 0], 64),
    "long and short": lengths_mask([129, 3, 128, 0], 129)[:3],
}
FORMS = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def unpacked(mask: Tensor, policy: Policy, dtype: torch.dtype = torch.bfloat16, **ids: Any) -> Any:
    """(the batch, its layout, the words that the kernel wrote)."""
    batch = masked.batch_of(mask, reads_columns=True)
    shape = Shape(mask.device, dtype, 32, 64, policy)
    kind = static_plan.kind_of(batch, BUCKET, dtype, 64, policy)
    most = masked.most_tiles(*mask.shape, dtype, 64, mask.device, policy, kind.small)
    layout = Layout(BUCKET, shape, kind, most)
    words = torch.full((layout.n_words,), 1 << 40, dtype=torch.int64, device=mask.device)
    inputs = PackedInputs(ids["input_ids"].flatten(), *(ids[n].flatten() if ids.get(n) is not None else None
                          for n in ("token_type_ids", "position_ids")))  # fmt: skip
    layout.unpack(words, batch, inputs, 77)
    return batch, layout, words


@FORMS
@pytest.mark.parametrize("policy", [TRITON, INVARIANT], ids=["shared tiles", "batch-invariant"])
def test_a_kernel_packs_as_the_host_does(mask: Tensor, policy: Policy, device: torch.device) -> None:
    """Catches a token in another row, a tile of other rows, and what a batch before has left in the memory."""
    random = torch.Generator().manual_seed(3)
    ids, types, positions = (torch.randint(1, 90, mask.shape, generator=random) for _ in range(3))
    expected = packing.unpad(mask)
    for optional in ({}, {"token_type_ids": types, "position_ids": positions}):
        arguments = {name: x.to(device) for name, x in {"input_ids": ids, **optional}.items()}
        batch, layout, words = unpacked(mask.to(device), policy, **arguments)
        n_tokens, n_seqs = expected.n_tokens, expected.batch_size
        rows = layout.ids(words).cpu()
        columns = [packing.pack(x.cpu(), expected) for x in arguments.values()]
        columns += [torch.zeros(n_tokens, dtype=torch.int64), expected.position_ids][len(columns) - 1 :]
        for row, column in zip(rows, columns, strict=True):
            assert torch.equal(row[:n_tokens], column) and not row[n_tokens:].any()
        assert layout.batch(words).tolist() == [77, n_tokens]
        assert torch.equal(batch.cu_seqlens.cpu(), expected.cu_seqlens)
        places = torch.full(mask.shape, -1, dtype=torch.int32).flatten()
        places[expected.indices] = torch.arange(n_tokens, dtype=torch.int32)
        assert torch.equal(batch.places.cpu(), places)

        integers = layout.integers(words).cpu()
        cu_seqlens, plan = layout.plan.split(integers)
        assert torch.equal(cu_seqlens[: n_seqs + 1], expected.cu_seqlens) and (cu_seqlens[n_seqs:] == n_tokens).all()
        own_columns, seq_ids = layout.plan.split_columns(integers)
        assert torch.equal(own_columns[:n_tokens].long(), expected.position_ids) and not own_columns[n_tokens:].any()
        assert torch.equal(seq_ids[:n_tokens], expected.seq_ids) and (seq_ids[n_tokens:] == BUCKET).all()
        there = packing.unpad(mask, device)
        lists = attention_plan.host_work_lists(there, torch.bfloat16, 64, policy, layout.plan.kind.small)
        for ours, theirs in zip((plan.tiles, plan.short_tiles), lists, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                some = ours[ours[:, 1] > ours[:, 0]]
                assert not ours[len(some) :].any()
                assert sorted(some.tolist()) == sorted(theirs.tiles.tolist())
        spans = lists[0].row_spans
        assert torch.equal(plan.row_spans[: len(spans)], spans)
