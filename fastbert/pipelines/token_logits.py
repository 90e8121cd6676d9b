"""This module runs heads with an output for each token on packed batches; no padding is computed."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import numpy as np
import torch

from fastbert.checks import positive_or_none
from fastbert.models.encoded import Encoded
from fastbert.models.pretrained import PreTrainedModel, any_in_training, listed
from fastbert.pipelines.batching import default_token_budget, in_batches
from fastbert.text.encoding import PackedEncoding
from fastbert.text.tokenizer import Tokenizer

Model = TypeVar("Model", bound=PreTrainedModel)


def load_head(
    cls: type[Model], head: str, src: str | os.PathLike[str], device: Any, revision: str | None, options: dict[str, Any]
) -> tuple[Model, Tokenizer]:
    """Returns a model whose head is in the checkpoint, and its tokenizer. device: None for the GPU if there is one.

    head: its name, for the ValueError of a checkpoint without it. options: more arguments of from_pretrained.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    model = cls.from_pretrained(src, device=device, revision=revision, **options)
    if model.missing_names:
        raise ValueError(f"{src}: has no {head} head: it lacks {listed(model.missing_names)}")
    return model, Tokenizer.from_pretrained(src, revision=revision)


def longest_row(model: PreTrainedModel, tokenizer: Tokenizer, max_length: int | None) -> int:
    """Returns the most tokens of a row, special tokens included: `max_length`, or the model's and tokenizer's limit.

    Raises ValueError for a `max_length` above the number of the model's positions.
    """
    positions, limit = model.longest_text, tokenizer.model_max_length
    if positive_or_none("max_length", max_length) is None:
        return positions if limit is None else min(limit, positions)
    if max_length > positions:  # type: ignore[operator]
        raise ValueError(f"max_length: got {max_length}, expected at most {positions}, the model's positions")
    return max_length  # type: ignore[return-value]


def token_logits(model: Any, tokens: PackedEncoding, token_budget: int | None = None) -> np.ndarray:
    """Returns the head's output for each token, (T, n) float32, in the order of the tokens.

    model: has `classify_tokens`, and is set to eval mode. token_budget: tokens in a batch, by default 16384 on a GPU
    and 2048 on a CPU.
    """
    if any_in_training(model):
        model.eval()
    bert, device = model.bert, model.device
    bert.check_ids(tokens.input_ids, tokens.token_type_ids)
    bert.follow_weights()
    offsets = tokens.cu_seqlens.tolist()
    result = np.empty((offsets[-1], model.config.num_labels), np.float32)
    budget = token_budget or default_token_budget(device)
    with torch.inference_mode():
        for rows, batch, input_ids, token_type_ids in in_batches(tokens, budget, None, device):
            hidden = bert.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]
            logits = model.classify_tokens(Encoded(batch, hidden, None, None)).float().cpu().numpy()
            start = 0
            for row in rows:
                n = offsets[row + 1] - offsets[row]
                result[offsets[row] : offsets[row + 1]] = logits[start : start + n]
                start += n
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of logits over the last axis, in their dtype."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
