"""A run starts from a model: a named shape, a config.json, or a checkpoint to continue from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastbert.checkpoint.config import BertConfig
from fastbert.models.tasks import BertForMaskedLM, BertForPreTraining
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.settings import Settings

# Number of layers and hidden size. base, large: Devlin et al. 2018; the others: Turc et al. 2019, arXiv:1908.08962.
SHAPES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
HEAD_SIZE = 64


def named_config(name: str, **fields: Any) -> BertConfig:
    """Returns the config of a shape in SHAPES. fields: further fields of BertConfig."""
    n_layers, hidden_size = SHAPES[name]
    return BertConfig(
        num_hidden_layers=n_layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // HEAD_SIZE,
        intermediate_size=4 * hidden_size,
        **fields,
    )


def starting_model(settings: Settings, tokenizer: Tokenizer) -> BertForPreTraining | BertForMaskedLM:
    """Returns the model to train, in float32 on the CPU: a BertForPreTraining, or without NSP a BertForMaskedLM.

    Raises ValueError for a vocabulary larger than the embeddings, for sequences longer than the model's limit, for a
    family without the required head, and for a `model_config` of no allowed kind.
    """
    name = settings.model_config
    task: Any = BertForPreTraining if settings.nsp else BertForMaskedLM
    torch.manual_seed(settings.seed)
    dropouts = {}
    if settings.dropout is not None:
        dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), settings.dropout)
    model: Any
    if name in SHAPES or Path(name).is_file():
        model = task(_fresh_config(name, settings, tokenizer, dropouts))
    elif Path(name).is_dir() or not os.path.exists(name):
        config = _stored_config(name)
        _check_task(config, settings)
        model = task.from_pretrained(name, dtype="float32", device="cpu", **dropouts)
    else:
        raise ValueError(f"model_config: got {name!r}, expected {', '.join(SHAPES)}, a config.json or a checkpoint")
    _check_sizes(model.config, settings, tokenizer)
    return model


def _stored_config(name: str) -> BertConfig:
    try:
        return BertConfig.from_pretrained(name)
    except FileNotFoundError as error:
        shapes = ", ".join(SHAPES)
        raise ValueError(
            f"model_config: got {name!r}, expected {shapes}, a config.json or a checkpoint: {error}"
        ) from error


def _fresh_config(name: str, settings: Settings, tokenizer: Tokenizer, dropouts: dict[str, Any]) -> BertConfig:
    longest = max(512, settings.max_length or 0)
    if name in SHAPES:
        pad = tokenizer.pad_token_id
        return named_config(
            name, vocab_size=tokenizer.vocab_size, pad_token_id=pad, max_position_embeddings=longest, **dropouts
        )
    config = BertConfig.from_pretrained(name, **dropouts)
    _check_task(config, settings)
    return config


def _check_task(config: BertConfig, settings: Settings) -> None:
    if settings.nsp and config.model_type != "bert":
        raise ValueError(
            f"nsp: {config.model_type} has no head for next sentences; train on masked tokens alone (--no-nsp)"
        )


def _check_sizes(config: BertConfig, settings: Settings, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, and the model's embeddings hold {config.vocab_size}"
        )
    if settings.max_length is not None and settings.max_length > config.max_length:
        raise ValueError(
            f"max_length: got {settings.max_length}, but the model reads at most {config.max_length} tokens"
        )
