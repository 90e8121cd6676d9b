"""Heads of BERT's family give transformers' logits, losses and dropout."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastbert
from family_cases import WITH_HEADS, head_batch, make_batch, run, theirs, twin
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES
from model_cases import BATCH, LENGTH, VOCAB, assert_close, is_zero, valid_of

TASKS = {
    "BertForPreTraining": "pre_training",
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "sequence_classification",
    "BertForMultipleChoice": "multiple_choice",
    "BertForTokenClassification": "token_classification",
    "BertForQuestionAnswering": "question_answering",
}


def labels(name: str) -> dict[str, Tensor]:
    per_token = torch.randint(VOCAB if "Masked" in name or "Pre" in name else 3, (BATCH, LENGTH))
    return {
        "BertForPreTraining": {"labels": per_token, "sentence_order_label": torch.tensor([1, 0, 1, 1])},
        "BertForMaskedLM": {"labels": per_token},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1, 2])},
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0])},
        "BertForTokenClassification": {"labels": per_token},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([3, 8, 0, 2]), "end_positions": torch.tensor([12, 8, 99, 4]),
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize(("model_type", "name"), WITH_HEADS)
def test_logits_match_transformers(model_type: str, name: str) -> None:
    """Catches a head's layer left out, of another activation or width, or one that reads another family's input."""
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
    """Catches a loss of the logits of another head, or a head that a gradient does not reach."""
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
    """Catches a head that drops out in training with another probability than the family's class, or not at all."""
    distinct = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.22, "classifier_dropout": 0.33}
    if model_type == "distilbert":
        distinct = {"dropout": 0.11, "attention_dropout": 0.22, "seq_classif_dropout": 0.33, "qa_dropout": 0.44}
    if model_type == "albert":
        distinct["classifier_dropout_prob"] = distinct.pop("classifier_dropout")
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
    """Catches a head of BERT's form started afresh on a family that has another head or none."""
    theirs(model_type).save_pretrained(tmp_path)
    message = f"^{name}: not covered for model_type '{model_type}', which has BertForMaskedLM, BertForSequenceClassif"
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, name).from_pretrained(tmp_path)


def test_first_token_is_the_first_that_the_mask_leaves() -> None:
    """Catches a classifier that reads padding in a left-padded batch."""
    ours = twin(theirs("roberta", "BertForSequenceClassification"), "BertForSequenceClassification")
    left, right = make_batch("roberta", "left"), make_batch("roberta", "right")
    ids = torch.stack([torch.cat([row[pad], row[~pad]]) for row, pad in zip(
        right["input_ids"], right["attention_mask"] == 0, strict=True)])  # fmt: skip
    moved = run(ours, {"input_ids": ids, "attention_mask": left["attention_mask"]})
    assert_close("logits", moved.logits, run(ours, right).logits)
