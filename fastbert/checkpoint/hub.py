"""This module downloads a checkpoint from the Hugging Face hub, through the hub's client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX

# "name" or "owner/name". Any other string (a leading "/", "." or "~", a second "/", a space) can only be a path.
HUB_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)(\w([\w.-]*\w)?/)?\w([\w.-]{0,94}\w)?", re.ASCII)

# fnmatch patterns, in which "*" also matches "/": they include the files of module subfolders (1_Pooling, 2_Dense).
_TEXT = ["*.json", "*.txt", "*.model", "*.spiece", "artifact.metadata"]
_HEADS = ["sparse_linear.pt", "colbert_linear.pt"]  # bge-m3's
_SAFETENSORS = ["*.safetensors", "[0-9]*_Dense/pytorch_model.bin", *_HEADS]
_BIN = ["pytorch_model*.bin", "[0-9]*_Transformer/pytorch_model*.bin", *_HEADS]
_IGNORED = ["onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*"]


def download(
    repo_id: str, subfolder: str, weights: bool, use_safetensors: bool | None, options: Mapping[str, Any]
) -> Path:
    """Downloads a repository, or one folder of it, and returns the local folder that holds the whole repository.

    weights: whether to fetch more than texts and the files of tokenizers. options: arguments of
    ``huggingface_hub.snapshot_download``.
    """
    from huggingface_hub import snapshot_download

    # No folder is ignored if the caller requests one by name.
    prefix, ignored = (f"{subfolder}/", None) if subfolder else ("", _IGNORED)

    def fetch(patterns: list[str]) -> Path:
        wanted = [prefix + pattern for pattern in patterns]
        return Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=ignored, **options))

    if not weights:
        return fetch(_TEXT)
    if use_safetensors is not False:
        folder = fetch(_TEXT + _SAFETENSORS)
        for holder in (folder / subfolder, *(folder / subfolder).glob("*_Transformer")):
            if (holder / SAFETENSORS).is_file() or (holder / SAFETENSORS_INDEX).is_file():
                return folder
        if use_safetensors:
            return folder
    return fetch(_TEXT + _BIN)
