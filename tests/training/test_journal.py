"""The journal of a run is valid JSON lines, as those of an uninterrupted run, and costs no training."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.training.journal import FILE, Journal, read_journal
from fastbert.training.progress import Progress


def test_lines(tmp_path: Path) -> None:
    """Catches a line that is not valid JSON, NaN above all, and one that is written only at the end."""
    with Journal(tmp_path / "run", tensorboard=False) as journal:
        journal.write("start", 0, files=["한국어.txt", Path("a")], seed=1)
        journal.write("train", 1, loss=torch.tensor(2.5), accuracy=np.float32(0.5), bad=math.nan, worse=-math.inf)
        text = (tmp_path / "run" / FILE).read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert lines == [
        {"kind": "start", "step": 0, "files": ["한국어.txt", "a"], "seed": 1},
        {"kind": "train", "step": 1, "loss": 2.5, "accuracy": 0.5, "bad": None, "worse": None},
    ]
    assert read_journal(tmp_path / "run") == read_journal(tmp_path / "run" / FILE) == lines


def test_a_new_run_keeps_an_old_journal(tmp_path: Path) -> None:
    """Catches a new run that continues, or wipes out, the journal of another one."""
    Journal(tmp_path, tensorboard=False).write("start", 0)
    with pytest.raises(FileExistsError, match="there is a journal already"):
        Journal(tmp_path)
    with pytest.raises(ValueError, match="kind: got 'note'"):
        Journal(tmp_path, resume_step=0, tensorboard=False).write("note", 0)


@pytest.mark.parametrize("torn", [b"", b'{"kind": "tr', b"\0\0\0\n", b'{"kind": "train", "step": 1}'])
def test_a_resumed_journal_is_as_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    """Catches a step that stands in the journal twice after a resume, or is lost, and a torn line that stops it."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with Journal(whole, tensorboard=False) as journal:
        for step in range(5):
            journal.write("train", step, loss=0.1 * step)
    with Journal(resumed, tensorboard=False) as journal:
        for step in range(4):
            journal.write("train", step, loss=0.1 * step)
    with open(resumed / FILE, "ab") as file:
        file.write(torn)
    with Journal(resumed, resume_step=2, tensorboard=False) as journal:
        for step in range(3, 5):
            journal.write("train", step, loss=0.1 * step)
    assert (resumed / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_run_that_begins_anew(tmp_path: Path) -> None:
    """Catches two starts in the journal of a run that was killed before its first checkpoint."""
    for resume_step in (None, 0):
        with Journal(tmp_path, resume_step=resume_step, tensorboard=False) as journal:
            journal.write("start", 0, seed=1)
            journal.write("train", 1, loss=1.0)
    assert [line["kind"] for line in read_journal(tmp_path)] == ["start", "train"]


def test_reading_a_torn_journal(tmp_path: Path) -> None:
    """Catches a last line cut short that hides the others, and a broken one in the middle that is left out silently."""
    path = tmp_path / FILE
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_journal(tmp_path) == [{"kind": "train", "step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        read_journal(path)


class FullDisk(io.FileIO):
    """A file on a disk that has room for `room` bytes more."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: self.room]
        self.room -= len(part)
        return super().write(part)


def test_a_full_disk_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a full disk that stops training, fills the log, or leaves half a line in the middle of the journal."""
    journal = Journal(tmp_path, tensorboard=False)
    journal._file.close()
    journal._file = full = FullDisk(tmp_path / FILE, "ab")
    full.room = 40
    with caplog.at_level(logging.WARNING, "fastbert"):
        for step in range(1, 5):
            journal.write("train", step, loss=1.0)
        full.room = 1000
        journal.write("train", 5, loss=1.0)
    journal.close()
    assert [record.getMessage().count("training continues") for record in caplog.records] == [1]
    assert [line["step"] for line in read_journal(tmp_path)] == [5]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches curves that a resumed run draws twice, texts among the numbers, and a run that needs TensorBoard."""
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Journal(tmp_path, resume_step=7) as journal:
        journal.write("start", 7, seed=3)
        journal.write("train", 8, loss=2.0, text="no", bad=math.nan, flag=True)
        journal.write("evaluation", 8, loss=3.0)
    assert calls == [("tensorboard", 8), ("train/loss", 2.0, 8), ("evaluation/loss", 3.0, 8), "closed"]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Journal(tmp_path, resume_step=8) as journal:
        journal.write("train", 9, loss=2.0)
    assert not (tmp_path / "tensorboard").exists()


def test_progress_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a log file full of bars, a last step without a line, and numbers that are not there."""
    now = [0.0]
    monkeypatch.setattr("fastbert.training.progress.time.monotonic", lambda: now[0])
    with Progress(1000, 10, seconds=30) as progress:
        for step in range(11, 1001):
            now[0] += 1.0
            progress.update(step, loss=7.25, mlm_accuracy=0.125, nsp_accuracy=None, tokens_per_second=12345.0)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 33
    assert lines[0] == "step 40 of 1,000: loss 7.250, mlm 12.5%, tokens/s 12,345, 16:00 left"
    assert lines[-1].startswith("step 1,000 of 1,000: ")


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that begins at 0 after a resume, or leaves out the losses."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(20, 10) as progress:
        progress.update(15, loss=7.25, waiting=0.031)
        progress.write("a message")
        progress.update(20)
    err = capsys.readouterr().err
    assert "a message\n" in err and "20/20" in err and "loss 7.250, waiting 3.1%" in err


def test_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches output of every process of a distributed run."""
    with Progress(2, disabled=True) as progress:
        progress.update(2, loss=1.0)
        progress.write("a message")
    assert capsys.readouterr() == ("", "")
