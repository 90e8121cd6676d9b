"""CUDA graphs give the bits of the plain path.

Without a GPU a stand-in captures: it runs the function again where a graph replays.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
import fastbert.models.bert
from fastbert.engine import layer_forms
from fastbert.models import tasks
from fastbert_kernels import cpu
from graph_cases import (
    LENGTHS,
    StandIn,
    cheap,
    encode,
    make,
    packed,
    without_graphs,
)
from helpers import rms_error

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_with_graphs_and_without(dtype: torch.dtype, stand_in: StandIn, device: torch.device) -> None:
    """Catches static inputs that differ from the plain path's, or are left over from the batch before."""
    model = make(device, dtype)
    for turn in range(2):
        for lengths in LENGTHS:
            expected = without_graphs(model, lengths, seed=turn)
            assert torch.equal(encode(model, lengths, seed=turn), expected), lengths
    assert stand_in.replays == 2 * len(LENGTHS)


def test_padding_changes_no_more_than_rounding(stand_in: StandIn, device: torch.device) -> None:
    """Catches a text that sees the rows of padding."""
    model = make(device)
    for lengths in LENGTHS:
        exact = model.forward_packed(*packed(lengths, device)).detach()  # with gradients: in exactly T rows
        assert rms_error(encode(model, lengths), exact) < 2e-6, lengths  # of two float32 results


def test_poisoned_padding(stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a NaN in a row of padding, or in memory that no kernel wrote, that reaches a text."""
    from fastbert_kernels import launch

    model = make(device)
    expected = [encode(model, lengths) for lengths in LENGTHS]
    model.engine.graphs.clear()

    def empty(shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), device=like.device, dtype=dtype or like.dtype)

    monkeypatch.setattr(launch, "empty", empty)
    for lengths, right in zip(LENGTHS, expected, strict=True):
        assert torch.equal(encode(model, lengths), right), lengths
        assert torch.equal(without_graphs(model, lengths), right), lengths


def test_segments_positions_and_dtypes(stand_in: StandIn, device: torch.device) -> None:
    """Catches given segments or positions that a graph ignores, keeps for the next batch, or reads as another dtype."""
    model = make(device)
    ids, cu_seqlens = packed([5, 9], device)
    token_type_ids, positions = torch.arange(14, device=device) % 2, torch.arange(14, device=device).flip(0)
    plain = encode(model, [5, 9])
    with torch.no_grad():
        explicit = model.forward_packed(ids, cu_seqlens, token_type_ids, positions)
        narrow = model.forward_packed(ids.int(), cu_seqlens, token_type_ids.int(), positions.int())
        again = model.forward_packed(ids, cu_seqlens)
        model.cuda_graphs = False
        expected = model.forward_packed(ids, cu_seqlens, token_type_ids, positions)
    assert torch.equal(explicit, expected) and torch.equal(narrow, expected)
    assert torch.equal(again, plain) and not torch.equal(explicit, plain)


def test_a_result_stays_as_it_is(stand_in: StandIn, device: torch.device) -> None:
    """Catches a result in the graph's own memory, which the next call overwrites."""
    model = make(device)
    first = encode(model, [9, 4])
    kept = first.clone()
    encode(model, [9, 4], seed=1)
    assert torch.equal(first, kept)


def test_inference_mode_and_no_grad_share_graphs(stand_in: StandIn, device: torch.device) -> None:
    """Catches static memory made in inference mode, which nobody may write to outside of it."""
    model = make(device)
    with torch.inference_mode():
        first = model.forward_packed(*packed([8], device))
    assert torch.equal(encode(model, [8]), first) and stand_in.captures == 1


def test_hidden_states(stand_in: StandIn, device: torch.device) -> None:
    """Catches hidden states that miss a layer or keep rows of padding, or a last one that differs from a graph's."""
    model = make(device)
    ids = packed([7, 7], device)[0].view(2, 7)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        last = model(ids).last_hidden_state
    assert len(output.hidden_states) == 3 and all(state.shape == (2, 7, 32) for state in output.hidden_states)
    assert torch.equal(output.last_hidden_state, last) and torch.equal(output.hidden_states[-1], last)


def test_hidden_states_go_when_they_are_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the layers: all hidden states kept where only the last was asked for."""
    model = make(device, num_hidden_layers=4)
    states: list[Any] = []

    def watch(cls: Any, name: str) -> None:
        run = getattr(cls, name)

        def watched(layer: Any, x: Tensor, *args: Any, **named: Any) -> Tensor:
            assert all(state() is None for state in states[:-1])
            out = run(layer, x, *args, **named)
            states.append(weakref.ref(out))
            return out

        monkeypatch.setattr(cls, name, watched)

    watch(fastbert.models.bert.BertLayer, "forward")
    watch(layer_forms.PostNormLayer, "run")  # which stands for a layer whose modules are its own
    encode(model, [9, 4])
    assert len(states) == 4


@pytest.mark.parametrize(
    "lengths", [[0] * 70 + [3, 0], [0, 0], [100] * 164], ids=["many empty", "no token", "too many"]
)
def test_what_does_not_fit(lengths: list[int], stand_in: StandIn, device: torch.device) -> None:
    """Catches a batch written past the static memory."""
    model = make(device)
    cheap(model)
    out = encode(model, lengths)
    assert out.shape == (sum(lengths), 32) and stand_in.captures == 0
    assert torch.equal(out[:, 0].long(), packed(lengths, device)[0])


def test_sequences_with_tiles_of_their_own(
    stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a work list with more tiles than the static one, from a policy that shares none, written past it."""
    from fastbert_kernels import work_list

    def unshared(cu_seqlens: list[int], *rest: Any) -> Any:
        tiles = [(a, b, a, b, 0) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
        return work_list.WorkList(torch.tensor(tiles, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))

    model = make(device)
    lengths = [1] * 28 + [2]
    expected = without_graphs(model, lengths)
    encode(model, [30])
    monkeypatch.setattr(work_list, "build_work_list", unshared)
    monkeypatch.setattr(cpu, "obstacle", lambda: "switched off")  # or C++ would list the tiles
    captures = stand_in.captures
    assert rms_error(encode(model, lengths), expected) < 2e-6
    assert stand_in.captures == captures == stand_in.replays


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_heads(head: str, stand_in: StandIn, device: torch.device) -> None:
    """Catches a head that goes around the graphs, or gets rows of padding from them."""
    model = make(device, kind=getattr(tasks, head))
    ids = packed([6] * 3, device)[0].view(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [0] * 6], device=device)
    with torch.no_grad():
        with_graphs = model(ids, mask).to_tuple()
        assert stand_in.replays == 1
        model.cuda_graphs = False
        assert model.bert.cuda_graphs is False and model.cuda_graphs is False
        for ours, expected in zip(with_graphs, model(ids, mask).to_tuple(), strict=True):
            assert torch.equal(ours, expected)
    assert stand_in.replays == 1


def test_sentence_encoder(stand_in: StandIn, device: torch.device, minilm: Any) -> None:
    """Catches vectors that depend on graphs, or an encode() that captures anew since it calls eval()."""
    options: dict[str, Any] = {"device": device, "backend": "triton", "num_hidden_layers": 1}
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm, **options, token_budget=64)
    texts = ["A text.", "Another one, that is longer than the first.", "", "Four short words here."]
    first = encoder.encode(texts)
    captures = stand_in.captures
    assert captures > 0 and (encoder.encode(texts) == first).all()
    assert stand_in.captures == captures
    off = fastbert.SentenceEncoder.from_pretrained(minilm, **options, token_budget=64, cuda_graphs=False)
    assert off.model.cuda_graphs is False and (off.encode(texts) == first).all()
