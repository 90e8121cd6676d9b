"""The host waits for a GPU in no call: on the device "meta", which has no numbers, whoever waits for one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastbert
from device_stand_in import META, EmptyGraphs, bert, install
from fastbert.ops import masked, packing
from fastbert.pipelines.modules import Normalize
from helpers import cu_seqlens_of

TEXTS = ["how to sort a list of numbers", "a list", "numbers and more of it", "", "more to sort"]
TOKENIZER = fastbert.Tokenizer.train(TEXTS, vocab_size=90)
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
N_BATCHES = 1000


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> EmptyGraphs:
    """The graphs on "meta", which stands for a GPU."""
    return install(monkeypatch.setattr)


def on_gpu(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device=META)


def random_mask(seed: int) -> Tensor:
    return torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)) < 0.7


def forward(model: Any, i: int) -> None:
    """Calls the model without a mask and with one on the host, on ids on the device and on the host."""
    ids = on_gpu(3, 20) if i % 3 else torch.zeros(3, 20, dtype=torch.int64)
    types = on_gpu(3, 20) if i % 5 == 0 else None
    assert model(ids, None if i % 2 else random_mask(i), types).last_hidden_state.shape == (3, 20, 32)


def forward_packed(model: Any, i: int) -> None:
    lengths = [1 + i % 19, 7, 0, 1 + i % 5]
    positions = on_gpu(sum(lengths)) if i % 7 == 0 else None
    assert model.forward_packed(on_gpu(sum(lengths)), cu_seqlens_of(lengths), None, positions).device == META


def forward_masked(model: Any, i: int) -> None:
    """Calls the model on the device, mask and all, in shapes up to the most that may stay there."""
    batch_size, length = 1 + i * 7 % 32, 1 + i % 60
    if batch_size * length > masked.MOST_PLACES:
        batch_size = masked.MOST_PLACES // length
    ids = on_gpu(batch_size, length)
    mask = torch.ones_like(ids) if i % 2 else torch.ones_like(ids, dtype=torch.bool)
    output = model(ids, mask, ids if i % 3 else None, ids if i % 5 == 0 else None)
    assert output.last_hidden_state.shape == (batch_size, length, 32)


@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("call", [forward, forward_packed, forward_masked], ids=lambda call: call.__name__)
def test_no_model_waits(call: Callable[[Any, int], None], with_graphs: bool, graphs: EmptyGraphs) -> None:
    """Catches a look at ids, masks, lengths or weights for which a call waits, in any of 1,000 batches."""
    model = bert(**SIZES)
    model.cuda_graphs = with_graphs
    n_batches = N_BATCHES if with_graphs else N_BATCHES // 10
    with torch.inference_mode():
        for i in range(n_batches):
            call(model, i)
    assert graphs.replays == (n_batches if with_graphs else 0)


@pytest.mark.parametrize("tail", [(), (Normalize(),)], ids=["mean", "normalised"])
def test_encode_does_not_wait(tail: Any, graphs: EmptyGraphs) -> None:
    """Catches a batch of texts for which `encode` waits before the vectors are read."""
    encoder = fastbert.SentenceEncoder(bert(**SIZES), TOKENIZER, "mean", tail)
    vectors = encoder.encode(TEXTS * (N_BATCHES // len(TEXTS)), batch_size=1, convert_to_tensor=True)
    assert vectors.shape == (N_BATCHES, 32) and vectors.device == META and graphs.replays == N_BATCHES


def test_predict_does_not_wait(graphs: EmptyGraphs) -> None:
    """Catches a batch of pairs for which `predict` waits before the scores are read."""
    encoder = fastbert.CrossEncoder(bert(fastbert.BertForSequenceClassification, **SIZES, num_labels=1), TOKENIZER)
    pairs = [(text, "a list") for text in TEXTS] * (N_BATCHES // len(TEXTS))
    scores = encoder.predict(pairs, batch_size=1, convert_to_tensor=True)
    assert scores.shape == (N_BATCHES,) and graphs.replays == N_BATCHES


def test_a_large_mask_on_the_device_is_waited_for_once(graphs: EmptyGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second wait for a mask, whose number of tokens is needed, or one for the places of the tokens."""
    waits: list[int] = []
    mask = torch.tensor([[1] * 20, [1] * 5 + [0] * 15, [0] * 20] * 10)
    holes = torch.tensor([[0] + [1] * 19, [1, 0] * 10, [1] * 20] * 10)
    shape_of = packing._shape_of
    for on_host in (mask, holes):
        monkeypatch.setattr(packing, "_shape_of", lambda valid, m=on_host: waits.append(1) or shape_of(m != 0))
        with torch.inference_mode():
            assert bert(**SIZES)(on_gpu(30, 20), on_host.to(META)).last_hidden_state.shape == (30, 20, 32)
    assert waits == [1, 1]


def test_this_device_shows_waits(graphs: EmptyGraphs) -> None:
    """Catches a stand-in on which nothing would show a wait."""
    model = bert(**SIZES)
    model.strict_ids = True
    with torch.inference_mode(), pytest.raises((RuntimeError, NotImplementedError)):
        model.forward_packed(on_gpu(5), cu_seqlens_of([5]))
    model.strict_ids = False
    with torch.inference_mode(), pytest.raises((RuntimeError, NotImplementedError)):
        model.forward_packed(on_gpu(5), cu_seqlens_of([5]).to(META))  # lengths are needed on the host


def test_ids_on_the_host_are_checked_there(graphs: EmptyGraphs) -> None:
    """Catches ids that come from the host and are checked later than in their own call."""
    model = bert(**SIZES)
    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(IndexError, match=r"^input_ids: expected values from 0 to \d+, got 90$"):
                model.forward_packed(torch.full((5,), 90), cu_seqlens_of([5]))
            model.forward_packed(torch.zeros(5, dtype=torch.int64), cu_seqlens_of([5]))
        with pytest.raises(IndexError, match="position_ids: expected values from 0 to 63, got 64"):
            model.forward_packed(on_gpu(65), cu_seqlens_of([65]))


@pytest.mark.parametrize("seed", range(5))
def test_masks_on_the_host_and_elsewhere_are_packed_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a token in another row, or at another position, where a mask is not on the host."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=random) < 0.6
    if seed % 2:
        mask = torch.arange(9) < torch.randint(0, 10, (4, 1), generator=random)
    expected = packing.unpad(mask)
    monkeypatch.setattr(packing, "on_host", lambda device: False)
    ours = packing.unpad(mask)
    for name in ("cu_seqlens", "cu_seqlens_cpu", "position_ids", "indices"):
        a, b = getattr(ours, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name in ("batch_size", "padded_length", "first_column", "last_position", "n_tokens"):
        assert getattr(ours, name) == getattr(expected, name), name
    assert np.array_equal(mask.flatten().nonzero()[:, 0], ours.indices)
