"""This module finds the model and its encoder inside the argument of `explain`, `verify` or `warmup`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert import adapters
from fastbert.models.encoder import EncoderModel
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import dispatch


def find_model(model: Any) -> PreTrainedModel:
    """Returns the fastbert model: the argument itself, or the model inside a SentenceEncoder or a wrapper module.

    For an accelerated model it is the fastbert encoder that shares its parameters. Raises TypeError for other objects.
    """
    for module in adapters.modules(model):
        if isinstance(module, PreTrainedModel):
            return module
    encoder = adapters.encoder_in(model)
    if encoder is not None:
        return encoder
    expected = "a BertModel, a model with a head or a SentenceEncoder, or an accelerated model"
    raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


def backbone(model: PreTrainedModel) -> EncoderModel:
    """Returns the encoder: the model itself, or `bert` of a model with a head."""
    bert = model if isinstance(model, EncoderModel) else model.get_submodule("bert")
    assert isinstance(bert, EncoderModel)
    return bert


def prefix_of(module: nn.Module, inside: nn.Module) -> str:
    """Returns the prefix of the module's parameter names in `inside`, such as "bert."."""
    name = next(name for name, candidate in inside.named_modules() if candidate is module)
    return f"{name}." if name else ""


def float32_precision() -> str:
    """Tells how CUDA multiplies float32, from PyTorch's switch."""
    return "TF32" if dispatch.tf32_allowed() else "IEEE float32"
