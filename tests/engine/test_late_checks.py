"""Kernels note ids beyond their table and changed weights, and the next call raises or follows them.

Tensors on the CPU stand for those of a GPU: the library is told that they are not on the host.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.engine.late_checks import LateChecks, Note, error_of
from fastbert.ops import noting, packing, silent_writes
from graph_cases import StandIn, cheap, encode, make, packed, random_lengths, scale_norm, without_graphs

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
SIZES = {"num_hidden_layers": 1}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Lets tensors on the CPU be where the host would have to wait for them. On a GPU there is nothing to do."""
    if device.type == "cpu":
        monkeypatch.setattr(noting, "possible_on", lambda device: True)
        monkeypatch.setattr(silent_writes, "waits", lambda device: True)
        monkeypatch.setattr(packing, "on_host", lambda device: False)


BAD = {"input_ids": 101, "token_type_ids": 2, "position_ids": 200}


def run(model: Any, lengths: list[int], **bad: int) -> Tensor:
    """Runs random texts, whose fourth token has these ids."""
    ids, cu_seqlens = packed(lengths, model.device)
    arguments = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "position_ids": torch.zeros_like(ids)}
    for name, value in bad.items():
        arguments[name][3] = value
    with torch.no_grad():
        return model.forward_packed(cu_seqlens=cu_seqlens, **arguments)


@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "plain"])
def test_the_next_call_raises(with_graphs: bool, stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches ids beyond a table that nobody hears of, or that end another batch than they should."""
    model = make(device, **SIZES)
    model.cuda_graphs = with_graphs
    right = run(model, [5, 9])
    for name, size in BAD.items():
        for wrong, shown in ((size, str(size)), (-1, "-1"), (2**40, "2147483647 or more")):
            assert run(model, [5, 9], **{name: wrong}).isfinite().all()  # read from within the table
            batch = next(copy.copy(model.engine.checks._numbers)) - 1
            message = rf"^{name}: expected values from 0 to {size - 1}, got {shown} in an earlier call, batch {batch} "
            with pytest.raises(IndexError, match=message):
                fastbert.wait_for_checks(model) if wrong == -1 or device.type == "cuda" else run(model, [5, 9])
            assert torch.equal(run(model, [5, 9]), right)


def test_every_row_of_a_batch_and_no_other(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches a bad id in the last token that is not seen, or one left over in a row of padding that is."""
    model = make(device, **SIZES)
    ids, cu_seqlens = packed([40], device)
    ids[-1] = 101
    with torch.no_grad():
        model.forward_packed(ids, cu_seqlens)
        with pytest.raises(IndexError, match="got 101 in an earlier call, batch 1 of"):
            model.wait_for_checks()
        for n_tokens in (39, 33, 39):
            model.forward_packed(ids[:n_tokens], torch.tensor([0, n_tokens], dtype=torch.int32))
    model.wait_for_checks()
    assert model.engine.graphs.captured() == (64,)


def test_strict_ids(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches strict_ids that a call does not wait for, that a copy loses, or that a graph of before outlives."""
    model = make(device, **SIZES)
    right = run(model, [5, 9])
    model.strict_ids = True
    assert model.options.strict_ids
    for each in (model, copy.deepcopy(model)):
        for _ in range(2):
            with pytest.raises(IndexError, match=r"^input_ids: expected values from 0 to 100, got 101$"):
                run(each, [5, 9], input_ids=101)
        assert torch.equal(run(each, [5, 9]), right)
    head = make(device, kind=fastbert.BertForSequenceClassification, **SIZES)
    head.strict_ids = True
    assert head.bert.strict_ids


def test_gradients_and_hooks_wait(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches ids that a table of PyTorch's is read with, since the kernel that would note them does not run."""
    model = make(device, **SIZES)
    model.policy = fastbert.ops.Policy("triton")
    ids, cu_seqlens = packed([5, 9], device)
    ids[3] = 101
    with pytest.raises(IndexError, match=r"got 101$"):
        model.forward_packed(ids, cu_seqlens)  # with gradients
    model.embeddings.word_embeddings.register_forward_hook(lambda module, args, output: output)
    with torch.no_grad(), pytest.raises(IndexError, match=r"got 101$"):
        model.forward_packed(ids, cu_seqlens)


@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "plain"])
def test_silent_writes(
    with_graphs: bool, stand_in: StandIn, device: torch.device, late: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a write that nobody counts and that more than one batch misses, or that is followed unsaid."""
    model = make(device, **SIZES)
    model.cuda_graphs = with_graphs
    encode(model, [9, 4])
    model.encoder.layer[0].attention.self.query.weight.data.mul_(2.0)
    with caplog.at_level(logging.WARNING, "fastbert"):
        encode(model, [9, 4])
        packing.wait_for(device)
        after = encode(model, [9, 4])
    assert caplog.text.count("without PyTorch's count (through .data, say) before batch 2") == 1
    assert torch.equal(after, without_graphs(model, [9, 4]))
    caplog.clear()
    assert torch.equal(encode(model, [9, 4]), after) and caplog.text == ""
    assert stand_in.captures == (1 if with_graphs else 0), "derived weights are written where they were"


def test_eval_follows_at_once(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches a graph that is launched, and kept, on what was derived before eval() was called."""
    model = make(device, **SIZES)
    for _ in range(2):
        encode(model, [9, 4])
    model.encoder.layer[0].attention.self.query.weight.data.mul_(2.0)
    model.eval()
    assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4]))


def test_a_graph_of_other_weights_is_run_again(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches the result of a graph that was launched before its weights were looked at, or memory it let go of."""
    model = make(device, **SIZES)
    for _ in range(2):
        before = encode(model, [9, 4])
    replays = stand_in.replays
    held = {t.data_ptr() for t in model.engine.graphs._held}
    weight = model.encoder.layer[0].output.dense.weight
    assert {weight.data_ptr(), *(t.data_ptr() for t in model.engine.state.snapshot.derived_tensors())} <= held
    weight.data = weight.data * 2
    after = encode(model, [9, 4])
    assert stand_in.replays == replays + 2 and stand_in.captures == 2
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)


def test_threads(stand_in: StandIn, device: torch.device, late: None) -> None:
    """Catches a thread's batch, or its number, in another thread's static memory."""
    model = make(device, **SIZES)
    cheap(model)
    cases = [(random_lengths(seed, 400), seed) for seed in range(80)]
    with ThreadPoolExecutor(6) as pool:
        outs = list(pool.map(lambda case: encode(model, *case), cases))
        for (lengths, seed), out in zip(cases, outs, strict=True):
            assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
        changes: list[Callable[[], Any]] = [lambda: encode(model, [9, 4])] * 10 + [lambda: scale_norm(model)]
        list(pool.map(lambda call: call(), changes * 3))
    assert next(model.engine.checks._numbers) > 80


def test_words_are_never_lost() -> None:
    """Catches a note between two looks that is taken for the one before, or a number cut in the wrong place."""
    checks = LateChecks()
    assert checks.news() == [] and not checks.active
    words = checks.notes(torch.device("cpu"), 1).words
    for batch, value in ((1, 7), (2, 7), (3, -1), (2**31 - 1, -(2**31))):
        words[1] = (batch << 32) | (value & 0xFFFFFFFF)
        assert checks.news() == [Note(1, batch, value)] and checks.news() == []
    assert str(error_of(Note(2, 4, -(2**31)), 9)).startswith("position_ids: expected values from 0 to 8, got -2147")
