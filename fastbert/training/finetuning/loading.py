"""The model of a run is a pre-trained encoder with a new head. The settings can freeze parts or add adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastbert.training.finetuning.settings import FinetuneSettings

logger = logging.getLogger("fastbert")

# The names of dropout probabilities in configurations.
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_last_dropout", "dropout",
    "attention_dropout", "seq_classif_dropout", "qa_dropout",
)  # fmt: skip
LONGEST = 512  # maximum number of tokens of an input, if neither the settings nor the model have one


def pretrained(head: str, settings: FinetuneSettings, labels: Sequence[str] | None = None, **options: Any) -> Any:
    """Loads the encoder of settings.model with a head, in float32; a head of other sizes is initialised again.

    head: the name of a class AutoModelFor... of transformers. labels: the names of the classes, in order. options:
    fields of the configuration, such as problem_type. The weights of a new head come from PyTorch's random generator.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(settings.model)
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    for name, value in options.items():
        setattr(config, name, value)
    if settings.dropout is not None:
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, settings.dropout)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # It warns that the head is new, which is intended.
    try:
        model = getattr(transformers, head).from_pretrained(settings.model, config=config, ignore_mismatched_sizes=True)
    finally:
        transformers.logging.set_verbosity(level)
    return model.float()


def longest_input(model: Any, tokenizer: Any, settings: FinetuneSettings) -> int:
    """Returns the maximum number of tokens of an input. Raises ValueError if the settings request too many."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1
    reads = min(positions, tokenizer.model_max_length)
    if settings.max_length is None:
        return int(min(reads, LONGEST))
    if settings.max_length > positions:
        raise ValueError(f"max_length: expected at most {positions}, which the model reads, got {settings.max_length}")
    return settings.max_length


def restricted(model: Any, settings: FinetuneSettings) -> Any:
    """Freezes the encoder or adds adapters to it, according to the settings; returns the model, or PEFT's wrapper."""
    if settings.freeze_encoder:
        encoder = model.base_model
        encoder.requires_grad_(False)
        for name, part in encoder.named_children():
            if name == "pooler" and part is not None:
                part.requires_grad_(True)
    if settings.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    prefix = model.base_model_prefix
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{prefix}.") and ".pooler." not in f".{name}."
    ]
    if not targets:
        raise ValueError(f"lora: no linear layers were found in the encoder of {settings.model}")
    trained = [name for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())]
    if getattr(model.base_model, "pooler", None) is not None:
        trained.append(f"{prefix}.pooler")
    config = LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules=targets, modules_to_save=trained)
    return get_peft_model(model, config)


def accelerated(model: Any, settings: FinetuneSettings) -> Any:
    """Makes fastbert run the encoder, if the settings request it and fastbert supports the encoder.

    Returns the model.
    """
    from fastbert.adapters import accelerate

    if not settings.accelerate:
        return model
    try:
        return accelerate(model)
    except ValueError as error:
        logger.warning("the model's own code trains it: %s", error)
        return model


def merged(model: Any) -> Any:
    """Returns a copy of the model with its adapters merged into the weights, or the model itself without adapters."""
    if not hasattr(model, "merge_and_unload"):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()


def load_weights(model: Any, folder: Any) -> None:
    """Loads the weights of one of the Trainer's checkpoints into the model that it trained."""
    if hasattr(model, "merge_and_unload"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
