"""A checkpoint is a folder that is whole or not there, whatever kills the process that writes it.

It is filled under another name, brought to the disk, and renamed. `complete.json` in it lists its files:

    NAME        a whole folder, with complete.json
    .NAME.new   a folder that is being filled
    .NAME.old   the folder that a new one of the same name is about to replace
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
Write = Callable[[Path], None]  # fills the folder, which is there and empty
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22  # bytes that are read at a time
_FULL = 1 << 24  # bytes: a disk with less than that is taken to be full


class Checkpoints:
    """Keeps the checkpoints of one run: a folder `step-00001000` for each step, of which the newest stay.

    folder: it is made where it does not exist. keep: the number of complete ones that stay. One process may write at a
    time: of several processes of a run, rank 0.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), positive("keep", keep)

    def path(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, write: Write) -> Path:
        """Has `write` fill the checkpoint of a step, and deletes the oldest beyond `keep`; returns its folder.

        The folder is on the disk when this returns. An error leaves the checkpoints as they were. Raises OSError where
        the disk is full or cannot be written, with the name of the last good checkpoint.
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
        """Returns the steps of the checkpoints that have all their files in full length, in rising order."""
        return [step for step in self._numbers() if obstacle(self.path(step)) is None]

    def newest(self, *, verify: bool = True) -> Path | None:
        """Returns the newest checkpoint that is complete, or None. Each newer one that is not is named in the log.

        verify: read all bytes and compare their checksums, too, which takes a second or so for each gigabyte.
        """
        for step in reversed(self._numbers()):
            reason = obstacle(self.path(step), contents=verify)
            if reason is None:
                return self.path(step)
            logger.warning("checkpoint %s is skipped: %s", self.path(step), reason)
        return None

    def _numbers(self) -> list[int]:
        """Returns the steps that have a folder, complete or not. What a killed process had renamed away is put back."""
        if not self.folder.is_dir():
            return []
        for left in list(self.folder.glob(".step-*.old")):
            recover(self.folder / left.name[1 : -len(".old")])
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def _clean(self) -> None:
        """Deletes what a killed process left behind."""
        self._numbers()
        for kind in ("new", "old", "gone"):
            for path in list(self.folder.glob(f".step-*.{kind}")):
                _remove(path)


def replace_folder(path: str | os.PathLike[str], write: Write, **facts: Any) -> Path:
    """Has `write` fill a new folder, which then takes the place of `path`; returns the path.

    Whenever a process is killed in here, `recover(path)` gives the old folder or the new one, whole. facts: they are
    written into complete.json. After an error the old folder is as before, and what was written is gone. Raises
    OSError where the disk is full, whatever `write` raised then.
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
        # The libraries that write tensors report a full disk by exceptions of their own.
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
    """Gives a folder of `replace_folder`, None if there is none. One that was renamed away is put back."""
    path = Path(path)
    try:
        if not path.is_dir():
            os.rename(_beside(path, "old"), path)
    except FileNotFoundError:  # there is none, or another process has put it back
        pass
    return path if path.is_dir() else None


def obstacle(path: str | os.PathLike[str], *, contents: bool = False) -> str | None:
    """Gives the reason why a folder is not complete, or None.

    contents: the bytes of all files are read and compared with their checksums, and not only their sizes.
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
    """Raises ValueError for a folder that is not complete, by size and by checksum of each file, and says why."""
    reason = obstacle(path, contents=True)
    if reason is not None:
        raise ValueError(f"{path}: {reason}")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Brings all files of a folder to the disk, and then complete.json with their sizes and checksums and the facts."""
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
    """Brings a file or the entries of a folder to the disk."""
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
    """Deletes a folder under another name than `path`, so that a killed deletion leaves no seemingly complete one."""
    gone = _beside(path, "gone")
    _remove(gone)
    os.rename(folder, gone)
    _remove(gone)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
