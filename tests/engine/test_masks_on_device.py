"""Batches whose mask stays on the device have the bits of those whose lengths the host knows.

Tensors on the CPU stand for those of a GPU: the library is told that they are not on the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from family_cases import theirs, twin
from fastbert.engine import masks
from fastbert.ops import masked, noting, packing, silent_writes
from graph_cases import StandIn, make
from helpers import rms_error

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

FORMS = {
    "right": [[1] * 8, [1] * 3 + [0] * 5, [1] * 6 + [0] * 2],
    "left": [[1] * 8, [0] * 5 + [1] * 3],
    "holes": [[1, 0, 0, 1, 1, 0, 1], [0] * 7, [0, 1, 1, 0, 1, 1, 0]],
    "no token": [[0] * 5, [0] * 5],
    "one text": [[0, 1, 1, 1, 0]],
    "one column": [[1], [0], [1]],
    "one place": [[1]],
}  # all of them in the rows of the smallest bucket, padding or not


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[Tensor]:
    """Lets tensors on the CPU be where the host would have to wait for them. Returns the masks it waited for."""
    waited: list[Tensor] = []
    shape_of = packing._shape_of
    monkeypatch.setattr(packing, "_shape_of", lambda valid: waited.append(valid) or shape_of(valid))
    if device.type == "cpu":
        monkeypatch.setattr(noting, "possible_on", lambda device: True)
        monkeypatch.setattr(silent_writes, "waits", lambda device: True)
        monkeypatch.setattr(packing, "on_host", lambda device: False)
    return waited


def family(model_type: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    n_layers = 2 if model_type == "modernbert" else 1  # the second one has a window
    return twin(
        theirs(model_type, num_hidden_layers=n_layers),
        dtype=dtype,
        **{"backend": "triton", "device": device, **options},
    )


def batch_of(form: list[list[int]], device: torch.device, model: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask); the padding id stands at padding."""
    mask = torch.tensor(form)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, mask.shape, generator=random)
    return ids.masked_fill(mask == 0, model.config.pad_token_id or 0).to(device), mask.to(device)


def run(model: Any, *args: Tensor, wait: bool = False, **arguments: Any) -> Any:
    before, masked.MOST_PLACES = masked.MOST_PLACES, 0 if wait else masked.MOST_PLACES
    try:
        with torch.no_grad():
            return model(*args, **arguments)
    finally:
        masked.MOST_PLACES = before


@pytest.mark.parametrize(
    ("model_type", "invariant", "graphs"),
    [("roberta", False, True), ("roberta", False, False), ("mpnet", True, True), ("modernbert", False, True),
     ("modernbert", True, False), ("nomic_bert", False, True)],
)  # fmt: skip
def test_same_bits_as_with_lengths(
    model_type: str,
    invariant: bool,
    graphs: bool,
    stand_in: StandIn,
    device: torch.device,
    elsewhere: list[Tensor],
) -> None:
    """Catches a token that is packed elsewhere, a neighbour's keys, and what a batch leaves to the next one."""
    model = family(model_type, device, batch_invariant=invariant)
    model.cuda_graphs = graphs
    batches = [batch_of(form, device, model, i) for i, form in enumerate(FORMS.values())]
    expected = [run(model, *batch, wait=True)[0] for batch in batches]
    n_waits = len(elsewhere)
    assert n_waits == len(FORMS)
    replays = stand_in.replays
    for (ids, mask), right in zip(batches, expected, strict=True):
        assert torch.equal(run(model, ids, mask)[0], right) and right.isfinite().all()
    assert len(elsewhere) == n_waits and stand_in.replays - replays == (len(FORMS) if graphs else 0)
    assert not stand_in.errors


def test_up_to_the_most_places(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches lists of tiles that are too short for what a mask leaves, and rows of padding that reach a text."""
    model = make(device, num_hidden_layers=1)
    for batch_size, length in ((170, 3), (2, 190)):
        random = torch.Generator().manual_seed(length)
        mask = (torch.arange(length) < torch.randint(0, length + 1, (batch_size, 1), generator=random)).to(device)
        ids = torch.randint(1, 90, mask.shape, generator=random).to(device)
        expected = run(model, ids, mask, wait=True)
        n_waits = len(elsewhere)
        ours = run(model, ids, mask)
        assert len(elsewhere) == n_waits
        for name in ("last_hidden_state", "pooler_output"):
            assert rms_error(ours[name], expected[name]) < 2e-6, (batch_size, length, name)  # other numbers of rows
    assert not stand_in.errors


def test_in_8_bits(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches 8-bit operations that ask the host for lengths."""
    model = make(device, torch.bfloat16, num_hidden_layers=1)
    model.precision = "int8"
    ids, mask = batch_of(FORMS["holes"], device, model)
    expected, n_waits = run(model, ids, mask, wait=True)[0], len(elsewhere)
    assert torch.equal(run(model, ids, mask)[0], expected) and len(elsewhere) == n_waits


HEADS = [fastbert.BertForMaskedLM, fastbert.BertForSequenceClassification, fastbert.BertForTokenClassification,
         fastbert.BertForQuestionAnswering, fastbert.BertForNextSentencePrediction, fastbert.BertForMultipleChoice,
         fastbert.BertForPreTraining]  # fmt: skip


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_heads(kind: Any, stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches a head that reads a row of padding, or leaves something else than zeros there."""
    model = make(device, kind=kind, num_hidden_layers=1)
    for form in ("left", "no token"):
        ids, mask = batch_of(FORMS[form], device, model)
        if kind is fastbert.BertForMultipleChoice:
            ids, mask = ids[:, None], mask[:, None]
        expected, n_waits = run(model, ids, mask, wait=True, return_dict=False), len(elsewhere)
        ours = run(model, ids, mask, return_dict=False)
        assert len(elsewhere) == n_waits
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5), form
            assert a.dim() < 3 or not a[mask == 0].any()


def test_labels(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches labels of padding that enter a loss."""
    model = make(device, kind=fastbert.BertForTokenClassification, num_hidden_layers=1)
    ids, mask = batch_of(FORMS["holes"], device, model)
    labels = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1)).to(device)
    expected = run(model, ids, mask, labels=labels, wait=True).loss
    assert torch.allclose(run(model, ids, mask, labels=labels).loss, expected)
    assert not torch.allclose(run(model, ids, torch.ones_like(mask), labels=labels).loss, expected)


def test_segments_positions_and_dtypes(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches ids that a kernel leaves out, or reads in another dtype, and a mask of other numbers than integers."""
    model = make(device, num_hidden_layers=1)
    ids, mask = batch_of(FORMS["left"], device, model)
    types, positions = ids % 2, torch.arange(8, device=device).flip(0)[None]
    expected = run(model, ids, mask, types, positions, wait=True)[0]
    n_waits = len(elsewhere)
    for other in (mask, mask.bool(), mask.float() * 0.5, mask.int(), mask.half()):
        assert torch.equal(run(model, ids.int(), other, types.int(), positions.int())[0], expected)
    assert torch.equal(run(model, ids.t().contiguous().t(), mask[:, :], types, positions)[0], expected)
    assert not torch.equal(run(model, ids, mask, types)[0], expected)
    assert torch.equal(run(model, ids, mask[:1], types, positions)[0][0], expected[0])
    assert len(elsewhere) == n_waits


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
def test_ids_are_checked_late_and_not_at_padding(
    graphs: bool, stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]
) -> None:
    """Catches an id beyond its table that nobody hears of, and one at padding that somebody hears of."""
    model = make(device, num_hidden_layers=1)
    model.cuda_graphs = graphs
    ids, mask = batch_of(FORMS["right"], device, model)
    ids[1, 5] = 10**6
    for _ in range(2):
        assert run(model, ids, mask)[0].isfinite().all()
    ids[1, 2] = 101
    assert run(model, ids, mask)[0].isfinite().all()
    with pytest.raises(IndexError, match=r"^input_ids: expected values from 0 to 100, got 101 in an earlier call"):
        run(model, ids, mask)
    model.strict_ids = True
    with pytest.raises(IndexError, match=r"^input_ids: expected values from 0 to 100, got 101$"):
        run(model, ids, mask)


def test_what_waits_says_why(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches a batch that waits without a reason, or whose result differs where it waits."""
    model = make(device, num_hidden_layers=1)
    ids, mask = batch_of(FORMS["right"], device, model)
    expected = run(model, ids, mask)
    with torch.no_grad():
        assert not elsewhere and not list(masks.obstacles(model))
    tensors = ids, None, None
    assert masks.batch_obstacle(model, mask, tensors) is None
    states = run(model, ids, mask, output_hidden_states=True)
    assert len(elsewhere) == 1 and torch.equal(states.last_hidden_state, expected.last_hidden_state)
    with torch.enable_grad():
        assert torch.allclose(model(ids, mask)[0], expected[0], atol=1e-5)
        assert any("gradients are on" in reason for reason in masks.obstacles(model))
    large = torch.ones(3, 200, device=device)
    assert "600 places" in str(masks.batch_obstacle(model, large, tensors))
    assert "more columns" in str(masks.batch_obstacle(model, torch.ones(1, 201, device=device), tensors))
    assert "embeddings" in str(masks.batch_obstacle(model, mask, (None, None, None)))
    model.strict_ids = True
    assert any("strict_ids" in reason for reason in masks.obstacles(model))
    hook = model.encoder.layer[0].register_forward_hook(lambda *args: None)
    model.strict_ids = False
    n_waits = len(elsewhere)
    assert torch.allclose(run(model, ids, mask)[0], expected[0], atol=1e-5) and len(elsewhere) == n_waits + 1
    hook.remove()


def test_a_change_between_two_batches(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches a graph of old weights, or a hook that a graph passes by, where lengths are not known yet."""
    model = make(device, num_hidden_layers=1)
    ids, mask = batch_of(FORMS["holes"], device, model)
    before = [run(model, ids, mask)[0] for _ in range(2)][-1]
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(2.0)
    expected = run(model, ids, mask, wait=True)[0]
    model.engine.graphs.trusted = True
    assert torch.equal(run(model, ids, mask)[0], expected) and not torch.equal(before, expected)
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(0.5)
    assert torch.equal(run(model, ids, mask)[0], before)
    calls: list[int] = []
    model.encoder.layer[0].register_forward_hook(lambda *args: calls.append(1))
    assert torch.allclose(run(model, ids, mask)[0], before, atol=1e-5) and calls == [1]


def test_many_short_texts_keep_their_bits(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches a batch-invariant list without room for a tile for each text of a few tokens."""
    model = make(device, num_hidden_layers=1)
    model.policy = fastbert.ops.Policy("triton", True, batch_invariant=True)
    ids = torch.arange(1, 21, device=device).view(20, 1)  # a graph of their bucket has 8 such tiles
    for captured in (False, True):
        assert bool(stand_in.captures) is captured
        replays = stand_in.replays
        ours = run(model, ids, torch.ones_like(ids))[0]
        assert not elsewhere and stand_in.replays == replays
        assert torch.equal(run(model, ids[4:6], torch.ones_like(ids[4:6]))[0], ours[4:6])
        assert stand_in.replays == replays + 1


def test_hooks_on_a_head(stand_in: StandIn, device: torch.device, elsewhere: list[Tensor]) -> None:
    """Catches a hook that sees rows in other places than the mask has them."""
    model = make(device, kind=fastbert.BertForTokenClassification, num_hidden_layers=1)
    ids, mask = batch_of(FORMS["left"], device, model)
    expected, seen = run(model, ids, mask).logits, []
    model.classifier.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    assert torch.allclose(run(model, ids, mask).logits, expected, atol=1e-6) and not elsewhere
    assert seen[0].shape == (2, 8, 32) and not seen[0][mask == 0].any()
