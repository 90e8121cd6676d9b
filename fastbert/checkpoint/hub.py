"""Where a checkpoint is: a local folder, or one that the Hugging Face hub's client keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

# "name" or "owner/name". What does not match (a leading "/", "." or "~", a second "/", a space) can only be a path.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)(\w([\w.-]*\w)?/)?\w([\w.-]{0,94}\w)?", re.ASCII)

# fnmatch patterns, in which "*" also matches "/": the files of module subfolders (1_Pooling, 2_Dense) come along.
_HUB_TEXT = ["*.json", "*.txt"]
_HUB_SAFETENSORS = ["*.safetensors", "[0-9]*_Dense/pytorch_model.bin"]
_HUB_BIN = ["pytorch_model*.bin", "[0-9]*_Transformer/pytorch_model*.bin"]
_HUB_IGNORE = ["onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*"]

# The keyword arguments of `resolve` that transformers' from_pretrained has, too.
ARGUMENTS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "use_safetensors")


def resolve(
    src: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: bool = True,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder that ``src`` names, downloaded from the Hugging Face hub if need be.

    A local folder wins. Otherwise a string of the form ``name`` or ``owner/name`` is looked up on the hub (or, with
    ``HF_HUB_OFFLINE=1`` or ``local_files_only``, in the hub's cache); a ``Path`` object and any other string never
    leave the machine. ``pytorch_model*.bin`` is downloaded only if the repository holds no safetensors, or with
    ``use_safetensors=False``, and never with ``use_safetensors=True``; with ``weights=False`` only the ``*.json`` and
    ``*.txt`` files are downloaded. ``subfolder``: the part of the folder or repository that is meant.

    ``cache_dir`` (default: the hub client's), ``token`` and ``force_download`` are those of
    ``huggingface_hub.snapshot_download``; a local folder has no use for them.

    Raises FileNotFoundError if there is no such folder and no such hub repository, ValueError if ``src`` is empty, if
    ``revision`` is given for a local folder or if ``subfolder`` leads out of ``src``, TypeError if ``src`` is neither a
    string nor a path.
    """
    if not isinstance(src, (str, os.PathLike)):
        raise TypeError(f"src: got {type(src).__name__}, expected a folder (str or Path) or a hub id")
    text = os.fspath(src)
    if not text:
        raise ValueError("src: got an empty string, expected a folder or a hub id")
    inside = _inside(subfolder)
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        if revision not in (None, "main"):  # the one that tools ask for where their user has said nothing
            raise ValueError(f"revision: got {revision!r}, but src {text!r} is a local folder, which has no revisions")
        return _part(Path(path), inside, text)
    if os.path.exists(path):
        raise FileNotFoundError(f"src {text!r} is a file, expected the folder that holds config.json and the weights")
    if not isinstance(src, str) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"src {text!r}: no such folder, and it is not a hub id ('name' or 'owner/name')")
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        folder = _download(text, inside, weights, use_safetensors, {**options, "force_download": force_download})
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise FileNotFoundError(
            f"src {text!r}: no folder of that name in {os.getcwd()}, and no download from the Hugging Face hub{at}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return _part(folder, inside, text)


def _inside(subfolder: str | os.PathLike[str] | None) -> str:
    """The subfolder with "/" between its parts, "" for none."""
    text = os.fspath(subfolder or "").replace(os.sep, "/").strip("/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"subfolder: got {subfolder!r}, expected a folder inside src")
    return "/".join(parts)


def _part(folder: Path, inside: str, src: str) -> Path:
    part = folder / inside if inside else folder
    if not part.is_dir():
        raise FileNotFoundError(f"src {src!r} has no folder {inside!r} (subfolder)")
    return part


def _download(
    repo_id: str, inside: str, weights: bool, use_safetensors: bool | None, options: Mapping[str, Any]
) -> Path:
    from huggingface_hub import snapshot_download

    # A subfolder is asked for by name, so none is ignored then.
    prefix, ignored = (f"{inside}/", None) if inside else ("", _HUB_IGNORE)

    def fetch(patterns: list[str]) -> Path:
        wanted = [prefix + pattern for pattern in patterns]
        return Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=ignored, **options))

    if not weights:
        return fetch(_HUB_TEXT)
    if use_safetensors is not False:
        folder = fetch(_HUB_TEXT + _HUB_SAFETENSORS)
        for holder in (folder / inside, *(folder / inside).glob("*_Transformer")):
            if (holder / SAFETENSORS).is_file() or (holder / SAFETENSORS_INDEX).is_file():
                return folder
        if use_safetensors:
            return folder
    return fetch(_HUB_TEXT + _HUB_BIN)
