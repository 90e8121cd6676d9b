"""This module reads and writes sentence-transformers' folders, except for the model and the tokenizer in them.

A folder holds modules.json, which names a Transformer, a Pooling and the modules after it (Dense, LayerNorm, Dropout,
Normalize). It has a subfolder for each module with settings, and config_sentence_transformers.json with the prompts.
The names and settings of today's sentence-transformers and of earlier versions are read. The earlier ones are written,
because all versions read them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import nn

from fastbert._version import __version__
from fastbert.checkpoint.files import read_json, write_text
from fastbert.checkpoint.match import match
from fastbert.checkpoint.weights import read_state_dict, write_state_dict
from fastbert.pipelines.modules import ACTIVATIONS, Dense, Dropout, LayerNorm, Normalize, activation_name
from fastbert.pipelines.pipeline import Pooling
from fastbert.pipelines.settings import (
    MODULE_KEYS,
    MODULES_KEYS,
    TRANSFORMER_CONFIGS,
    TransformerSettings,
    check_keys,
    check_model_keys,
    read_transformer,
)
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"

# The flags of pooling modes in earlier versions, in the order in which several vectors are concatenated.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TAIL_MODULES = ("Dense", "LayerNorm", "Dropout", "Normalize")
# The files and modules of sparse and multi-vector models; token_layout.py reads them.
_TOKEN_MODULES = ("MLMTransformer", "SpladePooling", "MultiVectorMask")
_PYLATE_DENSE = "pylate.models.Dense.Dense"


@dataclass
class Layout:
    """A Layout has the content of a sentence encoder's folder, except for the model and its tokenizer."""

    transformer: Path  # the folder of the model and the tokenizer
    settings: TransformerSettings = field(default_factory=TransformerSettings)
    pooling: Pooling = field(default_factory=Pooling)
    tail: list[nn.Module] = field(default_factory=list)  # the modules after pooling
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None
    truncate_dim: int | None = None
    # From token_layout.py: a SpladePooling's settings, those of token vectors, and the most numbers of a sparse vector.
    splade: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    max_active_dims: int | None = None


def read_layout(folder: Path) -> Layout | None:
    """Reads the layout of a sentence-transformers folder. Returns None if there is no modules.json.

    Raises ValueError with the file for a module or a setting that is not supported, and FileNotFoundError for a
    module's missing file.
    """
    if not (folder / MODULES).is_file():
        return None
    entries = read_modules(folder / MODULES)
    (kind, path), *rest = entries
    if kind != "Transformer" or not rest or rest[0][0] != "Pooling":
        raise ValueError(
            f"{folder / MODULES}: expected a Transformer, a Pooling and what follows it, "
            f"got {', '.join(kind for kind, _ in entries)}"
        )
    layout = Layout(path, pooling=_read_pooling(rest[0][1] / "config.json"))
    for kind, path in rest[1:]:
        if kind not in _TAIL_MODULES:
            raise ValueError(f"{folder / MODULES}: got a second {kind}, which is not supported")
        layout.tail.append(read_tail(kind, path))
    layout.settings = read_transformer(layout.transformer)
    read_settings(layout, folder / SETTINGS)
    return layout


def read_cross_encoder_layout(folder: Path) -> tuple[Layout, str | None]:
    """Reads the layout of a cross-encoder's folder, and the path of its activation function, if it names one.

    Before 6.0 sentence-transformers wrote no modules.json; then config.json has that path. Errors are those of
    `read_layout`.
    """
    if (folder / MODULES).is_file():
        entries = read_modules(folder / MODULES)
        names = [name for name, _ in entries]
        if names != ["Transformer"]:
            raise ValueError(f"{folder / MODULES}: expected a Transformer alone, got {', '.join(names)}")
        layout = Layout(entries[0][1])
        layout.settings = read_transformer(layout.transformer, "sequence-classification", "scores", "logits")
        path = read_settings(layout, folder / SETTINGS, "CrossEncoder").get("activation_fn")
    else:
        layout, path = Layout(folder), None
    config = read_json(layout.transformer / "config.json")
    stored = config.get("sentence_transformers")
    if path is None and isinstance(stored, dict):
        path = stored.get("activation_fn")
    return layout, path or config.get("sbert_ce_default_activation_function")


def read_modules(file: Path) -> list[tuple[str, Path]]:
    """Returns (class, folder) of each module."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: expected a list of modules")
    modules = []
    for entry in entries:
        name, path = str(entry.get("type")), str(entry.get("path", ""))
        package, _, kind = name.rpartition(".")
        known = ("Transformer", "Pooling", *_TAIL_MODULES, *_TOKEN_MODULES)
        ours = package.split(".")[0] == "sentence_transformers" or name == _PYLATE_DENSE
        if not ours or kind not in known:
            raise ValueError(
                f"{file}: the module type {name!r} is not supported, only {', '.join(known)} of sentence_transformers"
            )
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(f"{file}: path {path!r} leads out of the folder")
        check_keys(file, entry, MODULES_KEYS)
        if entry.get("kwargs"):
            logger.warning("%s: %s ignores the argument %s of a call", file, kind, ", ".join(map(str, entry["kwargs"])))
        modules.append((kind, file.parent / path))
    return modules


def _read_pooling(file: Path) -> Pooling:
    """Reads the settings of a Pooling, by today's names or as flags."""
    config = read_json(file)
    check_keys(file, config, MODULE_KEYS["Pooling"])
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    try:
        return Pooling(modes, bool(config.get("include_prompt", True)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_tail(kind: str, folder: Path, name: str = "sentence_embedding") -> nn.Module:
    """Reads one of _TAIL_MODULES, with its weights. name: its input and output, in sentence-transformers' terms."""
    file = folder / "config.json"
    if kind == "Normalize":  # earlier versions wrote no settings, and so no folder, for it
        config = read_json(file) if file.is_file() else {}
        check_keys(file, config, MODULE_KEYS[kind])
        _check_names(file, config, name)
        return Normalize()
    config = read_json(file)
    check_keys(file, config, MODULE_KEYS[kind])
    try:
        if kind == "Dropout":
            return Dropout(config.get("dropout", 0.2))
        if kind == "LayerNorm":
            module: nn.Module = LayerNorm(config["dimension"])
        else:
            _check_names(file, config, name)
            sizes, residual = (config["in_features"], config["out_features"]), bool(config.get("use_residual"))
            module = Dense(*sizes, config.get("bias", True), _activation(file, config), residual)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    _load(module, folder)
    return module


def _check_names(file: Path, config: Mapping[str, Any], name: str) -> None:
    """Raises ValueError for a module whose input or output is not `name`."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, name):
            raise ValueError(f"{file}: {key} is {config[key]!r}, but only {name!r} is supported")


def _activation(file: Path, config: Mapping[str, Any]) -> str:
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation_name(path)
    if name is None:
        expected = ", ".join(f"torch.nn.{name}" for name in ACTIVATIONS)
        raise ValueError(f"{file}: activation_function is {path!r}, but only {expected} are supported")
    return name


def _load(module: nn.Module, folder: Path) -> None:
    """Loads a module's weights in float32 at least, which is the dtype of sentence vectors."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    try:
        matched = match(read_state_dict(folder), expected, base_prefix="")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if matched.missing:
        raise ValueError(f"{folder}: the weights lack {', '.join(matched.missing)}")
    state = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in matched.state.items()}
    module.load_state_dict(state, assign=True)


def read_settings(layout: Layout, file: Path, expected: str = "SentenceTransformer") -> dict[str, Any]:
    """Reads config_sentence_transformers.json into the layout, and returns its content.

    expected: its model_type. Raises ValueError for another one.
    """
    config = read_json(file) if file.is_file() else {}
    check_model_keys(file, config)
    kind = config.get("model_type", expected)
    if kind != expected:
        raise ValueError(f"{file}: model_type is {kind!r}, but only {expected!r} is supported")
    layout.prompts = {name: prompt or "" for name, prompt in (config.get("prompts") or {}).items()}
    layout.default_prompt_name = config.get("default_prompt_name")
    layout.similarity_fn_name = config.get("similarity_fn_name")
    layout.truncate_dim = config.get("truncate_dim")
    layout.max_active_dims = config.get("max_active_dims")
    return config


def lowercasing(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Returns the tokenizer with lower-casing before its normalizer, unless that lower-cases. Accents stay."""
    normalizer = tokenizer._rust.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        if normalizer.lowercase:
            return tokenizer
        return Tokenizer.from_pretrained(folder, do_lower_case=True, strip_accents=bool(normalizer.strip_accents))
    before = [] if normalizer is None else [normalizer]
    tokenizer._rust.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer


def _pooling_settings(pooling: Pooling, hidden_size: int) -> dict[str, Any]:
    """Returns the content of 1_Pooling/config.json: flags if they can express the order, else `pooling_mode`."""
    if pooling.modes == tuple(mode for mode in _POOLING_FLAGS.values() if mode in pooling.modes):
        flags = {flag: mode in pooling.modes for flag, mode in _POOLING_FLAGS.items()}
        return {"word_embedding_dimension": hidden_size, **flags, "include_prompt": pooling.include_prompt}
    modes = {"pooling_mode": list(pooling.modes), "include_prompt": pooling.include_prompt}
    return {"embedding_dimension": hidden_size, **modes}


def write_layout(folder: Path, hidden_size: int, layout: Layout) -> None:
    """Writes everything in `folder` except the model and the tokenizer. modules.json comes last, and makes it valid."""

    def write_json(file: Path, content: Any) -> None:
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(content, indent=2) + "\n")

    limits = {"max_seq_length": layout.settings.max_seq_length, "do_lower_case": layout.settings.do_lower_case}
    write_json(folder / TRANSFORMER_CONFIGS[0], limits)
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "__version__": {"fastbert": __version__, "pytorch": torch.__version__},
        "prompts": layout.prompts,
        "default_prompt_name": layout.default_prompt_name,
        "similarity_fn_name": layout.similarity_fn_name,
    }
    if layout.truncate_dim is not None:
        settings["truncate_dim"] = layout.truncate_dim
    write_json(folder / SETTINGS, settings)
    write_json(folder / "1_Pooling" / "config.json", _pooling_settings(layout.pooling, hidden_size))
    names = ["Transformer", "Pooling", *_write_tail(folder, layout.tail, write_json)]
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    write_json(folder / MODULES, entries)


def _write_tail(folder: Path, tail: Sequence[nn.Module], write_json: Callable[[Path, Any], None]) -> list[str]:
    names = []
    for i, module in enumerate(tail, start=2):
        name = type(module).__name__
        names.append(name)
        settings: dict[str, Any] = getattr(module, "settings", dict)()
        if settings:
            write_json(folder / f"{i}_{name}" / "config.json", settings)
        if state := module.state_dict():
            write_state_dict(state, folder / f"{i}_{name}")
    return names
