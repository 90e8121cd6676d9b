"""The keys of a sentence-transformers folder's JSON files are followed, ignored, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import read_json

logger = logging.getLogger("fastbert")

# The names of a Transformer's settings, in the order of the search. The first file that is not empty counts.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Keys of these files that change the result, and are followed.
FOLLOWED = {
    "max_seq_length", "do_lower_case", "model_args", "model_kwargs", "tokenizer_args", "tokenizer_kwargs",
    "processor_kwargs", "config_args", "config_kwargs", "processing_kwargs",
}  # fmt: skip
# Keys that may hold one value or nothing. Another value is refused.
EXPECTED = {"transformer_task", "module_output_name", "modality_config"}
# Keys of models with a vector for each token. Other models do not use them, and refuse them.
TASKS = {"query_length", "document_length", "query_expansion"}
# Keys that are refused with any value.
REFUSED = {"tokenizer_name_or_path"}
# Keys that change the way of a computation, and no number.
HARMLESS = {"unpad_inputs", "cache_dir", "backend"}

# Keys of config_sentence_transformers.json.
MODEL_KEYS = {
    "model_type", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "activation_fn",
    "max_active_dims",
}  # fmt: skip
MODEL_KEYS_HARMLESS = {"__version__"}
MODEL_KEYS_LOGGED = {"requirements", "keep_in_fp32_modules"}

# Keys of a module's config.json.
MODULE_KEYS = {
    "Pooling": {
        "word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", "pooling_mode_cls_token",
        "pooling_mode_max_tokens", "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
    },
    "Dense": {
        "in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name",
        "use_residual",
    },
    "LayerNorm": {"dimension"},
    "Dropout": {"dropout"},
    "Normalize": {"module_input_name", "module_output_name"},
    "SpladePooling": {"pooling_strategy", "activation_function", "embedding_dimension", "word_embedding_dimension",
                      "chunk_size"},
    "MultiVectorMask": {"skiplist_words", "skiplist_tasks", "keep_only_token_ids"},
}  # fmt: skip
MODULES_KEYS = {"idx", "name", "path", "type", "kwargs"}

# Arguments of transformers' from_pretrained that change no number.
LOADING_HARMLESS = {
    "trust_remote_code", "attn_implementation", "low_cpu_mem_usage", "revision", "token", "use_auth_token", "cache_dir",
    "local_files_only", "force_download", "resume_download", "proxies", "use_safetensors", "add_pooling_layer",
    "use_fast", "use_cache", "output_attentions", "output_hidden_states", "output_loading_info", "return_dict",
    "clean_up_tokenization_spaces", "code_revision", "offload_folder", "offload_state_dict", "max_memory",
    "use_kernels", "weights_only", "user_agent", "backend",
}  # fmt: skip


@dataclass
class TransformerSettings:
    """TransformerSettings have the content of a Transformer module's file.

    max_length: of processing_kwargs; it has priority over max_seq_length. model, tokenizer, config: arguments for the
    from_pretrained of each. tasks: the settings for queries and documents of models with a vector for each token, by
    TASKS.
    """

    file: Path | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    max_length: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)


def read_transformer(
    folder: Path,
    task: str = "feature-extraction",
    output: str = "token_embeddings",
    method_output: str = "last_hidden_state",
    has_tasks: bool = False,
) -> TransformerSettings:
    """Reads the settings of the Transformer module in a folder.

    task, output, method_output: the values of transformer_task, module_output_name and method_output_name that are
    supported. has_tasks: whether TASKS are followed. Raises ValueError with the file and the key for a setting that is
    not supported.
    """
    file, content = None, {}
    for name in TRANSFORMER_CONFIGS:
        if (folder / name).is_file() and (content := read_json(folder / name)):
            file = folder / name
            break
    if file is None:
        return TransformerSettings()
    check_keys(file, content, FOLLOWED | EXPECTED | TASKS | REFUSED | HARMLESS)
    for key, expected in (("transformer_task", task), ("module_output_name", output)):
        if content.get(key) not in (None, expected):
            raise ValueError(f"{file}: {key} is {content[key]!r}, but only {expected!r} is supported")
    _check_modalities(file, content.get("modality_config"), method_output)
    for key in sorted(REFUSED if has_tasks else REFUSED | TASKS):
        if content.get(key):
            raise ValueError(f"{file}: {key} is {content[key]!r}, which is not supported")
    limit = content.get("max_seq_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{file}: max_seq_length is {limit!r}, expected a positive whole number or null")
    settings = TransformerSettings(
        file,
        limit,
        bool(content.get("do_lower_case")),
        processing_limit(f"{file}: processing_kwargs", content.get("processing_kwargs")),
        *(_loading(file, content, keys) for keys in (
            ("model_args", "model_kwargs"), ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs"),
            ("config_args", "config_kwargs"),
        )),
    )  # fmt: skip
    settings.tasks = {key: content[key] for key in sorted(TASKS) if content.get(key)}
    return settings


def _loading(file: Path, content: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Returns the object under the first of these keys, which are the names of one setting in several versions."""
    for key in keys:
        value = content.get(key)
        if value is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{file}: {key} is {value!r}, expected an object")
            return dict(value)
    return {}


def _check_modalities(file: Path, modalities: Any, method_output: str) -> None:
    """Raises ValueError if text does not go through the model's forward, or if another output is used."""
    if modalities is None:
        return
    text = modalities.get("text") if isinstance(modalities, dict) else None
    output = text.get("method_output_name") if isinstance(text, dict) else None
    output = output[0] if isinstance(output, list) and len(output) == 1 else output
    if (
        set(modalities) != {"text"}
        or not isinstance(text, dict)
        or text.get("method") != "forward"
        or output != method_output
    ):
        expected = {"text": {"method": "forward", "method_output_name": method_output}}
        raise ValueError(f"{file}: modality_config is {modalities!r}, but only {expected!r} is supported")  # fmt: skip


def processing_limit(name: str, value: Any) -> int | None:
    """Returns the max_length of `processing_kwargs` for text, if any. Raises ValueError for another setting."""
    if not value:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, expected a dict")
    settings: dict[str, Any] = {}
    for key in ("text", "common"):
        settings.update(value.get(key) or {})
    limit = settings.pop("max_length", None)
    harmless = {"padding": (True, False, "longest", "max_length"), "truncation": (True, "longest_first"),
                "return_tensors": ("pt",), "pad_to_multiple_of": None, "verbose": None}  # fmt: skip
    for key, setting in settings.items():
        allowed = harmless.get(key, ())
        if allowed is not None and not any(type(setting) is type(choice) and setting == choice for choice in allowed):
            raise ValueError(f"{name}: {key} is {setting!r}, which is not supported")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{name}: max_length is {limit!r}, expected a positive whole number")
    return limit


def check_keys(file: Path, content: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for an unknown key, because it may change the result."""
    unknown = sorted(key for key in set(content) - set(known) if content[key] is not None)
    if unknown:
        raise ValueError(f"{file}: the key {', '.join(map(repr, unknown))} is not supported")


def check_model_keys(file: Path, content: Mapping[str, Any]) -> None:
    """Logs the keys of config_sentence_transformers.json that are not followed."""
    passed = sorted(key for key in set(content) - MODEL_KEYS - MODEL_KEYS_HARMLESS if content[key])
    if passed:
        logger.warning("%s: %s has no effect here", file, ", ".join(passed))
