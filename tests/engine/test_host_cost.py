"""A batch that is launched as a CUDA graph takes few Python calls, on a device that launches nothing.

The suite `host` of the benchmarks times the same; calls are counted here, since other programs do not change them.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from device_stand_in import META, EmptyGraphs, bert, install
from fastbert_kernels import cpu
from helpers import cu_seqlens_of

BATCHES = {
    "1x16": [16],
    "1x128": [128],
    "32x128": [128] * 32,
    "8x512": [512] * 8,
    "ragged": [(37 * i) % 120 + 3 for i in range(40)],
}
# Python functions before the launch, and in all, whatever the batch: 56 and 65 now, and 74 without records.
MOST_BEFORE, MOST = 58, 67 if cpu.objects.obstacle() is None else 76


@pytest.fixture(scope="module")
def on_meta() -> Any:
    """BERT-base, and the graphs that it replays."""
    patch = pytest.MonkeyPatch()
    graphs = install(patch.setattr)
    yield bert(), graphs
    patch.undo()


def count(model: Any, graphs: EmptyGraphs, lengths: list[int]) -> tuple[int, int]:
    """The Python functions that are called before the launch, and in all, by a batch of a form that came before."""
    ids, cu_seqlens = torch.zeros(sum(lengths), dtype=torch.int64, device=META), cu_seqlens_of(lengths)
    n_calls, before = 0, []

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    with torch.inference_mode():
        for _ in range(3):
            model.forward_packed(ids, cu_seqlens)
        graphs.launched = lambda: before.append(n_calls)
        sys.setprofile(note)
        try:
            model.forward_packed(ids, cu_seqlens)
        finally:
            sys.setprofile(None)
    return before[0], n_calls


@pytest.mark.parametrize("name", BATCHES)
def test_few_calls(name: str, on_meta: Any) -> None:
    """Catches work on the way to a replay, or after it, that creeps back or grows with the batch."""
    before, in_all = count(*on_meta, BATCHES[name])
    assert before <= MOST_BEFORE and in_all <= MOST


def test_nothing_grows_with_the_layers(on_meta: Any) -> None:
    """Catches a module that is asked something on its own, where all are compared in a few calls."""
    _, graphs = on_meta
    costs = [count(bert(num_hidden_layers=n, hidden_size=64, num_attention_heads=2), graphs, [9]) for n in (1, 12)]
    assert all(abs(one - twelve) <= 2 for one, twelve in zip(*costs, strict=True)), costs  # caches of isinstance


def test_lengths_that_are_new(on_meta: Any) -> None:
    """Catches Python work for each sequence, or each tile, where the lengths of a batch were never seen."""
    model, graphs = on_meta
    ids, cu_seqlens = torch.zeros(1000, dtype=torch.int64, device=META), cu_seqlens_of([20] * 50)
    counts = []

    def note(frame: Any, event: str, argument: Any) -> None:
        counts[-1] += event == "call"

    with torch.inference_mode():
        model.forward_packed(ids, cu_seqlens)
        for lengths in ([25] * 40, [10] * 100, [1] * 1000):
            counts.append(0)
            offsets = cu_seqlens_of(lengths)
            sys.setprofile(note)
            try:
                model.forward_packed(ids, offsets)
            finally:
                sys.setprofile(None)
    most = 85 if cpu.obstacle() is None else 160  # 83 now
    assert max(counts) <= most and max(counts) - min(counts) <= 10, counts
