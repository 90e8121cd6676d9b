"""This module finds another folder for compiled kernels if Triton's cache on disk cannot be used.

Triton keeps every kernel it compiles in TRITON_CACHE_DIR (by default ~/.triton/cache), under a hash of the kernel's
source, specialisation and options, the versions of Triton and ptxas, and the GPU's architecture. So a second process
only loads the kernel. Nothing of fastbert in this key differs between processes. If the folder cannot be written (a
full or read-only disk, no home), Triton raises OSError, and this process continues with its own folder.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

import triton

logger = logging.getLogger("fastbert")

# Errors of the operating system for a folder that cannot be written, or no longer.
_UNUSABLE = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "ENOENT", "EIO", "ELOOP")
    if hasattr(errno, name)
)
_lock = threading.Lock()
_own: str | None = None  # The folder of this process, if it needed one.


def replace(error: OSError) -> None:
    """Moves Triton's cache to a temporary folder after an error, and logs the error.

    Raises the error if it does not concern the cache, or if Triton already uses this folder.
    """
    global _own
    with _lock:
        place = triton.knobs.cache.dir
        if error.errno not in _UNUSABLE or place == _own or not _concerns(error, place):
            raise error
        if _own is None:
            try:
                _own = tempfile.mkdtemp(prefix="fastbert-triton-")
            except OSError as other:
                raise OSError(
                    error.errno,
                    f"Triton's cache {place} cannot be used ({error}), nor a temporary folder ({other}); "
                    "set TRITON_CACHE_DIR to a folder with free space",
                ) from error
            atexit.register(shutil.rmtree, _own, ignore_errors=True)
        triton.knobs.cache.dir = _own
    logger.warning(
        "Triton's cache of compiled kernels, %s, cannot be used (%s): this process keeps them in %s instead, and the "
        "next one compiles them again; set TRITON_CACHE_DIR to a folder with free space",
        place, error.strerror or error, _own,
    )  # fmt: skip


def _concerns(error: OSError, place: str | None) -> bool:
    """Tells whether an error concerns the cache. It names a path in or above the cache, or none (a failed write)."""
    if error.filename is None or place is None:
        return True
    path, folder = Path(os.fsdecode(error.filename)), Path(place)
    return path.is_relative_to(folder) or folder.is_relative_to(path)
