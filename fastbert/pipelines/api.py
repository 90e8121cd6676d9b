"""The rest of the interface of sentence-transformers' models: followed, or refused with what to do instead."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from fastbert.pipelines.inputs import Pair, as_texts

logger = logging.getLogger("fastbert")

SEVERAL = (
    "pool, device: got several processes or devices, expected one: run an encoder in each process, on its device, or "
    "give sentence-transformers' own model to fastbert.accelerate"
)
_TRAIN = "train sentence-transformers' own model, which fastbert.accelerate makes faster"
_HUB = "save_pretrained writes a folder, which huggingface_hub.upload_folder uploads"
_POOL = "run an encoder in each process, or give sentence-transformers' own model to fastbert.accelerate"
_PARTS = "its parts are encoder.model, encoder.tokenizer, and of a SentenceEncoder encoder.pooling and encoder.tail"
_PEFT = "give encoder.model to PEFT"

# Names of sentence-transformers' models that ours lack -> what to do instead.
MISSING = {
    **dict.fromkeys(("fit", "old_fit", "smart_batching_collate", "get_sentence_features"), _TRAIN),
    **dict.fromkeys(("push_to_hub", "save_to_hub"), _HUB),
    **dict.fromkeys(("start_multi_process_pool", "stop_multi_process_pool", "encode_multi_process"), _POOL),
    **dict.fromkeys(("_first_module", "_last_module", "transformers_model", "auto_model", "processor"), _PARTS),
    **dict.fromkeys(
        ("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "enable_adapters", "disable_adapters",
         "active_adapter", "active_adapters", "get_adapter_state_dict"),
        _PEFT,
    ),
    **dict.fromkeys(("append", "extend", "insert", "pop"), _PARTS),
    **dict.fromkeys(("check_peft_compatible_model", "has_peft_compatible_model"), _PEFT),
    "smart_batching_collate_text_only": _TRAIN,
    "get_default_activation_fn": "activation_fn is what from_pretrained took from the folder",
    "clear_placement_cache": "to(device) moves the whole encoder",
    "load": "from_pretrained loads a folder",
    "merge": "merge sentence-transformers' own models, and load what they save",
    "gradient_checkpointing_enable": _TRAIN,
    "module_kwargs": "encode takes no arguments of modules",
    "set_keep_in_fp32_modules": "from_pretrained takes a dtype",
}  # fmt: skip


class Evaluations:
    """Where evaluators of sentence-transformers leave their numbers, in the place of its model card.

    metrics: (class of the evaluator, numbers by name, epoch, step) of each evaluation, in order.
    """

    base_model: str | None = None

    def __init__(self) -> None:
        self.metrics: list[tuple[str, dict[str, Any], int, int]] = []

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        self.metrics.append((type(evaluator).__name__, dict(metrics), epoch, step))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"model_card_data has no {name!r}: fastbert keeps evaluations alone, and writes no model card"
        )


class SentenceTransformersApi(nn.Module):
    """The part of the interface that a SentenceEncoder and a CrossEncoder share.

    A name that sentence-transformers has and this has not raises an AttributeError that says what to do instead.
    """

    model: Any
    tokenizer: Any

    def __getattr__(self, name: str) -> Any:
        # nn.Module's own would do for modules, but for the message, and one call is what a hot path can spare.
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        if name in MISSING:
            raise AttributeError(f"{type(self).__name__} has no {name!r}: {MISSING[name]}")
        return super().__getattr__(name)

    def __len__(self) -> int:
        """How many modules sentence-transformers would count."""
        return 1

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is no sequence of modules: {_PARTS}")

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Raises TypeError for a module: sentence-transformers would run it last, and nothing here would."""
        if module is not None:
            raise TypeError(f"{type(self).__name__} takes no further module, got {name!r}: {_PARTS}")
        super().add_module(name, module)

    @property
    def config(self) -> Any:
        """The BertConfig of the model."""
        return self.model.config

    @property
    def modalities(self) -> list[str]:
        return ["text"]

    def supports(self, modality: Any) -> bool:
        """Whether a modality of sentence-transformers can be encoded: "text" alone."""
        return modality == "text"

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `encode` takes it for one text: a str, or a dict of one."""
        if isinstance(inputs, np.ndarray):
            return inputs.ndim == 0
        return isinstance(inputs, (str, dict)) or not isinstance(inputs, Iterable)

    @property
    def model_card_data(self) -> Evaluations:
        """Where evaluators leave their numbers."""
        return self.__dict__.setdefault("_evaluations", Evaluations())

    def get_backend(self) -> str:
        """ "torch", which is what sentence-transformers calls it."""
        return "torch"

    def get_model_kwargs(self) -> list[str]:
        """The names of further arguments of `encode` and `predict`: there are none."""
        return []

    def get_max_seq_length(self) -> int:
        return self.max_seq_length

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """What an evaluator of sentence-transformers says of this model; it may write to a folder `output_path`."""
        if output_path is not None:
            os.makedirs(output_path, exist_ok=True)
        return evaluator(self, output_path)

    def save(self, path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> None:
        """`save_pretrained`, under its other name."""
        if path is not None:
            self.save_pretrained(path, *args, **kwargs)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        *,
        task: str | None = None,
        processing_kwargs: Any = None,
    ) -> dict[str, Any]:
        """Texts, or pairs of them -> the tensors of a padded batch, which `forward` takes, on the CPU.

        input_ids, token_type_ids, attention_mask: (B, S) int64; modality: "text"; prompt_length: with a prompt, how
        many tokens pooling may leave out. task has no effect.
        """  # fmt: skip
        items, single = as_texts(inputs, "inputs")
        texts: list[str] = list(items)
        if single:
            raise TypeError(f"inputs: got {type(inputs).__name__}, expected a list")
        if not texts:
            return {}
        pairs = [text.second for text in texts if isinstance(text, Pair)]
        if pairs and len(pairs) != len(texts):
            raise TypeError("inputs: got pairs and single texts, expected one of them")
        firsts, limit = [(prompt or "") + str(text) for text in texts], self._limit(processing_kwargs)
        encoding = self.tokenizer(firsts, pairs or None, padding=True, max_length=limit, return_tensors="pt")
        features: dict[str, Any] = {**encoding, "modality": "text"}
        if prompt:
            ids = self.tokenizer.encode_packed([prompt], max_length=limit, warn=False).input_ids
            features["prompt_length"] = len(ids) - int(ids[-1].item() in self.tokenizer.all_special_ids)
        return features

    def tokenize(self, texts: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        """`preprocess`, under its name before sentence-transformers 5.4."""
        return self.preprocess(texts, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """No effect but a warning: `encode` and `predict` run fastbert's kernels, and never call `forward`."""
        logger.warning("compile: has no effect on %s, which runs fastbert's own kernels", type(self).__name__)

    def _limit(self, processing_kwargs: Any) -> int:
        """The most tokens of a text in one call."""
        raise NotImplementedError


def passed_over(**arguments: Any) -> None:
    """Logs the arguments of sentence-transformers' save_pretrained that were given and have no effect here."""
    named = sorted(name for name, value in arguments.items() if value)
    if named:
        logger.info("save_pretrained: %s has no effect: safetensors, and no model card, are written", ", ".join(named))
