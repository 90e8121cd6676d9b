"""This module finds the class of the encoder of each family, by the `text` in its `Family`.

A family with its own text needs its line in `TEXTS`, and `text` in its table. The other names of a text are those of
its class. `BertModel(config)`, and every model with a head, call these functions.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastbert.checkpoint.config import BertConfig

# The file of this package, and the class in it. It is imported when a model of the family is first made.
TEXTS = {
    "bert": "BertModel",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertModel",
    "gated_rotary_bert": "GatedRotaryModel",
    "deberta": "DebertaModel",
    "jina_bert_v2": "JinaBertModel",
    "jina_bert_code": "JinaCodeModel",
}


def encoder_class(config: BertConfig) -> Any:
    """Returns the class of the encoder for a config."""
    text = config.family.text
    return getattr(importlib.import_module(f"fastbert.models.{text}"), TEXTS[text])


def class_for(cls: type, config: BertConfig) -> Any:
    """Returns the class that cls(config) makes: the family's for BertModel, and otherwise cls itself.

    Raises ValueError if cls describes another text than the text of the config's family.
    """
    wanted = encoder_class(config)
    if issubclass(cls, wanted):
        return cls
    if cls.__module__ == "fastbert.models.bert":
        return wanted
    raise ValueError(f"{cls.__name__}: got a config of model_type {config.model_type!r}, expected {wanted.__name__}")
