"""Loading what sentence-transformers loads, by the arguments of its constructors and the settings of a folder."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert.checkpoint import files as checkpoint
from fastbert.engine import cpu_encoder
from fastbert.models.pretrained import PreTrainedModel
from fastbert.pipelines import folder as sentence_layout
from fastbert.pipelines.folder import Layout
from fastbert.pipelines.names import cache_folder, full_name
from fastbert.pipelines.settings import LOADING_HARMLESS
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

Model = TypeVar("Model", bound=PreTrainedModel)

# Names of one argument in several versions; the first is today's.
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
    """Arguments of SentenceTransformer(...) and CrossEncoder(...) that name files or are passed on to transformers."""

    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)  # of checkpoint.resolve
    others: dict[str, Any] = field(default_factory=dict)  # of the model's from_pretrained

    @classmethod
    def of(cls, options: dict[str, Any], revision: str | None) -> Arguments:
        """Sorts them. Raises TypeError where one comes under two names, or is no dict where one is expected."""
        options, known = dict(options), {}
        for name, names in _ALIASES.items():
            came = [other for other in names if options.get(other) is not None]
            if len(came) > 1:
                raise TypeError(f"{came[0]}: got {' and '.join(came)}, which are names of one argument")
            known[name] = options[came[0]] if came else None
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
            raise TypeError("output_loading_info: got True, but one object is returned here")
        model, tokenizer, config = (
            dict(known[name] or {}) for name in ("model_kwargs", "processor_kwargs", "config_kwargs")
        )
        # Arguments of transformers' from_pretrained may also come by themselves.
        for name in options.keys() & (LOADING_HARMLESS | {"torch_dtype", "device_map"}):
            model.setdefault(name, options.pop(name))
        return cls(model, tokenizer, config, hub, options)

    def folder(self, src: Any, owner: str) -> Path:
        """The local folder of a checkpoint; a name without an owner is one of `owner`'s."""
        return checkpoint.resolve(full_name(src, owner), **self.hub)


def load(
    kind: type[Model],
    layout: Layout,
    src: Any,
    arguments: Arguments,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    **how: Any,
) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer of a folder, as its settings and the arguments say; the arguments count first.

    Raises ValueError for a setting of the folder that is not supported, TypeError for such an argument.
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
        how["use_safetensors"] = model["use_safetensors"]
    where = settings.file or layout.transformer
    if passed := sorted(model.keys() & {"attn_implementation", "trust_remote_code"}):
        logger.info("%s: %s of the model has no effect here", src, ", ".join(passed))
    if unknown := sorted(model.keys() - LOADING_HARMLESS):
        raise _refusal(where, "model_args", "model_kwargs", unknown, settings.model)
    overrides = {name: value for name, value in config.items() if name not in LOADING_HARMLESS}
    loaded = kind.from_pretrained(
        layout.transformer, dtype=dtype, device=device, **how, **{**overrides, **arguments.others}
    )
    cpu_encoder.choose_cpu_dtype(loaded, dtype)
    return loaded, _tokenizer(layout, arguments, src, loaded.longest_text)


def _tokenizer(layout: Layout, arguments: Arguments, src: Any, positions: int) -> Tokenizer:
    settings = layout.settings
    given = {**settings.tokenizer, **arguments.tokenizer}
    given = {name: value for name, value in given.items() if name not in LOADING_HARMLESS}
    limit = given.pop("model_max_length", None) or settings.max_seq_length
    limit = settings.max_length or limit
    try:
        tokenizer = Tokenizer.from_pretrained(layout.transformer, **given)
    except TypeError as error:
        if not given.keys() & settings.tokenizer.keys():
            raise TypeError(f"processor_kwargs: {error}") from error
        raise ValueError(f"{settings.file}: tokenizer_args: {error}") from error
    if settings.do_lower_case:
        tokenizer = sentence_layout.lowercasing(tokenizer, layout.transformer)
    if limit is not None:
        if limit > positions:
            logger.warning("%s: max_seq_length is %d, the model has %d positions: taking %d", src, limit, positions,
                           positions)  # fmt: skip
        tokenizer.model_max_length = limit
    return tokenizer


def _popped_dtype(kwargs: dict[str, Any]) -> str | torch.dtype | None:
    """The dtype that arguments of transformers' from_pretrained name, under its new name or its old one."""
    dtype = kwargs.pop("dtype", None)
    old = kwargs.pop("torch_dtype", None)
    return old if dtype is None else dtype


def _device(device_map: Any) -> str | torch.device | None:
    """The one device of a device_map; None where it leaves the choice open. Raises ValueError for several devices."""
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return None
    if isinstance(device_map, bool) or not isinstance(device_map, (str, int, torch.device)):
        raise ValueError(f"device_map: got {device_map!r}, expected one device, as device takes it")
    return torch.device(device_map)


def _refusal(
    where: str | os.PathLike[str], of_file: str, argument: str, unknown: list[str], stored: dict[str, Any]
) -> Exception:
    """What is raised for keys that mean something to transformers, and are not followed here."""
    in_file = [name for name in unknown if name in stored]
    if in_file:
        return ValueError(f"{where}: {of_file} has {', '.join(in_file)}, which is not supported")
    return TypeError(f"{argument}: got {', '.join(unknown)}, which is not supported")
