"""This module takes, ignores or refuses the arguments of transformers' `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.folder import ARGUMENTS as HUB
from fastbert.checkpoint.folder import resolve

logger = logging.getLogger("fastbert")

# Arguments that `Arguments.of` uses, beside those of `resolve`.
TAKEN = (
    "config", "state_dict", "variant", "torch_dtype", "device_map", "use_auth_token", "ignore_mismatched_sizes",
    "output_loading_info", "add_pooling_layer", "key_mapping",
)  # fmt: skip

# Arguments that change nothing, and why. A set argument is logged.
IGNORED = {
    "attn_implementation": "one implementation of attention serves all models; output_attentions=True works with it",
    "experts_implementation": "the models have no experts",
    "low_cpu_mem_usage": "weights are never held twice",
    "trust_remote_code": "no code of a checkpoint is ever run",
    "code_revision": "no code of a checkpoint is ever run",
    "resume_download": "the hub's client resumes downloads itself",
    "mirror": "the hub's client has no mirrors",
    "tqdm_class": "the hub's client shows its own progress",
    "max_memory": "the model is on one device",
    "offload_folder": "offloading is not supported",
    "offload_state_dict": "offloading is not supported",
    "offload_buffers": "offloading is not supported",
    "generation_config": "encoders do not generate",
    "use_kernels": "the kernels are fastbert's own",
    "kernel_config": "the kernels are fastbert's own",
    "allow_all_kernels": "the kernels are fastbert's own",
    "adapter_name": "adapters are not loaded",
    "use_flash_attention_2": "one implementation of attention serves all models",
    "reference_compile": "torch.compile(model) compiles it",
    "_fast_init": "weights in a checkpoint are never initialised",
    "_from_auto": "it names the caller", "_from_pipeline": "it names the caller", "_commit_hash": "revision says it",
}  # fmt: skip

# Arguments that fastbert does not support, and an alternative.
REFUSED = {
    "from_tf": "only PyTorch weights are read; transformers 4 converts others",
    "from_flax": "only PyTorch weights are read; transformers 4 converts others",
    "gguf_file": "GGUF files are not read",
    "quantization_config": "precision='int8' or 'fp8' runs the encoder's linears in 8 bits",
    "load_in_8bit": "precision='int8' or 'fp8' runs the encoder's linears in 8 bits",
    "load_in_4bit": "precision='int8' or 'fp8' runs the encoder's linears in 8 bits",
    "tp_plan": "the model is on one device",
    "tp_size": "the model is on one device",
    "device_mesh": "the model is on one device",
    "distributed_config": "the model is on one device",
    "adapter_kwargs": "peft.PeftModel.from_pretrained(model, ...) loads an adapter",
    "proxies": "the hub's client reads HTTP_PROXY and HTTPS_PROXY from the environment",
}

_SAVE_IGNORED = {
    "token": "uploading is not supported",
    "save_peft_format": "adapters are saved by peft",
    "save_original_format": "the model's family determines the names of files",
    "save_function": "weights are written as safetensors",
    "save_config": "config.json is always written",
}
_SAVE_REFUSED = {
    "push_to_hub": "huggingface_hub.upload_folder uploads the folder",
    "distributed_checkpoint": "the model is on one device",
}


@dataclass
class Arguments:
    """`Arguments` hold the arguments of a call of `from_pretrained` in fastbert's terms."""

    hub: dict[str, Any]  # Arguments of `resolve`.
    settings: dict[str, Any]  # Overrides of the config.
    model: dict[str, Any] = field(default_factory=dict)  # Arguments of the model's class. The other fields: as there.
    config: Any = None
    state_dict: Mapping[str, Tensor] | None = None
    variant: str | None = None
    dtype: Any = None
    device: torch.device | None = None
    ignore_mismatched_sizes: bool = False
    output_loading_info: bool = False
    key_mapping: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Arguments:
        """Sorts keyword arguments, and logs those of IGNORED. Raises ValueError for one of REFUSED.

        A value without effect, such as None, is neither logged nor refused.
        """
        rest = dict(keywords)
        if rest.get("use_auth_token") is not None and rest.get("token") is None:
            rest["token"] = rest["use_auth_token"]
        rest.pop("use_auth_token", None)
        if rest.pop("weights_only", True) is False:
            raise ValueError(
                "weights_only: got False, expected True: pickles with other objects than tensors are not read"
            )
        refuse(rest, REFUSED, "from_pretrained")
        ignore(rest, IGNORED, "from_pretrained")
        hub = {name: rest.pop(name) for name in HUB if name in rest}
        hub = {name: value for name, value in hub.items() if value is not None}
        arguments = cls(hub, {}, config=rest.pop("config", None), state_dict=rest.pop("state_dict", None))
        arguments.variant = rest.pop("variant", None)
        arguments.dtype = rest.pop("torch_dtype", None)
        arguments.device = device_of(rest.pop("device_map", None))
        arguments.ignore_mismatched_sizes = bool(rest.pop("ignore_mismatched_sizes", False))
        arguments.output_loading_info = bool(rest.pop("output_loading_info", False))
        arguments.key_mapping = rest.pop("key_mapping", None) or {}
        if "add_pooling_layer" in rest:
            arguments.model["add_pooling_layer"] = bool(rest.pop("add_pooling_layer"))
        arguments.settings = rest
        return arguments

    def read_config(self, folder: str | os.PathLike[str]) -> BertConfig:
        """Reads the folder's config, or takes the argument `config`, and applies the overrides."""
        config = self.config
        if config is None:
            return BertConfig.from_pretrained(folder, **self.settings)
        if isinstance(config, (str, os.PathLike)):
            options = {name: value for name, value in self.hub.items() if name not in ("subfolder", "use_safetensors")}
            path = config if os.path.exists(os.path.expanduser(config)) else resolve(config, weights=False, **options)
            return BertConfig.from_pretrained(path, **self.settings)
        if isinstance(config, BertConfig) and not self.settings:
            return copy.deepcopy(config)
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config: expected a config, a folder or a hub id, got {type(config).__name__}")
        return BertConfig.from_dict(config.to_dict(), **self.settings)

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames a checkpoint's tensors by `key_mapping`, which maps regular expressions to their replacements."""
        names = {name: name for name in state}
        for pattern, replacement in self.key_mapping.items():
            names = {stored: re.sub(pattern, replacement, name) for stored, name in names.items()}
        return {name: state[stored] for stored, name in names.items()}


def refuse(arguments: dict[str, Any], reasons: Mapping[str, str], caller: str) -> None:
    """Removes the arguments named in `reasons`. Raises ValueError for the first that is set."""
    for name, reason in reasons.items():
        value = arguments.pop(name, None)
        if _asks(value):
            raise ValueError(f"{name}: got {value!r}, which {caller} does not support: {reason}")


def ignore(arguments: dict[str, Any], reasons: Mapping[str, str], caller: str) -> None:
    """Removes the arguments named in `reasons`, and logs those that are set."""
    for name, reason in reasons.items():
        value = arguments.pop(name, None)
        if _asks(value) and not name.startswith("_"):
            logger.info("%s: ignores %s=%r: %s", caller, name, value, reason)


def _asks(value: Any) -> bool:
    return value is not None and value is not False and value != {}


def device_of(device_map: Any) -> torch.device | None:
    """Returns the one device of a device_map, or None. Raises ValueError for several devices, and for the disk."""
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        devices = set(map(_one_device, device_map.values()))
        if len(devices) != 1:
            raise ValueError(f"device_map: got {dict(device_map)!r}, expected one device: the model is not split")
        return devices.pop()
    return _one_device(device_map)


def _one_device(value: Any) -> torch.device:
    if isinstance(value, str) and value in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if isinstance(value, str) and value in ("disk", "meta"):
        raise ValueError(f"device_map: got {value!r}, expected a device that computes: offloading is not supported")
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map: got {value!r}, expected a device, 'auto' or a dict with one device") from error


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def n_bytes(size: int | str) -> int:
    """Converts a size to bytes: a number, or text like "5GB". 1 kB is 1000 bytes and 1 KiB is 1024."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(size).lower())
    if match is None:
        raise ValueError(f"max_shard_size: got {size!r}, expected a number of bytes, or text like '5GB' or '200MiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def check_saving(keywords: Mapping[str, Any]) -> None:
    """Checks the keyword arguments of save_pretrained.

    Raises TypeError for one that transformers does not take, and ValueError for one that fastbert does not support.
    """
    rest = dict(keywords)
    if rest.pop("safe_serialization", True) is False:
        raise ValueError("safe_serialization: got False, expected True: only safetensors files are written")
    refuse(rest, _SAVE_REFUSED, "save_pretrained")
    ignore(rest, _SAVE_IGNORED, "save_pretrained")
    if rest:
        raise TypeError(f"save_pretrained() got an unexpected keyword argument {next(iter(rest))!r}")
