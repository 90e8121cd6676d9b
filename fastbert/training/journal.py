"""A journal records the numbers of a run: in training.jsonl, and in TensorBoard if that is installed."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from fastbert.checks import one_of

logger = logging.getLogger("fastbert")

FILE = "training.jsonl"
KINDS = ("start", "train", "evaluation", "end")


class Journal:
    """A `Journal` records a run, one JSON object per line, in a `with` statement or until `close`.

    folder: the folder of training.jsonl, created if it does not exist. resume_step: for a run that resumes, the number
    of updates in the checkpoint. Lines of later steps are removed, so that the file equals that of an uninterrupted
    run; 0 empties the file, because the run starts again. None means a new run. tensorboard: if the package is
    installed, also write the numbers into the folder `tensorboard`. Raises FileExistsError for a new run if a journal
    exists already.

    A full disk is reported once, and training continues. The lines that could not be written are missing from the
    journal.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, resume_step: int | None = None, tensorboard: bool = True
    ) -> None:
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            _cut(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(f"{self.path}: there is a journal already, expected none for a new run")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._end = os.fstat(self._file.fileno()).st_size
        self._is_failing = False
        self._tensorboard = _summary_writer(self.path.parent, resume_step) if tensorboard else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a line: kind ("start", "train", "evaluation" or "end"), step, and the values.

        step: the number of completed updates. A number that is not finite is written as null. A tensor or array with
        one number is written as that number. Raises ValueError for another kind.
        """
        line = {"kind": one_of("kind", kind, *KINDS), "step": step, **{k: plain(v) for k, v in values.items()}}
        self._append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        if self._tensorboard is not None and kind in ("train", "evaluation"):
            self._show(kind, step, line)

    def sync(self) -> None:
        """Syncs the lines to disk. Call it before a checkpoint, so that no line before the checkpoint can be lost."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append(self, line: bytes) -> None:
        try:
            if (written := self._file.write(line)) != len(line):
                raise OSError(f"{written} of {len(line)} bytes of a line were written")
            self._end += len(line)
        except OSError as error:
            self._failed(error)
            os.ftruncate(self._file.fileno(), self._end)  # so that the file contains no incomplete line in its middle

    def _failed(self, error: OSError) -> None:
        if not self._is_failing:
            logger.warning("%s: lines are missing, and training continues: %s", self.path, error.strerror or error)
        self._is_failing = True

    def _show(self, kind: str, step: int, line: dict[str, Any]) -> None:
        assert self._tensorboard is not None
        try:
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            self._tensorboard = None
            logger.warning("TensorBoard: nothing more is written, and training continues: %s", error)


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines of a training.jsonl file, or of the one in a folder; omits an incomplete last line.

    Raises FileNotFoundError if there is none, and ValueError, with the line number, for a line that is no JSON object.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    lines = path.read_bytes().split(b"\n")
    return [_parsed(path, number, line) for number, line in enumerate(lines[:-1], start=1) if line.strip()]


def plain(value: Any) -> Any:
    """Returns the value for JSON: None for a number that is not finite, and a number for a tensor of one element."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (str, int, float, bool, type(None))) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line {number} holds a JSON {type(content).__name__}, expected an object")
    return content


def _cut(path: Path, step: int) -> None:
    """Truncates the journal before the first line that is incomplete or belongs to a later step."""
    if not path.exists():
        return
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            if step == 0 or not line.endswith(b"\n") or _parsed(path, number, line).get("step", 0) > step:
                break
        except ValueError as error:
            logger.warning("the journal is cut off at a torn line: %s", error)
            break
        end += len(line)
    os.truncate(path, end)


def _summary_writer(folder: Path, resume_step: int | None) -> Any:
    """Returns TensorBoard's writer, or None if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)
