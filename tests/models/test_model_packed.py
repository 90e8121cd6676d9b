"""BertModel.forward_packed gives what the padded model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbert.ops import packing
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import (
    GRADIENT_BOUND,
    TYPES,
    VOCAB,
    assert_close,
    assert_gradients,
    in_dtype,
    make_batch,
    place,
    pooled,
    run,
    theirs,
    trainable,
    twin,
    valid_of,
    weighted_sum,
)


@pytest.fixture(scope="module")
def long_model() -> Any:
    """One layer, with the 512 positions of BERT."""
    return theirs("BertModel", "tiny", num_hidden_layers=1, max_position_embeddings=512)


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    longest = max(lengths, default=0)
    shape = len(lengths), longest
    return {
        "input_ids": torch.randint(VOCAB, shape, generator=random),
        "token_type_ids": torch.randint(TYPES, shape, generator=random),
        "attention_mask": (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(),
    }


def packed_matches(model: Any, lengths: list[int]) -> None:
    batch = padded_batch(lengths)
    valid = batch["attention_mask"] != 0
    ours = twin(model)
    with torch.no_grad():
        packed = ours.forward_packed(batch["input_ids"][valid], cu_seqlens_of(lengths), batch["token_type_ids"][valid])
        assert packed.shape == (sum(lengths), 32) and packed.dtype == torch.float64
        if sum(lengths):
            filled = torch.tensor(lengths) > 0
            other = run(model, {n: t[filled] for n, t in batch.items()})
            assert_close("packed", packed, other.last_hidden_state[valid[filled]])
        padded = run(ours, batch)
    assert_close("padded", padded.last_hidden_state[valid], packed)
    assert (padded.last_hidden_state[~valid] == 0).all()
    expected = pooled(model, padded.last_hidden_state, valid)
    assert_close("pooler_output", padded.pooler_output, expected)


short_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)
many_ones = st.lists(st.integers(0, 2), min_size=20, max_size=80)
edge_lengths = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 127, 128, 129, 511, 512]), min_size=1, max_size=4)
one_long = st.builds(
    lambda long, short, at: [*short[:at], long, *short[at:]],
    st.integers(256, 512),
    st.lists(st.integers(0, 9), min_size=3, max_size=8),
    st.integers(0, 8),
)


@settings(deadline=None, max_examples=40)
@given(st.one_of(short_lengths, many_ones, edge_lengths, one_long))
def test_packed_matches_transformers(long_model: Any, lengths: list[int]) -> None:
    """Catches lengths at which a token is lost, doubled or sees a neighbouring sequence."""
    packed_matches(long_model, lengths)


@pytest.mark.parametrize(
    "lengths",
    [[1], [512], [511, 512], [1] * 70, [400, 1, 2, 3], [0, 5, 0, 0, 3, 0], [0], [0, 0], [], [7, 3, 7, 3, 7], [4, 4, 4]],
    ids=str,
)
def test_packed_lengths(long_model: Any, lengths: list[int]) -> None:
    """Catches a token that is lost, doubled or sees a neighbour, at the lengths that break packings."""
    packed_matches(long_model, lengths)


@pytest.mark.parametrize("lengths", [[511, 1, 0, 2], [1] * 40, [0, 17, 130, 0], [64, 63, 65]], ids=str)
def test_packed_kernels_are_as_accurate(long_model: Any, lengths: list[int], device: torch.device) -> None:
    """Catches kernels that err where a tile holds several short sequences or part of a long one."""
    batch = padded_batch(lengths)
    valid = batch["attention_mask"] != 0
    ours, eager = twin(long_model, torch.float32, "triton", device), in_dtype(long_model, torch.float32, device)
    filled = torch.tensor(lengths) > 0
    batch = {n: t[filled] for n, t in batch.items()}
    reference = in_dtype(in_dtype(long_model, torch.float32), torch.float64)
    other, expected = (run(each, batch).last_hidden_state.cpu()[valid[filled]] for each in (eager, reference))
    input_ids, token_type_ids = (batch[n][valid[filled]].to(device) for n in ("input_ids", "token_type_ids"))
    with torch.no_grad():
        packed = ours.forward_packed(input_ids, cu_seqlens_of(lengths, device), token_type_ids)
    assert_as_accurate("packed", packed.cpu(), other, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_packed_is_each_sequence_alone(backend: str, device: torch.device) -> None:
    """Catches a sequence that changes with its neighbours, beyond rounding."""
    model, lengths = theirs(), [5, 0, 1, 17, 1, 33]
    at = place(backend, device)
    ours = twin(model, torch.float32, backend, at)
    ids = torch.randint(VOCAB, (sum(lengths),), device=at)
    with torch.no_grad():
        packed = ours.forward_packed(ids, cu_seqlens_of(lengths, at))
        for part, expected in zip(ids.split(lengths), packed.split(lengths), strict=True):
            if len(part):
                assert_close("alone", ours(part[None])[0][0], expected, 1e-6)
                assert_close("transformers", model(part[None].cpu())[0][0].float(), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_cu_seqlens_dtype_and_device(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches offsets that must be of one dtype or on one device, though from_cu_seqlens promises both."""
    at = place(backend, device)
    ours = twin(theirs(), torch.float32, backend, at)
    ids = torch.randint(VOCAB, (12,), device=at)
    with torch.no_grad():
        expected = ours.forward_packed(ids, cu_seqlens_of([3, 0, 9], at))
        for offsets_at in ("cpu", at):
            offsets = cu_seqlens_of([3, 0, 9]).to(offsets_at, dtype)
            assert torch.equal(ours.forward_packed(ids, offsets), expected)


def test_packed_positions_and_types() -> None:
    """Catches explicit positions or types that packed execution ignores."""
    ours, batch = twin(theirs()), make_batch("holes")
    valid = valid_of(batch["attention_mask"])
    packed = ours.forward_packed(
        batch["input_ids"][valid],
        cu_seqlens_of(valid.sum(1).tolist()),
        batch["token_type_ids"][valid],
        batch["position_ids"][valid],
    )
    assert_close("packed", packed, run(ours, batch)[0][valid])


def test_packed_trains() -> None:
    """Catches forward_packed without a graph, or with gradients of its own."""
    model, batch = trainable("tiny"), make_batch("right")
    ours, padded = twin(model), twin(model)
    valid = valid_of(batch["attention_mask"])
    input_ids, token_type_ids, positions = (batch[n][valid] for n in ("input_ids", "token_type_ids", "position_ids"))
    packed = ours.forward_packed(input_ids, cu_seqlens_of([13, 9, 1, 5]), token_type_ids, positions)
    weighted_sum({"hidden": packed}).backward()
    weighted_sum({"hidden": padded(**batch).last_hidden_state[valid]}).backward()
    assert_gradients(ours, padded, GRADIENT_BOUND)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pack_and_pad_are_inverse(data: st.DataObject) -> None:
    """Catches a token that lands in another row or column on its way through packing."""
    rows, columns = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 9))
    cells = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    attention_mask = torch.tensor(cells, dtype=torch.bool).reshape(rows, columns)
    batch = packing.unpad(attention_mask)
    x = torch.arange(1.0, rows * columns * 3 + 1).reshape(rows, columns, 3)
    packed = packing.pack(x, batch)
    assert torch.equal(packed, x[attention_mask])
    assert torch.equal(packing.pad(packed, batch), x * attention_mask[:, :, None])
    assert batch.cu_seqlens.tolist() == [0, *attention_mask.sum(1).cumsum(0).tolist()]
    assert batch.cu_seqlens.dtype == batch.cu_seqlens_cpu.dtype == torch.int32
    assert torch.equal(batch.position_ids, attention_mask.nonzero()[:, 1])
    assert torch.equal(batch.seq_ids.long(), attention_mask.nonzero()[:, 0])
