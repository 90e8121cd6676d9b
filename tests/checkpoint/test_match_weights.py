"""Names and shapes of a checkpoint are matched with those of a model."""

from __future__ import annotations

import pytest
import torch
import transformers

from checkpoint_cases import TINY, random_mlm, six_tensors
from fastbert.checkpoint.files import Match, match


@pytest.fixture(scope="module")
def mlm():
    return random_mlm()


@pytest.fixture
def state():
    return six_tensors()


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def test_match_exact(mlm):
    """Equal names in, equal names out, in the model's order, whatever the order of the file."""
    state = mlm.state_dict()
    shuffled = dict(reversed(list(state.items())))
    result = match(shuffled, shapes(state))
    assert isinstance(result, Match)
    assert list(result.state) == list(state)
    assert all(result.state[name] is state[name] for name in state)
    assert result.missing == result.unexpected == []


def test_match_prefix_both_ways(mlm):
    """A head's checkpoint into the bare model, the bare model's checkpoint into a head."""
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
    """The prefix is an argument, and only a whole prefix counts."""
    state = {"base.a": torch.zeros(1), "baseb": torch.zeros(1)}
    result = match(state, {"a": torch.Size([1]), "b": torch.Size([1])}, base_prefix="base.")
    assert list(result.state) == ["a"] and result.missing == ["b"] and result.unexpected == ["baseb"]


def test_match_exact_name_wins_over_prefix():
    """A checkpoint with both forms of a name: the exact one is taken, the other one reported."""
    state = {"bert.a": torch.zeros(1), "a": torch.ones(1)}
    result = match(state, {"a": torch.Size([1])})
    assert result.state["a"] is state["a"] and result.unexpected == ["bert.a"]


def test_match_missing_pooler_is_named(mlm):
    """A missing pooler must be reported by the model's names."""
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
    """Checkpoints store one of the decoder's two bias names; a model may expect one or both."""
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
    """Two different biases cannot be one parameter: the one without a place is reported."""
    state = {"cls.predictions.bias": torch.zeros(2), "cls.predictions.decoder.bias": torch.ones(2)}
    result = match(state, {"cls.predictions.bias": torch.Size([2])})
    assert result.unexpected == ["cls.predictions.decoder.bias"]
    result = match(state, shapes(state))
    assert result.state == state and result.unexpected == []


def test_match_leaves_the_decoder_weight_to_the_model(mlm):
    """Tying is decided by the config, which match does not see."""
    state = mlm.state_dict()
    del state["cls.predictions.decoder.weight"]
    assert match(state, shapes(mlm.state_dict())).missing == ["cls.predictions.decoder.weight"]


def test_match_does_not_fill_from_a_base_checkpoint(mlm):
    """A checkpoint without a head has no bias to fill from."""
    assert "cls.predictions.bias" in match(mlm.bert.state_dict(), shapes(mlm.state_dict())).missing


def test_match_lists_every_shape(mlm):
    """All mismatches in one message, by the model's names, with the setting that explains them."""
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
    """The setting that explains a mismatch must be named."""
    came = transformers.BertForSequenceClassification(TINY).state_dict()
    config = transformers.BertConfig.from_dict(TINY.to_dict())
    setattr(config, setting, value)
    expected = shapes(transformers.BertForSequenceClassification(config).state_dict())
    with pytest.raises(ValueError, match="do not have the shape") as raised:
        match(came, expected)
    assert str(raised.value).endswith("\n" + hint)


def test_match_caps_the_list_and_hints_only_what_it_knows():
    """A wrong hidden size touches every tensor: ten are listed, the rest counted, and no setting is blamed wrongly."""
    came = {f"layer.{i}.weight": torch.zeros(3, 2) for i in range(14)} | {"word_embeddings.weight": torch.zeros(9, 2)}
    expected = {name: torch.Size([5, 4]) for name in came}
    with pytest.raises(ValueError) as raised:
        match(came, expected)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("15 tensor(s)")
    assert len(lines) == 12 and lines[-1] == "  and 5 more"


def test_match_checks_filled_and_renamed_tensors():
    """A tensor that got its name by prefix or by its twin must have the right shape too."""
    state = {"bert.a": torch.zeros(2), "cls.predictions.bias": torch.zeros(3)}
    expected = {"a": torch.Size([1]), "cls.predictions.decoder.bias": torch.Size([4])}
    with pytest.raises(ValueError) as raised:
        match(state, expected)
    assert "a: came (2,), expected (1,)" in str(raised.value)
    assert "cls.predictions.decoder.bias: came (3,), expected (4,)" in str(raised.value)


def test_match_scalar_against_vector():
    """A 0-d tensor has no rows to compare and must still be reported."""
    with pytest.raises(ValueError, match=r"classifier\.bias: came \(\), expected \(2,\)$"):
        match({"classifier.bias": torch.tensor(1.0)}, {"classifier.bias": torch.Size([2])})
