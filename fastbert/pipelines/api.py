"""SentenceEncoder and CrossEncoder share a part of the interface of sentence-transformers' models.

A name of that interface works here, or raises an error that says what to do instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.checks import check_text, expect, positive, positive_or_none
from fastbert.pipelines.inputs import Pair, as_texts, n_prompt_tokens
from fastbert.pipelines.pool import Pool, Work, default_devices
from fastbert.pipelines.settings import processing_limit
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

# The warning of sentence-transformers, word for word: programs look for it.
TWO_PROMPTS = (
    "Provide either a `prompt`, a `prompt_name`, or neither, but not both. "
    "Ignoring the `prompt_name` in favor of `prompt`."
)
_TRAIN = "train a model of sentence-transformers; fastbert.accelerate makes it faster"
_HUB = "save_pretrained writes a folder, which huggingface_hub.upload_folder uploads"
_PARTS = "its parts are encoder.model, encoder.tokenizer, and of a SentenceEncoder encoder.pooling and encoder.tail"
_PEFT = "give encoder.model to PEFT"

# Names of sentence-transformers' models that ours lack -> the alternative.
MISSING = {
    **dict.fromkeys(("fit", "old_fit", "smart_batching_collate", "get_sentence_features"), _TRAIN),
    **dict.fromkeys(("push_to_hub", "save_to_hub"), _HUB),
    **dict.fromkeys(("_first_module", "_last_module", "transformers_model", "auto_model", "processor"), _PARTS),
    **dict.fromkeys(
        ("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "enable_adapters", "disable_adapters",
         "active_adapter", "active_adapters", "get_adapter_state_dict"),
        _PEFT,
    ),
    **dict.fromkeys(("append", "extend", "insert", "pop"), _PARTS),
    **dict.fromkeys(("check_peft_compatible_model", "has_peft_compatible_model"), _PEFT),
    "smart_batching_collate_text_only": _TRAIN,
    "get_default_activation_fn": "from_pretrained reads activation_fn from the folder",
    "clear_placement_cache": "to(device) moves the whole encoder",
    "load": "from_pretrained loads a folder",
    "merge": "merge sentence-transformers' own models, and load what they save",
    "gradient_checkpointing_enable": _TRAIN,
    "module_kwargs": "encode takes no arguments for modules",
    "set_keep_in_fp32_modules": "from_pretrained takes a dtype",
}  # fmt: skip


class Evaluations:
    """An `Evaluations` keeps the numbers of sentence-transformers' evaluators, instead of a model card.

    metrics: (class of the evaluator, numbers by name, epoch, step) of each evaluation, in order.
    """

    base_model: str | None = None

    def __init__(self) -> None:
        self.metrics: list[tuple[str, dict[str, Any], int, int]] = []

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Keeps the numbers of one evaluation."""
        self.metrics.append((type(evaluator).__name__, dict(metrics), epoch, step))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"model_card_data has no {name!r}: fastbert keeps only evaluations, and writes no model card"
        )


class SentenceTransformersApi(nn.Module):
    """This class gives a model and its tokenizer the interface of sentence-transformers' models.

    Any other name of sentence-transformers raises an AttributeError that says what to do instead.
    """

    model: Any
    tokenizer: Tokenizer
    prompts: dict[str, str]
    default_prompt_name: str | None

    def __getattr__(self, name: str) -> Any:
        # nn.Module's own __getattr__ costs one more call of a Python function for each module of a text.
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        if name in MISSING:
            raise AttributeError(f"{type(self).__name__} has no {name!r}: {MISSING[name]}")
        return super().__getattr__(name)

    def __len__(self) -> int:
        """Returns the number of modules that sentence-transformers would count."""
        return 1

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is not a sequence of modules: {_PARTS}")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the model. Vectors and scores are float32 even if this is bfloat16 or float16."""
        return self.model.dtype

    @property
    def max_seq_length(self) -> int:
        """Returns the greatest sequence length of a text or a pair, with special tokens.

        It may be set, to at most the number of the model's positions; None means all of them. Raises ValueError for
        more.
        """
        model: Any = self._modules["model"]
        limit, positions = self.tokenizer.model_max_length, model.longest_text
        return positions if limit is None else min(limit, positions)

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        limit = positive_or_none("max_seq_length", value) or self.model.longest_text
        self.tokenizer.model_max_length = self._within_positions("max_seq_length", limit)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Raises TypeError for a module: sentence-transformers would run it last, and fastbert would not run it."""
        if module is not None:
            raise TypeError(f"{type(self).__name__} takes no further module, got {name!r}: {_PARTS}")
        super().add_module(name, module)

    @property
    def config(self) -> Any:
        """Returns the BertConfig of the model."""
        return self.model.config

    @property
    def modalities(self) -> list[str]:
        return ["text"]

    def supports(self, modality: Any) -> bool:
        """Tells whether inputs of a modality can be encoded. There is one such modality, "text"."""
        return modality == "text"

    def is_singular_input(self, inputs: Any) -> bool:
        """Tells whether the inputs of `encode` are a single text: a str, or a dict with one."""
        if isinstance(inputs, np.ndarray):
            return inputs.ndim == 0
        return isinstance(inputs, (str, dict)) or not isinstance(inputs, Iterable)

    @property
    def model_card_data(self) -> Evaluations:
        """Returns the `Evaluations`, to which evaluators write their numbers."""
        return self.__dict__.setdefault("_evaluations", Evaluations())

    def get_backend(self) -> str:
        """Returns the name that sentence-transformers has for a model in PyTorch."""
        return "torch"

    def get_model_kwargs(self) -> list[str]:
        """Returns the names of further arguments of `encode` and `predict`. There are none."""
        return []

    def get_max_seq_length(self) -> int:
        return self.max_seq_length

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """Returns the result of an evaluator of sentence-transformers for this model. It may write to `output_path`."""
        if output_path is not None:
            os.makedirs(output_path, exist_ok=True)
        return evaluator(self, output_path)

    def save(self, path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> None:
        """Saves the model: another name of `save_pretrained`."""
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
        """Makes the padded batch for `forward` from texts or pairs of texts, on the CPU.

        Returns input_ids, token_type_ids and attention_mask, (B, S) int64, and modality, "text". With a prompt it also
        returns prompt_length, the number of prompt tokens, which pooling may leave out. task has no effect.
        """
        items, single = as_texts(inputs, "inputs")
        texts: list[str] = list(items)
        if single:
            raise TypeError(f"inputs: got {type(inputs).__name__}, expected a list")
        if not texts:
            return {}
        pairs = [text.second for text in texts if isinstance(text, Pair)]
        if pairs and len(pairs) != len(texts):
            raise TypeError("inputs: got pairs and single texts, expected only one of the two")
        firsts, limit = [(prompt or "") + str(text) for text in texts], self._limit(processing_kwargs)
        encoding = self.tokenizer(firsts, pairs or None, padding=True, max_length=limit, return_tensors="pt")
        features: dict[str, Any] = {**encoding, "modality": "text"}
        if prompt:
            features["prompt_length"] = n_prompt_tokens(self.tokenizer, prompt, limit)
        return features

    def tokenize(self, texts: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        """Calls `preprocess`. This is the name before sentence-transformers 5.4."""
        return self.preprocess(texts, **kwargs)

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> Pool:
        """Starts a process on each device, and returns the pool for the argument `pool` of `encode` and `predict`.

        target_devices: devices of one type, such as ["cuda:0", "cuda:1"] or ["cpu"] * 4; by default all GPUs, or four
        processes on the CPU. The processes share the threads of this one, and keep the present weights. The pool is a
        context manager, which stops it. Raises ValueError for an empty list and for GPUs and CPUs together, and the
        error of a process.
        """
        devices = default_devices() if target_devices is None else list(target_devices)
        return Pool(devices, self._work(), self).start()

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """Ends the processes of a pool."""
        pool.stop()

    def _work(self) -> Work:
        """Returns the work of a pool's processes."""
        raise NotImplementedError

    def _pool(self, pool: Any, device: Any, workers: int | None, chunk_size: int | None) -> tuple[Pool, bool]:
        """Returns the pool of a call, and whether it is only for this call. The arguments are those of `encode`."""
        positive_or_none("chunk_size", chunk_size)
        if workers is not None:
            expect(pool is None and device in (None, "cpu"), "workers, beside device or pool", workers, "one of them")
            expect(
                device is not None or self.device.type == "cpu", "workers", workers, "a model on a CPU: name devices"
            )
            return Pool(["cpu"] * positive("workers", workers), self._work(), self), True
        if pool is None:
            return Pool(device, self._work(), self), True
        expect(isinstance(pool, Pool), "pool", type(pool).__name__, "the result of start_multi_process_pool")
        expect(pool.owner() is self, "pool", "one of another model", "one that this model started")
        return pool, False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Logs a warning and does nothing else: `encode` and `predict` run fastbert's kernels, and not `forward`."""
        logger.warning("compile: has no effect on %s, which runs fastbert's own kernels", type(self).__name__)

    def _limit(self, processing_kwargs: Any) -> int:
        """Returns the greatest sequence length of a text in one call."""
        limit = processing_limit("processing_kwargs", processing_kwargs) or self.max_seq_length
        return self._within_positions("max_length", limit)

    def _within_positions(self, name: str, limit: int) -> int:
        positions = self.model.longest_text
        if limit > positions:
            raise ValueError(f"{name}: got {limit}, but the model has {positions} positions")
        return limit

    def _set_prompts(self, prompts: dict[str, str], default_prompt_name: str | None) -> None:
        if default_prompt_name is not None and default_prompt_name not in prompts:
            raise ValueError(f"default_prompt_name: got {default_prompt_name!r}, expected one of {list(prompts)}")
        self.prompts, self.default_prompt_name = prompts, default_prompt_name

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """Returns the prompt, the prompt with that name, the default prompt, or an empty text."""
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            if name is None:
                return ""
            if name not in self.prompts:
                raise ValueError(f"prompt_name: got {name!r}, expected one of {list(self.prompts)}")
            prompt = self.prompts[name]
        elif prompt_name is not None:
            logger.warning(TWO_PROMPTS)
        check_text("prompt", prompt)
        return prompt


def log_unused(**arguments: Any) -> None:
    """Logs the arguments of sentence-transformers' save_pretrained that are set but have no effect."""
    named = sorted(name for name, value in arguments.items() if value)
    if named:
        logger.info("save_pretrained: %s has no effect: safetensors, and no model card, are written", ", ".join(named))
