"""The tests of training accelerated models share models without dropout, labels for every head, and steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import fastbert
from family_cases import head_names, make_batch, theirs
from fastbert.checkpoint.families import FAMILIES
from model_cases import LENGTH, in_dtype

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_last_dropout")
OF_DISTILBERT = ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout")
# Every model that transformers has of each family.
MODELS = [
    *((model_type, name) for model_type in FAMILIES for name in ("BertModel", *head_names(model_type))),
    ("electra", "BertForPreTraining"),
    ("electra", "BertForMultipleChoice"),
    ("distilbert", "BertForMultipleChoice"),
]


def probabilities(model_type: str, p: float) -> dict[str, float]:
    """The settings of a config by which every dropout has the probability p."""
    return dict.fromkeys(OF_DISTILBERT if model_type == "distilbert" else DROPOUTS, p)


def original(
    model_type: str = "bert", name: str = "BertModel", dtype: torch.dtype = torch.float64, p: float = 0.0, **options: Any
) -> Any:
    """A random tiny model of transformers in training mode, all of whose dropouts have the probability p."""
    return in_dtype(theirs(model_type, name, **probabilities(model_type, p), **options), dtype).train()


def accelerated_copy(model: Any) -> Any:
    """An accelerated copy, in the modes of the model."""
    return fastbert.accelerate(copy.deepcopy(model))


def labelled(model_type: str, name: str) -> dict[str, Any]:
    """A batch for this model, with labels that leave out padding.

    Nothing is padded for question answering, whose loss looks at the logits of padding.
    """
    batch = make_batch(model_type, "none" if name == "BertForQuestionAnswering" else "right")
    rows, tokens = torch.arange(4) % 2, torch.arange(4 * LENGTH).view(4, LENGTH) % 2
    if batch["attention_mask"] is not None:
        tokens = tokens.masked_fill(batch["attention_mask"] == 0, -100)
    if name == "BertForMultipleChoice":
        return {**{key: value.unflatten(0, (2, 2)) for key, value in batch.items()}, "labels": rows[:2]}
    if name == "BertForPreTraining" and model_type == "bert":
        return {**batch, "labels": tokens, "next_sentence_label": rows}
    if name == "BertForQuestionAnswering":
        return {**batch, "start_positions": rows, "end_positions": rows + 1}
    of_tokens = name in ("BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining")
    return batch if name == "BertModel" else {**batch, "labels": tokens if of_tokens else rows}


def loss_of(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """The loss of a head, or a scalar in which every output of a bare model counts, but for padding."""
    output = model(**batch, **options)
    if "labels" in batch or "start_positions" in batch:
        return output.loss
    hidden, mask = output.last_hidden_state, batch["attention_mask"]
    rows = hidden if mask is None else hidden[mask.bool()]
    weights = torch.linspace(-1, 1, rows.shape[-1], dtype=rows.dtype)
    loss = ((rows * weights).sum(-1) ** 2).mean()
    pooled = getattr(output, "pooler_output", None)
    return loss if pooled is None else loss + (pooled * weights).sum(-1).exp().mean()


def step(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """One backward pass. Returns the loss."""
    model.zero_grad()
    loss = loss_of(model, batch, **options)
    loss.backward()
    return loss.detach()
