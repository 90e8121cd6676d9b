"""This module finds the folder of a checkpoint: a local one, or one in the cache of the Hugging Face hub's client."""

from __future__ import annotations

import os
from pathlib import Path

from fastbert.checkpoint.hub import HUB_ID, download

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
    """Returns the local folder for ``src``. Downloads it from the Hugging Face hub if necessary.

    A local folder has priority. Otherwise a string of the form ``name`` or ``owner/name`` is looked up on the hub (or,
    with ``HF_HUB_OFFLINE=1`` or ``local_files_only``, in the hub's cache). A ``Path`` object and any other string never
    cause a network request. ``subfolder`` selects a part of the folder or repository.

    With ``weights=False`` only texts and SentencePiece files (``*.json``, ``*.txt``, ``*.model``, ``*.spiece``) are
    downloaded. ``pytorch_model*.bin`` is downloaded only if the repository holds no safetensors, or with
    ``use_safetensors=False``, and never with ``use_safetensors=True``.

    ``cache_dir`` (default: the hub client's), ``token`` and ``force_download`` are those of
    ``huggingface_hub.snapshot_download``. A local folder ignores them.

    Raises FileNotFoundError if there is no such folder and no such hub repository. Raises ValueError if ``src`` is
    empty, if ``revision`` is not None for a local folder, or if ``subfolder`` leads out of ``src``. Raises TypeError if
    ``src`` is neither a string nor a path.
    """
    if not isinstance(src, (str, os.PathLike)):
        raise TypeError(f"src: got {type(src).__name__}, expected a folder (str or Path) or a hub id")
    text = os.fspath(src)
    if not text:
        raise ValueError("src: got an empty string, expected a folder or a hub id")
    subfolder = _with_slashes(subfolder)
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        if revision not in (None, "main"):  # Tools pass "main" if their user gives no revision.
            raise ValueError(f"revision: got {revision!r}, but src {text!r} is a local folder, which has no revisions")
        return _part(Path(path), subfolder, text)
    if os.path.exists(path):
        raise FileNotFoundError(f"src {text!r} is a file, expected the folder that holds config.json and the weights")
    if not isinstance(src, str) or not HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"src {text!r}: no such folder, and it is not a hub id ('name' or 'owner/name')")
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        folder = download(text, subfolder, weights, use_safetensors, {**options, "force_download": force_download})
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise FileNotFoundError(
            f"src {text!r}: no folder of that name in {os.getcwd()}, and no download from the Hugging Face hub{at}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return _part(folder, subfolder, text)


def _with_slashes(subfolder: str | os.PathLike[str] | None) -> str:
    """Returns the subfolder with "/" between its parts, and "" for none."""
    text = os.fspath(subfolder or "").replace(os.sep, "/").strip("/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"subfolder: got {subfolder!r}, expected a folder inside src")
    return "/".join(parts)


def _part(folder: Path, subfolder: str, src: str) -> Path:
    part = folder / subfolder if subfolder else folder
    if not part.is_dir():
        raise FileNotFoundError(f"src {src!r} has no folder {subfolder!r} (subfolder)")
    return part
