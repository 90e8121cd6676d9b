"""Checkpoints of BERT's family are read and written in transformers' files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from family_cases import KINDS, OTHERS, WITH_HEADS, head_batch, make_batch, run, their_class, theirs
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.files import BIN, SAFETENSORS, SAFETENSORS_INDEX
from model_cases import assert_close

# (model_type, our class) of every head, and of the bare models
EVERY = [*((model_type, "BertModel") for model_type in OTHERS), *WITH_HEADS]


def assert_same(mine: Any, other: Any, name: str, model_type: str) -> None:
    batch = head_batch(model_type, name, "none")
    for field, value in run(mine, batch).items():
        assert_close(field, value, run(other, batch)[field])


@pytest.mark.parametrize(
    ("model_type", "name", "tie"),
    [*((*case, True) for case in EVERY), *((model_type, "BertForMaskedLM", False) for model_type in OTHERS)],
)
def test_round_trip(model_type: str, name: str, tie: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a weight that is lost, cast, renamed or started afresh on the way from transformers to us and back."""
    model = theirs(model_type, name, tie_word_embeddings=tie)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(fastbert, name).from_pretrained(tmp_path / "theirs")
    assert ours.dtype == torch.float64 and ours.missing_names == []
    assert_same(ours, model, name, model_type)

    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / SAFETENSORS)) == set(load_file(tmp_path / "theirs" / SAFETENSORS))
    cls = their_class(model_type, name)
    back, info = cls.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for stored, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[stored], tensor), stored
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [cls.__name__]
    again = getattr(fastbert, name).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[n], tensor) for n, tensor in ours.state_dict().items())
    assert [r.getMessage() for r in caplog.records if r.name == "fastbert" and r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("model_type", KINDS)
def test_forms_of_a_checkpoint(model_type: str, tmp_path: Path) -> None:
    """Catches names with the head's prefix, shards, or a pickle that the family's table is not applied to."""
    model = theirs(model_type, "BertForTokenClassification")
    base = model.base_model
    model.save_pretrained(tmp_path / "prefix")
    base.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert (tmp_path / "sharded" / SAFETENSORS_INDEX).is_file()
    base.config.save_pretrained(tmp_path / "bin")
    old = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(old | {f"{FAMILIES[model_type].prefix}embeddings.position_ids": torch.arange(4)},
               tmp_path / "bin" / BIN)  # fmt: skip
    expected = run(base, make_batch(model_type, "none")).last_hidden_state
    for form in ("prefix", "sharded", "bin"):
        ours = fastbert.BertModel.from_pretrained(tmp_path / form)
        assert_close(form, run(ours, make_batch(model_type, "none")).last_hidden_state, expected)
        ours.save_pretrained(tmp_path / f"{form} again", max_shard_size=20_000)
        again = their_class(model_type, "BertModel").from_pretrained(tmp_path / f"{form} again", dtype="auto")
        assert_close(form, run(again, make_batch(model_type, "none")).last_hidden_state, expected)


def test_what_a_checkpoint_lacks_has_its_own_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches weights reported under names that are not in the file, where the user looks for them in vain."""
    theirs("distilbert").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "fastbert"):
        ours = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    assert ours.missing_names == ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight",
                                  "classifier.out_proj.bias"]  # fmt: skip
    assert (
        "lacks pre_classifier.weight, pre_classifier.bias, classifier.weight, classifier.bias: freshly" in caplog.text
    )
    file = tmp_path / SAFETENSORS
    state = load_file(file)
    del state["transformer.layer.1.ffn.lin2.bias"]
    save_file(state | {"vocab_transform.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks transformer\.layer\.1\.ffn\.lin2\.bias, which BertModel needs"):
        fastbert.BertModel.from_pretrained(tmp_path)
    theirs("distilbert", "BertForMaskedLM").save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastbert"):
        fastbert.BertModel.from_pretrained(tmp_path)
    assert "BertModel does not use vocab_layer_norm.bias, vocab_layer_norm.weight, vocab_projector.bias" in caplog.text


def test_missing_projection_is_an_error(tmp_path: Path) -> None:
    """Catches a projection of random numbers between trained embeddings and trained layers."""
    theirs("electra").save_pretrained(tmp_path)
    file = tmp_path / SAFETENSORS
    state = {name: t for name, t in load_file(file).items() if "embeddings_project" not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks embeddings_project\.weight, embeddings_project\.bias, which BertModel"
    ):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_number_of_labels_of_another_head(tmp_path: Path) -> None:
    """Catches a message on the number of classes that does not name the setting for a head of two layers."""
    theirs("xlm-roberta", "BertForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels: the checkpoint has 3, the model 5"):
        fastbert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
