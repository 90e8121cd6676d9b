"""Inputs in other dtypes and layouts, and on other devices, give the right result or a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.adapters import counts
from model_cases import in_dtype, make_batch, theirs, twin, valid_of

NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
HEADS = ("BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM")
WRONG = (torch.int16, torch.int8, torch.uint8, torch.bool, torch.float16, torch.float32, torch.float64)


def call(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**batch)[0]
    return output


def both(name: str) -> tuple[Any, Any, Any]:
    """A model of transformers, the same accelerated, and one of ours."""
    original = in_dtype(theirs(name), torch.float32)
    return original, fastbert.accelerate(in_dtype(original, torch.float32)), twin(original, torch.float32)


def same_numbers(batch: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The batch in other dtypes and layouts."""
    for name in NAMES:
        t = batch[name]
        yield f"{name} int32", {**batch, name: t.int()}
        yield f"{name} transposed", {**batch, name: t.t().contiguous().t()}
        yield f"{name} with gaps", {**batch, name: torch.stack([t, t + 100], -1)[..., 0]}
        yield f"{name} at an odd place", {**batch, name: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)}
    for dtype in WRONG:
        yield f"attention_mask {dtype}", {**batch, "attention_mask": batch["attention_mask"].to(dtype)}
    yield "all int32", {name: t.int() for name, t in batch.items()}
    yield "all transposed", {name: t.t().contiguous().t() for name, t in batch.items()}
    first = batch["position_ids"][:1]
    yield "expanded positions", {**batch, "position_ids": first.expand(batch["position_ids"].shape)}


@pytest.mark.parametrize("name", HEADS)
def test_the_same_numbers_in_another_form(name: str) -> None:
    """Catches a kernel that reads ids as int64 whatever they are, or rows where they would lie without gaps."""
    original, accelerated, ours = both(name)
    n = 0
    for what, batch in same_numbers(make_batch("right")):
        valid = valid_of(batch["attention_mask"])
        expected = call(original, batch)
        for model in (accelerated, ours):
            result = call(model, batch)
            one, other = (t[valid] if t.shape[:2] == valid.shape else t for t in (result, expected))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda m, what=what: f"{what}: {m}")
        n += 1
    assert counts(accelerated) == {"fastbert": n}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("argument", ["input_ids", "token_type_ids", "position_ids"])
def test_ids_of_a_wrong_dtype(name: str, argument: str) -> None:
    """Catches ids that are rounded, or read as something else, where the original refuses them."""
    original, accelerated, ours = both(name)
    for dtype in WRONG:
        batch = make_batch("right")
        batch[argument] = batch[argument].to(dtype)
        with pytest.raises(TypeError, match=rf"{argument}: expected dtype int64 or int32, got {dtype}"):
            call(ours, batch)
        with pytest.raises(Exception) as expected:
            call(original, batch)
        with pytest.raises(type(expected.value)) as raised:
            call(accelerated, batch)
        assert str(raised.value) == str(expected.value)
    assert counts(accelerated) == {"ids that are not int64 or int32": len(WRONG)}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("argument", [*NAMES, "all"])
def test_inputs_on_another_device(name: str, argument: str) -> None:
    """Catches an address on another device read as one on the model's."""
    original, accelerated, ours = both(name)
    batch = make_batch("right")
    batch = {key: t.to("meta") if argument in (key, "all") else t for key, t in batch.items()}
    named = "input_ids" if argument == "all" else argument
    with pytest.raises(ValueError, match=f"{named}: expected a tensor on the model's device cpu, got meta"):
        call(ours, batch)
    outcomes = []
    for model in (original, accelerated):
        try:
            outcomes.append(call(model, batch).device.type)
        except Exception as error:
            outcomes.append(f"{type(error)}: {error}")
    assert outcomes[0] == outcomes[1]
    assert set(counts(accelerated)) == {"inputs on another device"}


def test_packed_ids() -> None:
    """Catches packed ids of another dtype, layout or device that are read as they were not meant."""
    ours = twin(in_dtype(theirs(), torch.float32), torch.float32)
    ids, ends = torch.arange(1, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.no_grad():
        expected = ours.forward_packed(ids, ends)
        for form in (ids.int(), torch.stack([ids, ids + 50], -1)[:, 0]):
            assert torch.equal(ours.forward_packed(form, ends), expected)
        assert torch.equal(ours.forward_packed(ids, ends.long()), expected)
        for wrong, error in ((ids.float(), TypeError), (ids.bool(), TypeError), (ids.to("meta"), ValueError)):
            with pytest.raises(error, match="input_ids"):
                ours.forward_packed(wrong, ends)
        for wrong in (ends.float(), ends.bool()):
            with pytest.raises(TypeError, match="cu_seqlens"):
                ours.forward_packed(ids, wrong)


LABELS = {
    "BertForSequenceClassification": ("labels", torch.tensor([0, 1, 1, 0])),
    "BertForTokenClassification": ("labels", torch.arange(4 * 13).view(4, 13) % 2),
    "BertForMaskedLM": ("labels", torch.arange(4 * 13).view(4, 13)),
    "BertForNextSentencePrediction": ("labels", torch.tensor([0, 1, 1, 0])),
    "BertForQuestionAnswering": ("start_positions", torch.tensor([0, 1, 1, 0])),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    """Catches labels that are rounded to other classes, or fail without their name."""
    model = twin(in_dtype(theirs(name), torch.float32), torch.float32)
    argument, labels = LABELS[name]
    batch = make_batch("none")
    if argument == "start_positions":
        batch["end_positions"] = labels
    expected = call(model, {**batch, argument: labels})
    assert torch.equal(call(model, {**batch, argument: labels.int()}), expected)
    assert torch.equal(call(model, {**batch, argument: torch.stack([labels, labels + 1], -1)[..., 0]}), expected)
    with pytest.raises(ValueError, match=f"{argument}: expected a tensor on the model's device cpu, got meta"):
        call(model, {**batch, argument: labels.to("meta")})
    model.config.problem_type = "single_label_classification"
    with pytest.raises(TypeError, match=rf"{argument}: expected integers, got torch.float32"):
        call(model, {**batch, argument: labels + 0.5})
