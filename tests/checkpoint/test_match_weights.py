"""Names and shapes of a checkpoint are matched with those of a model."""

from __future__ import annotations

import pytest
import torch
import transformers

from checkpoint_cases import TINY
from fastbert.checkpoint.match import Match, match


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def test_match_exact(mlm):
    """Catches equal names that are not matched, or that come in the order of the file instead of the model's."""
    state = mlm.state_dict()
    shuffled = dict(reversed(list(state.items())))
    result = match(shuffled, shapes(state))
    assert isinstance(result, Match)
    assert list(result.state) == list(state)
    assert all(result.state[name] is state[name] for name in state)
    assert result.missing == result.unexpected == []


def test_match_prefix_both_ways(mlm):
    """Catches a head's checkpoint that does not go into the bare model, or a bare one that does not go into a head."""
    head = mlm.state_dict()
    base = mlm.bert.state_dict()
    into_base = match(head, shapes(base))
    assert list(into_base.state) == list(base) and into_base.missing == []
    assert into_base.unexpected == [name for name in head if name.startswith("cls.")]
    into_head = match(base, shapes(head))
    assert list(into_head.state) == ["bert." + name for name in base]
    assert into_head.missing == [name for name in head if name.startswith("cls.")]
    assert into_head.unexpected == []


def test_match_other_prefix():
    """Catches a prefix argument that is ignored, or a name taken for a prefixed one because it begins alike."""
    state = {"base.a": torch.zeros(1), "baseb": torch.zeros(1)}
    result = match(state, {"a": torch.Size([1]), "b": torch.Size([1])}, base_prefix="base.")
    assert list(result.state) == ["a"] and result.missing == ["b"] and result.unexpected == ["baseb"]


def test_match_exact_name_wins_over_prefix():
    """Catches a prefixed name that wins over the exact one in the same checkpoint, or that is not reported."""
    state = {"bert.a": torch.zeros(1), "a": torch.ones(1)}
    result = match(state, {"a": torch.Size([1])})
    assert result.state["a"] is state["a"] and result.unexpected == ["bert.a"]


def test_match_missing_pooler_is_named(mlm):
    """Catches a missing pooler that is not reported by the model's names."""
    expected = shapes(transformers.BertModel(TINY).state_dict())
    assert match(mlm.state_dict(), expected).missing == ["pooler.dense.weight", "pooler.dense.bias"]


@pytest.mark.parametrize(
    ("stored", "lacking"),
    [
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_match_bias_twins(mlm, stored, lacking):
    """Catches a decoder's bias that is lost because the checkpoint stores the other one of its two names."""
    state = mlm.state_dict()
    del state[lacking]
    result = match(state, shapes(mlm.state_dict()))
    assert result.missing == [] and result.unexpected == []
    assert result.state[lacking] is state[stored]

    wants_one = shapes(mlm.state_dict())
    del wants_one[stored]
    result = match(state, wants_one)
    assert result.missing == [] and result.unexpected == []
    assert result.state[lacking] is state[stored]

    both = match(mlm.state_dict(), wants_one)
    assert both.missing == [] and both.unexpected == []


def test_match_bias_twins_that_differ():
    """Catches two different biases taken for one parameter without a report of the one that has no place."""
    state = {"cls.predictions.bias": torch.zeros(2), "cls.predictions.decoder.bias": torch.ones(2)}
    result = match(state, {"cls.predictions.bias": torch.Size([2])})
    assert result.unexpected == ["cls.predictions.decoder.bias"]
    result = match(state, shapes(state))
    assert result.state == state and result.unexpected == []


def test_match_leaves_the_decoder_weight_to_the_model(mlm):
    """Catches a decoder weight that is tied by match, which does not see the config."""
    state = mlm.state_dict()
    del state["cls.predictions.decoder.weight"]
    assert match(state, shapes(mlm.state_dict())).missing == ["cls.predictions.decoder.weight"]


def test_match_does_not_fill_from_a_base_checkpoint(mlm):
    """Catches a bias that is filled in from a checkpoint without a head."""
    assert "cls.predictions.bias" in match(mlm.bert.state_dict(), shapes(mlm.state_dict())).missing


def test_match_lists_every_shape(mlm):
    """Catches a mismatch left out of the message, or one without the setting that explains it."""
    config = transformers.BertConfig.from_dict({**TINY.to_dict(), "vocab_size": 7})
    with pytest.raises(ValueError) as raised:
        match(mlm.state_dict(), shapes(transformers.BertForMaskedLM(config).state_dict()))
    assert str(raised.value) == (
        "4 tensor(s) of the checkpoint do not have the shape that the model expects:\n"
        "  bert.embeddings.word_embeddings.weight: came (101, 32), expected (7, 32)\n"
        "  cls.predictions.bias: came (101,), expected (7,)\n"
        "  cls.predictions.decoder.weight: came (101, 32), expected (7, 32)\n"
        "  cls.predictions.decoder.bias: came (101,), expected (7,)\n"
        "vocab_size: the checkpoint has 101, the model 7"
    )


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        ("num_labels", 5, "num_labels: the checkpoint has 2, the model 5"),
        ("max_position_embeddings", 24, "max_position_embeddings: the checkpoint has 40, the model 24"),
        ("type_vocab_size", 1, "type_vocab_size: the checkpoint has 2, the model 1"),
    ],
)
def test_match_hints(setting, value, hint):
    """Catches a mismatch whose message does not name the setting that explains it."""
    came = transformers.BertForSequenceClassification(TINY).state_dict()
    config = transformers.BertConfig.from_dict(TINY.to_dict())
    setattr(config, setting, value)
    expected = shapes(transformers.BertForSequenceClassification(config).state_dict())
    with pytest.raises(ValueError, match="do not have the shape") as raised:
        match(came, expected)
    assert str(raised.value).endswith("\n" + hint)


def test_match_caps_the_list_and_hints_only_what_it_knows():
    """Catches a list of every tensor for a wrong hidden size, or a setting that is blamed wrongly."""
    came = {f"layer.{i}.weight": torch.zeros(3, 2) for i in range(14)} | {"word_embeddings.weight": torch.zeros(9, 2)}
    expected = {name: torch.Size([5, 4]) for name in came}
    with pytest.raises(ValueError) as raised:
        match(came, expected)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("15 tensor(s)")
    assert len(lines) == 12 and lines[-1] == "  and 5 more"


def test_match_checks_filled_and_renamed_tensors():
    """Catches a wrong shape of a tensor that got its name by prefix or by its twin."""
    state = {"bert.a": torch.zeros(2), "cls.predictions.bias": torch.zeros(3)}
    expected = {"a": torch.Size([1]), "cls.predictions.decoder.bias": torch.Size([4])}
    with pytest.raises(ValueError) as raised:
        match(state, expected)
    assert "a: came (2,), expected (1,)" in str(raised.value)
    assert "cls.predictions.decoder.bias: came (3,), expected (4,)" in str(raised.value)


def test_match_scalar_against_vector():
    """Catches a 0-d tensor, which has no rows to compare, that is not reported."""
    with pytest.raises(ValueError, match=r"classifier\.bias: came \(\), expected \(2,\)$"):
        match({"classifier.bias": torch.tensor(1.0)}, {"classifier.bias": torch.Size([2])})
