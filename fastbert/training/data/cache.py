"""A cache is a folder with a folder for each corpus. Its name depends on the corpus's sources, not on paths or times.

A corpus is built in a temporary folder, which is renamed when it is complete. Several builders may run at once: the
first to finish wins, and the others use its result. A lock file beside the temporary folder shows that its builder is
alive. The next builder removes the files of dead builders.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import read_json, write_text
from fastbert.training.data.shards import CHUNK, INDEX
from fastbert.training.data.writing import sync_folder

HASHES = "hashes.json"
BUILDING, LOCK = ".building-", ".lock"
FRESH = 2.0  # seconds: a file that changed more recently may change again within the same time stamp


def name_of(content: Any) -> str:
    """Returns the name for the given JSON content: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def identity(path: Path) -> str:
    """Returns path, size, time and inode of a file, which stay the same as long as the file is unchanged."""
    status = path.stat()
    return f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def content_hashes(files: Sequence[Path], cache: Path, progress: Callable[[int], Any]) -> list[str]:
    """Returns the BLAKE2b digest of each file's bytes. ``progress`` is called with numbers of processed bytes.

    The cache stores digests by ``identity``, so that a file is read only once. Raises ValueError for a file that
    changes meanwhile.
    """
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = read_json(cache / HASHES)
    hashes, new = [], {}
    for path in files:
        key = identity(path)
        if key in known:
            progress(path.stat().st_size)
            hashes.append(known[key])
            continue
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                progress(len(chunk))
        hashes.append(digest.hexdigest())
        if identity(path) != key:
            raise ValueError(f"{path} changed while it was read")
        if time.time() - path.stat().st_mtime > FRESH:
            new[key] = hashes[-1]
    if new:
        write_text(cache / HASHES, json.dumps(known | new, ensure_ascii=False, indent=0))
    return hashes


@contextmanager
def building(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``, which is renamed to ``folder`` at the end.

    If a complete ``folder`` exists by then, it stays, unless ``replace`` is true. After an error the temporary folder
    is deleted. Raises OSError, with advice, if the disk is full.
    """
    cache = folder.parent
    remove_dead(cache)
    temporary, lock = _locked(cache, folder.name)
    try:
        temporary.mkdir()
        yield temporary
        _put(temporary, folder, replace)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        n_bytes = sum(path.stat().st_size for path in temporary.iterdir())
        message = (
            f"no space left after {n_bytes} bytes of the token cache, which are removed: free some or choose another"
        )
        raise OSError(error.errno, message, str(cache)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            os.unlink(f"{temporary}{LOCK}")
        os.close(lock)


def remove_dead(cache: Path) -> None:
    """Removes the temporary folders of dead builders."""
    for path in cache.glob(f"{BUILDING}*"):
        if path.suffix != LOCK:
            if not path.with_name(path.name + LOCK).exists():
                shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):  # if the lock is held, the builder is alive
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()
            finally:
                os.close(fd)


def _locked(cache: Path, name: str) -> tuple[Path, int]:
    """Returns a new name for a temporary folder, and the open lock file."""
    while True:
        temporary = cache / f"{BUILDING}{name}-{uuid.uuid4().hex[:12]}"
        lock = temporary.with_name(temporary.name + LOCK)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if lock.exists():  # otherwise another process has removed it in between as a dead builder's lock
            return temporary, fd
        os.close(fd)


def _put(temporary: Path, folder: Path, replace: bool) -> None:
    if folder.exists():
        if not replace and (folder / INDEX).exists():
            return
        old = folder.with_name(f"{BUILDING}old-{uuid.uuid4().hex[:12]}")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / INDEX).exists():
            raise
    sync_folder(folder.parent)
