"""The tests of families share random models of transformers of every family, and our twins of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import fastbert
from fastbert.checkpoint.families import FAMILIES
from model_cases import BATCH, LENGTH, POSITIONS, VOCAB, generator, mask, randomise

OTHERS = ("roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "albert")
# One for each way of being different: positions, segments and names, projection, a text of its own, shared layers.
KINDS = ("roberta", "distilbert", "electra", "mpnet", "albert")
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 37}
# transformers' eager attention of ModernBERT has a softmax in float32.
MODERNBERT_SIZES = {"attn_implementation": "sdpa", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                    "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4, "local_attention": 12}  # fmt: skip
DISTILBERT_SIZES = {"dim": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 37}


def head_names(model_type: str) -> list[str]:
    """The names of our classes that the family has, but for the bare model."""
    return [f"BertFor{task}" for task in FAMILIES[model_type].heads]


WITH_HEADS = [(model_type, name) for model_type in OTHERS for name in head_names(model_type)]


def their_class(model_type: str, name: str) -> Any:
    return getattr(transformers, FAMILIES[model_type].class_name(name))


def config_of_transformers(model_type: str, name: str = "BertModel", **options: Any) -> Any:
    family = FAMILIES[model_type]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "num_labels": 2 if "Question" in name or "PreTraining" in name else 3,
        "attn_implementation": "eager",
        **(DISTILBERT_SIZES if model_type == "distilbert" else SIZES),
    }
    if family.projection:
        settings["embedding_size"] = 24
    if model_type == "albert":
        settings |= {"num_hidden_layers": 4, "num_hidden_groups": 2, "hidden_act": "gelu"}
    if model_type == "modernbert":
        settings |= MODERNBERT_SIZES
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    if model_type == "xlm-roberta":
        settings["pad_token_id"] = 5  # positions count from it: not from a 1 that stands in the code
    return their_class(model_type, name).config_class(**{**settings, **options})


def theirs(model_type: str, name: str = "BertModel", **options: Any) -> Any:
    """A model of transformers in float64, in eval mode, with every parameter random; a new copy at each call."""
    return copy.deepcopy(_theirs(model_type, name, **options))


@functools.cache
def _theirs(model_type: str, name: str, **options: Any) -> Any:
    model = their_class(model_type, name)(config_of_transformers(model_type, name, **options)).double().eval()
    return randomised(model)


def randomised(model: Any, seed: int = 1) -> Any:
    """Fills every parameter of a model of any family."""
    randomise(model, seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.add_(1.0)  # which `randomise` knows under BERT's names alone
    return model


def our_state(model: Any, task: str | None = None) -> dict[str, Tensor]:
    """The state dict of a model of transformers under our names."""
    family = FAMILIES[model.config.model_type]
    return {family.state_to_ours(name, task): tensor for name, tensor in model.state_dict().items()}


def twin(model: Any, name: str = "BertModel", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Our model with the weights of a model of transformers, rounded to dtype."""
    config = fastbert.BertConfig.from_dict(model.config.to_dict())
    device = options.pop("device", "cpu")
    ours = getattr(fastbert, name)(config, **{"backend": "cpu", "strict": True, **options}).to(device, dtype)
    state = our_state(model, getattr(ours, "task", None))
    if "cls.predictions.bias" in ours.state_dict():
        state.setdefault("cls.predictions.decoder.bias", state["cls.predictions.bias"])
    ours.load_state_dict(state)
    return ours.eval()


def make_batch(model_type: str, kind: str = "right", padded: bool = True) -> dict[str, Any]:
    """Ids and mask. padded: the padding id stands wherever the mask has no token; it may stand at a token as well."""
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator(3))
    attention_mask = mask(kind)
    if padded and attention_mask is not None:
        pad = config_of_transformers(model_type).pad_token_id
        ids = ids.masked_fill(attention_mask == 0, pad)
    return {"input_ids": ids, "attention_mask": attention_mask}


def run(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """The model's output, without gradients, with the batch on its device."""
    on_device = {name: t.to(model.device) if isinstance(t, Tensor) else t for name, t in batch.items()}
    with torch.no_grad():
        return model(**on_device, **options)


def head_batch(model_type: str, name: str, kind: str = "right") -> dict[str, Any]:
    """A batch for this head: two choices of two rows for multiple choice."""
    batch = make_batch(model_type, kind)
    if name != "BertForMultipleChoice":
        return batch
    return {n: None if t is None else t.unflatten(0, (2, BATCH // 2)) for n, t in batch.items()}
