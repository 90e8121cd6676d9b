"""This module loads models by the arguments of sentence-transformers' constructors and the settings of a folder."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert.checkpoint.folder import resolve
from fastbert.engine import cpu_encoder
from fastbert.engine.options import OPTION_NAMES
from fastbert.models.pretrained import PreTrainedModel
from fastbert.pipelines.folder import Layout, lowercasing
from fastbert.pipelines.names import cache_folder, full_name
from fastbert.pipelines.settings import LOADING_HARMLESS
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

Model = TypeVar("Model", bound=PreTrainedModel)

# The names of one argument in several versions.
_ALIASES = {
    "model_kwargs": ("model_kwargs", "model_args", "automodel_args"),
    "processor_kwargs": ("processor_kwargs", "tokenizer_kwargs", "tokenizer_args"),
    "config_kwargs": ("config_kwargs", "config_args"),
    "cache_folder": ("cache_folder", "cache_dir"),
    "token": ("token", "use_auth_token"),
}
_UNUSED = ("trust_remote_code", "model_card_data")
_ADAPTER = "adapter_config.json"


@dataclass
class Arguments:
    """Arguments are those of SentenceTransformer(...) and CrossEncoder(...) that name files or are passed to
    transformers.

    hub: for `resolve`. others: for the model's from_pretrained.
    """

    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: dict[str, Any], revision: str | None) -> Arguments:
        """Sorts options. Raises TypeError for an option under two names, and for one that must be a dict and is not."""
        options, known = dict(options), {}
        for name, names in _ALIASES.items():
            used = [other for other in names if options.get(other) is not None]
            if len(used) > 1:
                raise TypeError(f"{used[0]}: got {' and '.join(used)}, which are two names of one argument")
            known[name] = options[used[0]] if used else None
            for other in names:
                options.pop(other, None)
        for name in _UNUSED:
            if options.pop(name, None):
                logger.info("from_pretrained: %s has no effect: no code of a checkpoint is run", name)
        for name in ("model_kwargs", "processor_kwargs", "config_kwargs"):
            if known[name] is not None and not isinstance(known[name], dict):
                raise TypeError(f"{name}: got {type(known[name]).__name__}, expected a dict")
        hub = {
            "revision": revision,
            "cache_dir": cache_folder(known["cache_folder"]),
            "token": known["token"],
            "local_files_only": bool(options.pop("local_files_only", False)),
            "force_download": bool(options.pop("force_download", False)),
            "subfolder": options.pop("subfolder", None) or "",
        }
        if options.pop("output_loading_info", False):
            raise TypeError("output_loading_info: got True, expected False: from_pretrained returns one object")
        model, tokenizer, config = (
            dict(known[name] or {}) for name in ("model_kwargs", "processor_kwargs", "config_kwargs")
        )
        # Arguments of transformers' from_pretrained may also be given directly.
        for name in options.keys() & ((LOADING_HARMLESS | {"torch_dtype", "device_map"}) - set(OPTION_NAMES)):
            model.setdefault(name, options.pop(name))
        return cls(model, tokenizer, config, hub, options)

    def folder(self, src: Any, owner: str) -> Path:
        """Returns the local folder of a checkpoint. A name without an owner gets `owner`."""
        return resolve(full_name(src, owner), **self.hub)


def load(
    kind: type[Model],
    layout: Layout,
    src: Any,
    arguments: Arguments,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    **model_options: Any,
) -> tuple[Model, Tokenizer]:
    """Loads the model and the tokenizer of a folder by its settings and the arguments.

    The arguments have priority. Raises ValueError for a setting of the folder that is not supported, and TypeError for
    such an argument.
    """
    if (layout.transformer / _ADAPTER).is_file():
        raise ValueError(
            f"{layout.transformer / _ADAPTER}: the checkpoint is a PEFT adapter beside a model; save what peft's "
            "merge_and_unload gives, and load that"
        )
    settings = layout.settings
    model, config = {**settings.model, **arguments.model}, {**settings.config, **arguments.config}
    if dtype == "auto":
        dtype = _popped_dtype(model) or _popped_dtype(config) or dtype
    if device is None:
        device = _device(arguments.model.get("device_map")) or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("dtype", "torch_dtype", "device_map"):
        model.pop(name, None), config.pop(name, None)
    if model.get("use_safetensors") is not None:
        model_options["use_safetensors"] = model["use_safetensors"]
    file = settings.file or layout.transformer
    if passed := sorted(model.keys() & {"attn_implementation", "trust_remote_code"}):
        logger.info("%s: %s of the model has no effect here", src, ", ".join(passed))
    if unknown := sorted(model.keys() - LOADING_HARMLESS):
        raise _refusal(file, "model_args", "model_kwargs", unknown, settings.model)
    overrides = {name: value for name, value in config.items() if name not in LOADING_HARMLESS}
    loaded = kind.from_pretrained(
        layout.transformer, dtype=dtype, device=device, **model_options, **{**overrides, **arguments.others}
    )
    cpu_encoder.choose_cpu_dtype(loaded, dtype)
    return loaded, _load_tokenizer(layout, arguments, src, loaded.longest_text)


def _load_tokenizer(layout: Layout, arguments: Arguments, src: Any, positions: int) -> Tokenizer:
    """Loads the tokenizer, with the limit and the lower-casing of settings and arguments."""
    settings = layout.settings
    overrides = {**settings.tokenizer, **arguments.tokenizer}
    overrides = {name: value for name, value in overrides.items() if name not in LOADING_HARMLESS}
    limit = overrides.pop("model_max_length", None) or settings.max_seq_length
    limit = settings.max_length or limit
    try:
        tokenizer = Tokenizer.from_pretrained(layout.transformer, **overrides)
    except TypeError as error:
        if not overrides.keys() & settings.tokenizer.keys():
            raise TypeError(f"processor_kwargs: {error}") from error
        raise ValueError(f"{settings.file}: tokenizer_args: {error}") from error
    if settings.do_lower_case:
        tokenizer = lowercasing(tokenizer, layout.transformer)
    if limit is not None:
        if limit > positions:
            logger.warning("%s: max_seq_length is %d, the model has %d positions: using %d", src, limit, positions,
                           positions)  # fmt: skip
        tokenizer.model_max_length = limit
    if tokenizer.padding_side == "left":
        logger.warning("%s: padding_side='left' is not followed: a text's vector is that without padding, whereas "
                       "sentence-transformers' depends on the other texts of its batch", src)  # fmt: skip
    return tokenizer


def _popped_dtype(kwargs: dict[str, Any]) -> str | torch.dtype | None:
    """Takes the dtype out of arguments of transformers' from_pretrained, under its new name or its old one."""
    dtype = kwargs.pop("dtype", None)
    old = kwargs.pop("torch_dtype", None)
    return old if dtype is None else dtype


def _device(device_map: Any) -> str | torch.device | None:
    """Returns the device of a device_map, or None if it leaves the choice open. Raises ValueError for several."""
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return None
    if isinstance(device_map, bool) or not isinstance(device_map, (str, int, torch.device)):
        raise ValueError(f"device_map: got {device_map!r}, expected one device, as device takes it")
    return torch.device(device_map)


def _refusal(
    file: str | os.PathLike[str], key: str, argument: str, unknown: list[str], stored: dict[str, Any]
) -> Exception:
    """Returns the error for settings that transformers follows, and fastbert does not.

    file, key: the place of a setting of the folder. argument: the place of a setting of the caller.
    """
    in_file = [name for name in unknown if name in stored]
    if in_file:
        return ValueError(f"{file}: {key} has {', '.join(in_file)}, which is not supported")
    return TypeError(f"{argument}: got {', '.join(unknown)}, which is not supported")
