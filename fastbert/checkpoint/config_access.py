"""This module gives a config the attributes that tools for transformers read and write, beside its fields."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.checkpoint.family import Family
from fastbert.checkpoint.files import read_json, write_text

# The default values of transformers' configs.
DEFAULTS: dict[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "torchscript": False,
    "use_cache": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
    "bos_token_id": None,
    "eos_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "finetuning_task": None,
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "transformers_version": None,
    "keys_to_ignore_at_inference": [],
    "sub_configs": {},
    "is_composition": False,
    "_name_or_path": "",
    "_attn_implementation": None,
    "_commit_hash": None,
    "_auto_class": None,
}

# Settings of transformers that change the computation, and the beginning of the sentence that refuses them.
UNSUPPORTED = {
    "is_decoder": "decoder mode is",
    "add_cross_attention": "cross-attention is",
    "is_encoder_decoder": "encoder-decoder mode is",
    "pruned_heads": "pruned attention heads are",
    "quantization_config": "quantized checkpoints are",
}


def refuse_unsupported(name: str, value: Any, position_types: tuple[str, ...] | None) -> None:
    """Raises ValueError for a setting whose computation fastbert does not have.

    position_types: allowed values of position_embedding_type, or None if the family's code does not read it.
    """
    if name == "position_embedding_type" and position_types is not None and value not in (None, *position_types):
        supported = " or ".join(map(repr, position_types))
        raise ValueError(f"position_embedding_type: got {value!r}, but only {supported} is supported")
    if name in UNSUPPORTED and value:
        raise ValueError(f"{name}: got {value!r}, but {UNSUPPORTED[name]} not supported")


class ConfigAccess:
    """This class gives access by transformers' names. A setting that is no field is kept in `extra`, and saved.

    A name that begins with an underscore is a note about the object, and is not saved.
    """

    if TYPE_CHECKING:
        extra: dict[str, Any]
        dtype: str | None
        id2label: dict[int, str]
        num_labels: int

        @property
        def family(self) -> Family: ...

        def to_dict(self) -> dict[str, Any]: ...

        @classmethod
        def from_dict(cls, d: Mapping[str, Any], **overrides: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra")  # It is not there while a copy or a pickle is made.
        if extra is not None and not name.startswith("__"):
            ours = self.attribute_map.get(name)
            if ours is not None:
                return getattr(self, ours)
            if name in extra:
                return extra[name]
            if name in DEFAULTS:
                return copy.copy(DEFAULTS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name == "dtype" and value is not None:
            value = str(value).removeprefix("torch.")  # A torch.dtype prints as "torch.float32".
        if name == "id2label" and isinstance(value, Mapping) and all(str(key).isdigit() for key in value):
            value = {int(key): label for key, label in value.items()}  # JSON has strings as keys.
        if name in cls.__dict__["__dataclass_fields__"] or name.startswith("_") or hasattr(cls, name):
            object.__setattr__(self, name, value)
        elif name in self.attribute_map:
            setattr(self, self.attribute_map[name], value)
        else:
            refuse_unsupported(name, value, self.family.position_types)
            self.extra[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self.extra:
            del self.extra[name]
        else:
            object.__delattr__(self, name)

    @property
    def attribute_map(self) -> dict[str, str]:
        """Maps the family's names of settings to the names of the fields."""
        family: Any = self.family
        return dict(family.settings)

    @property
    def torch_dtype(self) -> str | None:
        """Returns `dtype`; this is its old name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def use_return_dict(self) -> bool:
        """Tells whether a model returns an output class by default."""
        return bool(self.return_dict and not self.torchscript)

    @property
    def name_or_path(self) -> str:
        """Returns the folder or hub id that the config was read from, or ""."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        self._name_or_path = str(value)

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets each name of a dictionary to its value."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Returns the config of the text model, which is this one."""
        return self

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the values of `to_dict` that differ from the family's defaults, and the model_type."""
        values = self.to_dict()
        defaults = type(self).from_dict({"model_type": values["model_type"]}).to_dict()
        del defaults["model_type"]
        return {name: value for name, value in values.items() if name not in defaults or defaults[name] != value}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Returns the JSON text of `to_diff_dict`, or of `to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes the text of `to_json_string` to a file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Reads a config from a JSON file. Raises as `from_pretrained` does."""
        return cls.from_dict(read_json(json_file))
