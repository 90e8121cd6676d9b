"""`explain`, `verify` and `warmup` find the model inside what they are given, and its encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert import adapters
from fastbert.models.encoder import EncoderModel
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import dispatch


def find_model(model: Any) -> PreTrainedModel:
    """Finds the model of this library: the argument itself, or what a SentenceEncoder or a wrapper module holds.

    The encoder of an accelerated model has one that shares its parameters. Raises TypeError for anything else.
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
    """Returns what stands before the names of the module's parameters in `inside`, such as "bert."."""
    name = next(name for name, candidate in inside.named_modules() if candidate is module)
    return f"{name}." if name else ""


def float32_precision() -> str:
    """Tells how CUDA multiplies float32, as PyTorch's switch says."""
    return "TF32" if dispatch.tf32_allowed() else "IEEE float32"
