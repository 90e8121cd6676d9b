"""The heads of all families as the reference computes them, on padded (B, S) inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.families import family_of
from fastbert.checkpoint.rotary import setting
from fastbert.reference.bert import activation_of, ids_or_embeds, valid_tokens
from fastbert.reference.encoders import encode
from fastbert.reference.ops import layer_norm, linear

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig

TASKS = (
    "pre_training",
    "masked_lm",
    "next_sentence",
    "sequence_classification",
    "multiple_choice",
    "token_classification",
    "question_answering",
)
# task -> what follows "For" in the name of its class
_CLASSES = {
    "pre_training": "PreTraining",
    "masked_lm": "MaskedLM",
    "next_sentence": "NextSentencePrediction",
    "sequence_classification": "SequenceClassification",
    "multiple_choice": "MultipleChoice",
    "token_classification": "TokenClassification",
    "question_answering": "QuestionAnswering",
}


def head(
    task: str,
    params: Mapping[str, Tensor],
    config: BertConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    dropout_seed: int | None = None,
) -> dict[str, Tensor]:
    """The logits of an encoder of any family with one of its seven heads, under the field names of our outputs.

    task                      result
    "pre_training"            prediction_logits (B, S, V), seq_relationship_logits (B, 2); ALBERT's: sop_logits
    "masked_lm"               logits (B, S, V)
    "next_sentence"           logits (B, 2): 0 = is next, 1 = random
    "sequence_classification" logits (B, labels)
    "multiple_choice"         logits (B, choices); every input carries the choices: (B, choices, S)
    "token_classification"    logits (B, S, labels)
    "question_answering"      start_logits (B, S), end_logits (B, S)

    Arguments as in `encode`, with the encoder's parameters behind "bert."; the head drops nothing out. Logits at
    padding positions are zero. The language model's decoder is `cls.predictions.decoder` where `params` has it, else
    the word embeddings with `cls.predictions.bias`. Raises what `encode` does, and ValueError for another task, or one
    that the family lacks.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")

    def dense(name: str, x: Tensor, activation: str | None = None) -> Tensor:
        bias = params.get(f"{name}.bias")
        return linear(x, params[f"{name}.weight"].to(dtype), None if bias is None else bias.to(dtype), activation)

    family = family_of(config.model_type)
    family_head = family.head(_CLASSES[task])

    def pooled() -> Tensor:
        if encoded.pooler_output is None:
            raise KeyError(f"bert.pooler.dense.weight: missing from params, needed for {task}")
        return encoded.pooler_output

    def transform(name: str, x: Tensor) -> Tensor:
        own = activation_of(config)
        if family.text == "modernbert":
            own = ACTIVATIONS[setting(config, "classifier_activation")]
        x = dense(f"{name}.dense", x, family_head.activation or own)
        weight, bias = params[f"{name}.LayerNorm.weight"].to(dtype), params.get(f"{name}.LayerNorm.bias")
        bias = torch.zeros_like(weight) if bias is None else bias.to(dtype)
        return layer_norm(x, weight, bias, config.layer_norm_eps)

    def vocabulary(x: Tensor) -> Tensor:
        x = transform("cls.predictions.transform", x)
        weight = params.get("cls.predictions.decoder.weight", params["bert.embeddings.word_embeddings.weight"])
        bias = params.get("cls.predictions.decoder.bias")
        bias = params["cls.predictions.bias"] if bias is None else bias
        return linear(x, weight.to(dtype), bias.to(dtype)).masked_fill(padding, 0)

    choices: tuple[int, ...] = ()
    if task == "multiple_choice":
        choices = ids_or_embeds(input_ids, inputs_embeds).shape[:2]
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            x if x is None or x.dim() < 3 else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
    inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    encoded = encode(
        params, config, *inputs, prefix="bert.", dtype=dtype, output_attentions=False, dropout_seed=dropout_seed
    )
    tokens = encoded.last_hidden_state
    padding = ~valid_tokens(input_ids, inputs_embeds, attention_mask)[:, :, None]

    if task == "pre_training":
        next_sentence = dense("cls.seq_relationship", pooled())
        name = "sop_logits" if family_head.sentence_order else "seq_relationship_logits"
        return {"prediction_logits": vocabulary(tokens), name: next_sentence}
    if task == "masked_lm":
        return {"logits": vocabulary(tokens)}
    if task == "next_sentence":
        return {"logits": dense("cls.seq_relationship", pooled())}
    if family_head.transform:
        name = "qa_outputs" if task == "question_answering" else "classifier"
        if task in ("token_classification", "question_answering"):
            tokens = transform("head", tokens)
        else:
            valid = ~padding
            if setting(config, "classifier_pooling") == "cls":
                valid = valid & (valid.cumsum(dim=1) == 1)
            rows = tokens.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)
            rows = dense(name, transform("head", rows))
            return {"logits": rows.reshape(choices) if choices else rows}
    if task == "sequence_classification" and family_head.activation is not None:  # RoBERTa's and others'
        valid = ~padding[:, :, 0]
        is_first = valid & (valid.cumsum(dim=1) == 1)
        first = tokens.masked_fill(~is_first[:, :, None], 0).sum(dim=1)
        if family_head.activation == "tanh":
            first = torch.tanh(dense("classifier.dense", first))
        else:
            first = dense("classifier.dense", first, family_head.activation)
        return {"logits": dense("classifier.out_proj", first)}
    if task == "sequence_classification":
        return {"logits": dense("classifier", pooled())}
    if task == "multiple_choice":
        return {"logits": dense("classifier", pooled()).reshape(choices)}
    if task == "token_classification":
        return {"logits": dense("classifier", tokens).masked_fill(padding, 0)}
    start, end = dense("qa_outputs", tokens).masked_fill(padding, 0).unbind(dim=-1)
    return {"start_logits": start, "end_logits": end}
