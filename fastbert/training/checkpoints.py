"""A checkpoint is a folder that is either complete or absent, even if the writing process is killed at any time.

It is filled under a different name, synced to disk, and renamed. Its file `complete.json` lists its files:

    NAME        a complete folder, with complete.json
    .NAME.new   a folder that is being filled
    .NAME.old   the previous folder of this name, while a new one replaces it
    .NAME.gone  a folder that is being deleted
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import read_json
from fastbert.checks import positive

logger = logging.getLogger("fastbert")

MARKER = "complete.json"
Write = Callable[[Path], None]  # fills the folder, which exists and is empty
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22  # bytes per read
_FULL = 1 << 24  # bytes: a disk with less free space counts as full


class Checkpoints:
    """A `Checkpoints` keeps the newest checkpoints of one run, each in a folder such as `step-00001000`.

    folder: created if it does not exist. keep: the number of complete checkpoints to keep. Only one process may write
    at a time: in a run with several processes, rank 0.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), positive("keep", keep)

    def path(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, write: Write) -> Path:
        """Calls `write` to fill the checkpoint of a step, and deletes the oldest beyond `keep`; returns the folder.

        The folder is synced to disk when this returns. After an error the earlier checkpoints are unchanged. Raises
        OSError if the disk is full or cannot be written; the message names the last good checkpoint.
        """
        try:
            self._clean()
            path = replace_folder(self.path(step), write, step=step)
        except OSError as error:
            good = self.newest(verify=False)
            kept = "there is no earlier one" if good is None else f"{good.name} stays"
            reason = f"the checkpoint of step {step} was not written ({kept}): {error.strerror or error}"
            raise OSError(error.errno, reason, str(self.path(step))) from error
        earlier = [number for number in self.steps() if number <= step]
        for number in earlier[: -self.keep]:
            _delete(self.path(number), self.path(number))
        return path

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints whose files all exist with their full size, in ascending order."""
        return [step for step in self._numbers() if obstacle(self.path(step)) is None]

    def newest(self, *, verify: bool = True) -> Path | None:
        """Returns the newest complete checkpoint, or None. The log names each newer checkpoint that is not complete.

        verify: also read all bytes and compare their checksums, which takes about a second per gigabyte.
        """
        for step in reversed(self._numbers()):
            reason = obstacle(self.path(step), contents=verify)
            if reason is None:
                return self.path(step)
            logger.warning("checkpoint %s is skipped: %s", self.path(step), reason)
        return None

    def _numbers(self) -> list[int]:
        """Returns the steps that have a folder, complete or not. Restores folders that a killed process had renamed."""
        if not self.folder.is_dir():
            return []
        for left in list(self.folder.glob(".step-*.old")):
            recover(self.folder / left.name[1 : -len(".old")])
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def _clean(self) -> None:
        """Deletes the files that a killed process left."""
        self._numbers()
        for kind in ("new", "old", "gone"):
            for path in list(self.folder.glob(f".step-*.{kind}")):
                _remove(path)


def replace_folder(path: str | os.PathLike[str], write: Write, **facts: Any) -> Path:
    """Calls `write` to fill a new folder, which then replaces `path`; returns the path.

    If the process is killed at any time in this function, `recover(path)` returns the old folder or the new one,
    complete. facts: written into complete.json. After an error the old folder is unchanged, and the new files are
    deleted. Raises OSError if the disk is full, whatever exception `write` raised.
    """
    path = Path(path)
    new, old = _beside(path, "new"), _beside(path, "old")
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sync(path.parent.parent)
    recover(path)
    for left in (new, old, _beside(path, "gone")):
        _remove(left)
    is_swapped = False
    try:
        new.mkdir()
        write(new)
        seal(new, facts)
        if path.is_dir():
            os.rename(path, old)
        os.rename(new, path)
        is_swapped = True
        _sync(path.parent)
    except BaseException as error:
        # Libraries that write tensors report a full disk with their own exceptions.
        is_full = isinstance(error, Exception) and shutil.disk_usage(path.parent).free < _FULL
        if is_swapped:
            os.rename(path, new)
        recover(path)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        if is_full:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(path)) from error
        raise
    if old.is_dir():
        _delete(path, old)
    return path


def recover(path: str | os.PathLike[str]) -> Path | None:
    """Returns a folder of `replace_folder`, or None if there is none. Restores the folder if it was renamed."""
    path = Path(path)
    try:
        if not path.is_dir():
            os.rename(_beside(path, "old"), path)
    except FileNotFoundError:  # there is none, or another process has restored it
        pass
    return path if path.is_dir() else None


def obstacle(path: str | os.PathLike[str], *, contents: bool = False) -> str | None:
    """Returns the reason why a folder is not complete, or None.

    contents: read the bytes of all files and compare their checksums; otherwise only their sizes are compared.
    """
    path = Path(path)
    try:
        files: dict[str, dict[str, int]] = read_json(path / MARKER)["files"]
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, expected {expected['size']}"
            if contents and _checksum(path / name) != expected["crc32"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if error.filename else f"{MARKER} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def verify(path: str | os.PathLike[str]) -> None:
    """Raises ValueError, with the reason, for a folder that is not complete, by the size and checksum of each file."""
    reason = obstacle(path, contents=True)
    if reason is not None:
        raise ValueError(f"{path}: {reason}")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Syncs all files of a folder to disk, then complete.json with their sizes and checksums and with the facts."""
    files: dict[str, dict[str, int]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MARKER:
            _sync(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "crc32": _checksum(path)}
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    marker = folder / MARKER
    marker.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(marker)
    _sync(folder)


def _sync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _delete(path: Path, folder: Path) -> None:
    """Renames a folder before its deletion, so that a killed deletion leaves no folder that looks complete."""
    gone = _beside(path, "gone")
    _remove(gone)
    os.rename(folder, gone)
    _remove(gone)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
