"""Weights that a checkpoint ties, lacks or has too many of are loaded as transformers loads them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastbert
from model_cases import (
    HEADS,
    MODELS,
    assert_close,
    make_batch,
    randn,
    run,
    theirs,
    twin,
)
from pretrained_cases import (
    WEIGHTS,
    assert_same_outputs,
    assert_same_state,
    edit_weights,
    our_class,
    outputs,
    their_class,
    warnings_of,
)

WITH_DECODER = ("BertForPreTraining", "BertForMaskedLM")


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a cached model of transformers to a folder of its own."""

    def save(name: str = "BertModel", **options: Any) -> Path:
        folder = tmp_path / name
        theirs(name, "tiny", **options).save_pretrained(folder)
        return folder

    return save


# The decoder's ties
def untied_in_file(folder: Path, names: tuple[str, ...]) -> None:
    tensors = {"weight": randn(101, 32, seed=20), "bias": randn(101, seed=21)}
    edit_weights(folder, **{f"cls__predictions__decoder__{name}": tensors[name] for name in names})


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("name", WITH_DECODER)
def test_a_decoder_that_differs_is_not_tied(
    name: str, names: tuple[str, ...], saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a decoder tied by the config though the file holds two tensors, which transformers keeps apart."""
    folder = saved(name)
    untied_in_file(folder, names)
    model = their_class(name).from_pretrained(folder, dtype="auto").eval()
    ours = our_class(name).from_pretrained(folder)
    assert_same_outputs(ours, model, name)
    assert_same_state(ours.state_dict(), model.state_dict())
    for each in names:
        assert any(f"cls.predictions.decoder.{each} and" in w and "differ" in w for w in warnings_of(caplog))
    assert len(warnings_of(caplog)) == len(names)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(their_class(name).from_pretrained(tmp_path / "ours", dtype="auto").eval(), model, name)
    assert_same_outputs(our_class(name).from_pretrained(tmp_path / "ours"), model, name)


@pytest.mark.parametrize(
    "drop",
    [
        ("bert.embeddings.word_embeddings.weight",),
        ("cls.predictions.bias",),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    ],
    ids=["word embeddings", "bias", "both"],
)
@pytest.mark.parametrize("name", WITH_DECODER)
def test_a_tie_works_from_either_side(name: str, drop: tuple[str, ...], saved: Any) -> None:
    """Catches a tied tensor that is lost because the file keeps it under the decoder's name alone."""
    folder = saved(name)
    untied_in_file(folder, ("weight", "bias"))
    edit_weights(folder, drop=drop)
    model = their_class(name).from_pretrained(folder, dtype="auto").eval()
    ours = our_class(name).from_pretrained(folder)
    assert ours.missing_names == []
    assert_same_outputs(ours, model, name)


def test_one_bias_of_an_untied_decoder(saved: Any) -> None:
    """Catches an untied decoder's bias that is lost because transformers 4 stores it as cls.predictions.bias."""
    folder = saved("BertForMaskedLM", tie_word_embeddings=False)
    edit_weights(folder, drop=("cls.predictions.decoder.bias",))
    ours = fastbert.BertForMaskedLM.from_pretrained(folder)
    assert ours.missing_names == []
    predictions = ours.cls.predictions
    assert torch.equal(predictions.decoder.bias, predictions.bias)
    assert predictions.decoder.bias.data_ptr() != predictions.bias.data_ptr()


def test_tied_weights_stay_tied(saved: Any, tmp_path: Path) -> None:
    """Catches two copies of the largest matrix, in memory, in the file or after a cast."""
    ours = fastbert.BertForMaskedLM.from_pretrained(saved("BertForMaskedLM"))
    for model in (ours, ours.to(torch.bfloat16), copy.deepcopy(ours), ours.float()):
        assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    ours.save_pretrained(tmp_path / "ours")
    assert not any("decoder" in name for name in load_file(tmp_path / "ours" / WEIGHTS))


HEAD_WEIGHTS = {
    "BertForPreTraining": [
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ],
    "BertForMaskedLM": [
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
    ],
    "BertForNextSentencePrediction": ["cls.seq_relationship.weight", "cls.seq_relationship.bias"],
    "BertForSequenceClassification": ["classifier.weight", "classifier.bias"],
    "BertForMultipleChoice": ["classifier.weight", "classifier.bias"],
    "BertForTokenClassification": ["classifier.weight", "classifier.bias"],
    "BertForQuestionAnswering": ["qa_outputs.weight", "qa_outputs.bias"],
}


@pytest.mark.parametrize("name", HEADS)
def test_headless_checkpoint_into_a_head(name: str, saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a head of random numbers that nobody was told of, or an encoder that is not the checkpoint's."""
    settings = {"num_labels": 2} if name == "BertForQuestionAnswering" else {}
    ours = our_class(name).from_pretrained(saved(), **settings)
    assert sorted(ours.missing_names) == sorted(HEAD_WEIGHTS[name])
    (warning,) = warnings_of(caplog)
    assert "freshly initialised; train it before use" in warning
    for missing in ours.missing_names:
        assert missing in warning
    encoder = {n.removeprefix("bert."): t for n, t in ours.state_dict().items() if n.startswith("bert.")}
    for weight, tensor in encoder.items():
        assert torch.equal(tensor, theirs().state_dict()[weight]), weight
    assert all(p.device.type == "cpu" and p.dtype == torch.float64 for p in ours.parameters())
    for weight in ours.missing_names:
        tensor = ours.state_dict()[weight]
        if weight.endswith("bias"):
            assert (tensor == 0).all()
        elif "LayerNorm" in weight:
            assert (tensor == 1).all()
        else:
            assert 0.01 < tensor.std() < 0.03, weight


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForNextSentencePrediction"])
def test_checkpoint_without_pooler_into_a_head_that_needs_one(
    name: str, saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pooler of random numbers under a head, unsaid."""
    ours = our_class(name).from_pretrained(saved("BertForMaskedLM"))
    assert ours.missing_names[:2] == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert "bert.pooler.dense.weight, bert.pooler.dense.bias" in warnings_of(caplog)[0]
    assert outputs(ours, name)[0].isfinite().all()


def test_checkpoint_without_pooler_into_bert_model(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pooler_output of random numbers, or a pooler that was left out and is saved."""
    ours = fastbert.BertModel.from_pretrained(saved("BertForMaskedLM"))
    assert ours.pooler is None and ours.missing_names == []
    (warning,) = warnings_of(caplog)
    assert "lacks pooler.dense.weight, pooler.dense.bias: pooler_output will be None" in warning
    output = run(ours, make_batch("none"))
    assert output.pooler_output is None
    expected = run(theirs("BertForMaskedLM").bert, make_batch("none"))
    assert_close("last_hidden_state", output.last_hidden_state, expected.last_hidden_state)
    ours.save_pretrained(tmp_path / "ours")
    assert not any("pooler" in name for name in load_file(tmp_path / "ours" / WEIGHTS))


@pytest.mark.parametrize("name", HEADS)
def test_head_checkpoint_into_bert_model(name: str, saved: Any) -> None:
    """Catches the prefix of a head's checkpoint in the way of the bare model."""
    ours = fastbert.BertModel.from_pretrained(saved(name))
    expected = theirs(name).bert.state_dict()
    assert_same_state(ours.state_dict(), dict(expected))
    assert (ours.pooler is None) == (theirs(name).bert.pooler is None)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize(
    "lost",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.1.attention.self.query.bias",
        "encoder.layer.0.output.LayerNorm.weight",
    ],
)
def test_checkpoint_without_an_encoder_weight(lost: str, prefix: str, saved: Any) -> None:
    """Catches a part of the encoder filled with random numbers, for which no warning would be enough."""
    name = "BertForSequenceClassification" if prefix else "BertModel"
    folder = saved(name)
    edit_weights(folder, drop=(prefix + lost,))
    with pytest.raises(ValueError, match=rf"{folder}: the checkpoint lacks {prefix}{lost}, which {name} needs"):
        our_class(name).from_pretrained(folder)


def test_weights_of_no_use_are_logged(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches weights left unread without a word, among them a misnamed one."""
    folder = saved("BertForPreTraining")
    edit_weights(folder, an_odd__weight=torch.zeros(3))
    with caplog.at_level(logging.INFO, "fastbert"):
        fastbert.BertModel.from_pretrained(folder)
    assert "BertModel does not use" in caplog.text and "an_odd.weight" in caplog.text
    assert "cls.seq_relationship.weight" in caplog.text


def test_a_fresh_model_has_no_missing_names() -> None:
    """Catches missing_names absent from models that were not loaded."""
    for name in MODELS:
        assert twin(theirs(name)).missing_names == []
