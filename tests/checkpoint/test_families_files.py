"""Heads and checkpoints of BERT's family: logits, losses, dropout, files of transformers read and written."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastbert
from family_cases import KINDS, OTHERS, WITH_HEADS, make_batch, run, their_class, theirs, twin
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.files import BIN, SAFETENSORS, SAFETENSORS_INDEX
from model_cases import BATCH, LENGTH, VOCAB, assert_close, is_zero, valid_of

# (model_type, our class) of every head, and of the bare models
EVERY = [*((model_type, "BertModel") for model_type in OTHERS), *WITH_HEADS]
TASKS = {
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "sequence_classification",
    "BertForMultipleChoice": "multiple_choice",
    "BertForTokenClassification": "token_classification",
    "BertForQuestionAnswering": "question_answering",
}


def head_batch(model_type: str, name: str, kind: str = "right") -> dict[str, Any]:
    batch = make_batch(model_type, kind)
    if name != "BertForMultipleChoice":
        return batch
    return {n: None if t is None else t.unflatten(0, (2, BATCH // 2)) for n, t in batch.items()}


def labels(name: str) -> dict[str, Tensor]:
    per_token = torch.randint(VOCAB if "Masked" in name else 3, (BATCH, LENGTH))
    return {
        "BertForMaskedLM": {"labels": per_token},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1, 2])},
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0])},
        "BertForTokenClassification": {"labels": per_token},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([3, 8, 0, 2]), "end_positions": torch.tensor([12, 8, 99, 4]),
        },
    }[name]  # fmt: skip


# Heads


@pytest.mark.parametrize(("model_type", "name"), WITH_HEADS)
def test_logits_match_transformers(model_type: str, name: str) -> None:
    """A head's layer left out, of another activation or width, or one that reads what another family's head reads."""
    model = theirs(model_type, name)
    ours, batch = twin(model, name), head_batch(model_type, name)
    valid = valid_of(make_batch(model_type)["attention_mask"])
    mine, other = run(ours, batch), run(model, batch)
    judge = reference.head(TASKS[name], dict(ours.named_parameters(remove_duplicate=False)), ours.config, **batch)
    assert list(mine.keys()) == list(judge) == list(other.keys())
    for field, value in mine.items():
        per_token = value.shape[:2] == valid.shape
        assert_close(field, value[valid] if per_token else value, other[field][valid] if per_token else other[field])
        assert_close(f"reference, {field}", judge[field], value)


@pytest.mark.parametrize(("model_type", "name"), WITH_HEADS)
def test_losses_match_transformers(model_type: str, name: str) -> None:
    """A loss of the logits that another head would give, or a head that a gradient does not reach."""
    model = copy.deepcopy(theirs(model_type, name))
    ours, batch = twin(model, name), head_batch(model_type, name, "none") | labels(name)
    mine, other = ours(**batch), model(**batch)
    assert_close("loss", mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    family, expected = FAMILIES[model_type], dict(model.named_parameters())
    checked = 0
    for parameter_name, parameter in ours.named_parameters():
        stored = family.state_to_theirs(parameter_name, ours.task)
        if parameter_name.startswith("bert.") or stored not in expected:
            continue
        if is_zero(expected[stored].grad):  # a bias that moves all logits of a softmax alike
            assert is_zero(parameter.grad), parameter_name
        else:
            assert_close(parameter_name, parameter.grad, expected[stored].grad, 1e-9)
            checked += 1
    assert checked


@pytest.mark.parametrize(("model_type", "name"), WITH_HEADS)
def test_dropout_is_the_familys(model_type: str, name: str) -> None:
    """A head that drops out with a probability that the family's class does not use, or not at all, in training."""
    distinct = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.22, "classifier_dropout": 0.33}
    if model_type == "distilbert":
        distinct = {"dropout": 0.11, "attention_dropout": 0.22, "seq_classif_dropout": 0.33, "qa_dropout": 0.44}
    model = theirs(model_type, name, **distinct)

    def probabilities(m: nn.Module, prefix: str) -> set[float]:
        return {p.p for n, p in m.named_modules() if isinstance(p, nn.Dropout) and not n.startswith(prefix)}

    assert probabilities(twin(model, name), "bert.") == probabilities(model, FAMILIES[model_type].prefix)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("roberta", "BertForNextSentencePrediction"), ("distilbert", "BertForMultipleChoice"),
     ("electra", "BertForPreTraining")],
)  # fmt: skip
def test_head_that_is_not_covered(model_type: str, name: str, tmp_path: Path) -> None:
    """A head of BERT's form on a family that has another or none, started afresh as if it were only untrained."""
    theirs(model_type).save_pretrained(tmp_path)
    message = f"^{name}: not covered for model_type '{model_type}', which has BertForMaskedLM, BertForSequenceClassif"
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, name).from_pretrained(tmp_path)


def test_first_token_is_the_first_that_the_mask_leaves() -> None:
    """A classifier that reads padding in a left-padded batch."""
    ours = twin(theirs("roberta", "BertForSequenceClassification"), "BertForSequenceClassification")
    left, right = make_batch("roberta", "left"), make_batch("roberta", "right")
    ids = torch.stack([torch.cat([row[pad], row[~pad]]) for row, pad in zip(
        right["input_ids"], right["attention_mask"] == 0, strict=True)])  # fmt: skip
    moved = run(ours, {"input_ids": ids, "attention_mask": left["attention_mask"]})
    assert_close("logits", moved.logits, run(ours, right).logits)


# Files


def assert_same(mine: Any, other: Any, name: str, model_type: str) -> None:
    batch = head_batch(model_type, name, "none")
    for field, value in run(mine, batch).items():
        assert_close(field, value, run(other, batch)[field])


@pytest.mark.parametrize(
    ("model_type", "name", "tie"),
    [*((*case, True) for case in EVERY), *((model_type, "BertForMaskedLM", False) for model_type in OTHERS)],
)
def test_round_trip(model_type: str, name: str, tie: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A weight that is lost, cast, renamed or started afresh on the way from transformers to us and back."""
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
    """Names with the head's prefix, shards, or a pickle, that a table is not applied to."""
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
    """Weights reported under names that are not in the file, where the user looks for them in vain."""
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
    """A projection of random numbers between trained embeddings and trained layers."""
    theirs("electra").save_pretrained(tmp_path)
    file = tmp_path / SAFETENSORS
    state = {name: t for name, t in load_file(file).items() if "embeddings_project" not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks embeddings_project\.weight, embeddings_project\.bias, which BertModel"
    ):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_number_of_labels_of_another_head(tmp_path: Path) -> None:
    """A classifier of other classes: the message must name the setting for a head of two layers too."""
    theirs("xlm-roberta", "BertForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels: the checkpoint has 3, the model 5"):
        fastbert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
