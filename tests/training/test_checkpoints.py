"""Checkpoints are whole or not there, whenever the process is killed and whatever the disk does."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.training import checkpoints
from fastbert.training.checkpoints import MARKER, Checkpoints, obstacle, recover, replace_folder, verify
from helpers import source_env


def writer(text: str) -> Callable[[Path], None]:
    """What fills a checkpoint with two files, one of them in a folder of its own."""

    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(text)
        (folder / "parts").mkdir()
        (folder / "parts" / "0.bin").write_text(text * 100)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(error: Exception) -> Callable[[Path], None]:
    """What writes one file of a checkpoint, and then fails."""

    def write(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        raise error

    return write


DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.bin")


def fsync_on_a_full_disk(descriptor: int, name: str) -> None:
    """What os.fsync does where there is no room for the file or the folder of this name."""
    if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
        raise DISK_FULL


def test_save_and_prune(tmp_path: Path) -> None:
    """Catches a checkpoint too many or too few, and a marker that does not list every file."""
    saved = Checkpoints(tmp_path / "run", keep=2)
    assert saved.newest() is None and saved.steps() == []
    for step in (5, 100, 1000, 123456789):
        assert saved.save(step, writer(str(step))) == saved.path(step)
        assert (saved.path(step) / "model.bin").read_text() == str(step)
    assert saved.steps() == [1000, 123456789] and saved.newest() == saved.path(123456789)
    assert names(tmp_path / "run") == ["step-00001000", "step-123456789"]
    marker = json.loads((saved.path(1000) / MARKER).read_text())
    assert marker["step"] == 1000 and set(marker["files"]) == {"model.bin", "parts/0.bin"}
    assert marker["files"]["model.bin"]["size"] == 4


def test_the_same_step_again(tmp_path: Path) -> None:
    """Catches a rename that fails where a resumed run comes to a step once more."""
    saved = Checkpoints(tmp_path)
    saved.save(7, writer("old"))
    saved.save(7, writer("new"))
    assert (saved.path(7) / "model.bin").read_text() == "new" and names(tmp_path) == ["step-00000007"]


def test_a_new_checkpoint_outlives_later_ones(tmp_path: Path) -> None:
    """Catches pruning that deletes what was just saved, because broken checkpoints of later steps are newer."""
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(30, writer("later"))
    (saved.path(30) / "model.bin").write_text("rotte")
    saved.save(20, writer("now"))
    assert saved.newest() == saved.path(20)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / MARKER).unlink(), f"{MARKER} is missing"),
        (lambda path: (path / MARKER).write_text('{"step": 2, "fil'), "is not valid JSON"),
        (lambda path: (path / MARKER).write_text("{}"), "KeyError: 'files'"),
        (lambda path: (path / "parts" / "0.bin").unlink(), "0.bin is missing"),
        (lambda path: (path / "model.bin").write_text(""), "model.bin has 0 bytes, expected 3"),
        (lambda path: (path / "model.bin").write_text("tvo"), "model.bin has another checksum"),
    ],
)
def test_torn_checkpoints_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], reason: str
) -> None:
    """Catches a resume from a checkpoint that is not whole, and one that is left out without a word."""
    saved = Checkpoints(tmp_path)
    saved.save(1, writer("one"))
    saved.save(2, writer("two"))
    spoil(saved.path(2))
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert saved.newest() == saved.path(1)
    assert "step-00000002 is skipped" in caplog.text and reason in caplog.text
    with pytest.raises(ValueError, match="step-00000002: "):
        verify(saved.path(2))
    verify(saved.path(1))


def test_only_verify_reads_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pruning that reads every checkpoint through."""
    saved = Checkpoints(tmp_path)
    saved.save(1, writer("one"))
    monkeypatch.setattr(checkpoints, "_checksum", lambda path: pytest.fail("read through"))
    assert saved.newest(verify=False) == saved.path(1) and saved.steps() == [1]


@pytest.mark.parametrize("where", ["write", "fsync of a file", "fsync of the folder above"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Catches a full disk that costs the last good checkpoint, leaves half a one, or is not said clearly."""
    saved = Checkpoints(tmp_path)
    saved.save(1, writer("one"))
    for step in (1, 2):
        with monkeypatch.context() as patch:
            if where != "write":
                name = "0.bin" if where == "fsync of a file" else tmp_path.name
                patch.setattr(os, "fsync", lambda fd, name=name: fsync_on_a_full_disk(fd, name))
            with pytest.raises(OSError) as caught:
                saved.save(step, full(DISK_FULL) if where == "write" else writer("new"))
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(saved.path(step))
        assert f"step {step} was not written (step-00000001 stays): No space left" in str(caught.value)
        assert names(tmp_path) == ["step-00000001"] and saved.newest() == saved.path(1)
        assert (saved.path(1) / "model.bin").read_text() == "one"


def test_other_errors_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches torch.save on a full disk, whose RuntimeError says nothing of the disk, and a mistake taken for one."""
    saved = Checkpoints(tmp_path)
    with pytest.raises(RuntimeError, match="enforce fail"):
        saved.save(1, full(RuntimeError("enforce fail")))
    assert names(tmp_path) == []
    monkeypatch.setattr(checkpoints, "_FULL", 1 << 62)
    with pytest.raises(OSError, match="there is no earlier one.: No space left on device .enforce fail"):
        saved.save(1, full(RuntimeError("enforce fail")))
    with pytest.raises(KeyboardInterrupt):
        saved.save(1, full(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_best_is_replaced(tmp_path: Path) -> None:
    """Catches a folder of one name that mixes old and new files, or loses its facts."""
    best = tmp_path / "best"
    assert recover(best) is None
    replace_folder(best, writer("old"), step=3, loss=2.5)
    (best / "stray").touch()
    assert replace_folder(best, writer("new"), step=4, loss=2.0) == best
    assert names(best) == [MARKER, "model.bin", "parts"] and names(tmp_path) == ["best"]
    assert json.loads((best / MARKER).read_text())["loss"] == 2.0 and obstacle(best, contents=True) is None


# The process kills itself at its n-th event on files, for every n. A child that gets through ends the loop.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from fastbert.training.checkpoints import Checkpoints, obstacle, recover, replace_folder

root, kind = Path(sys.argv[1]), sys.argv[2]
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}

def write(text):
    def fill(folder):
        (folder / "parts").mkdir()
        for i in range(3):
            (folder / "parts" / str(i)).write_text(text * (i + 1))
    return fill

def act(text):
    if kind == "best":
        replace_folder(root / "best", write(text))
    else:
        Checkpoints(root, keep=2).save({"next": 3, "same": 2}[kind], write(text))

def seen():
    if kind == "best":
        path = recover(root / "best")
    else:
        path = Checkpoints(root).newest()
    assert path is not None and obstacle(path, contents=True) is None, (number, sorted(os.listdir(root)))
    return (path / "parts" / "0").read_text()

number, texts = 0, []
while True:
    number += 1
    shutil.rmtree(root, ignore_errors=True)
    if kind == "best":
        replace_folder(root / "best", write("old"))
    else:
        for step in (1, 2):
            Checkpoints(root, keep=2).save(step, write("old"))
    child = os.fork()
    if not child:
        left = number
        def hook(event, arguments):
            global left
            if event in WATCHED:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        act("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    texts.append(seen())
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    act("again")  # what was left behind is no obstacle, and goes
    assert seen() == "again"
    assert not [name for name in os.listdir(root) if name.startswith(".")], os.listdir(root)
print(number, texts.count("old"), texts.count("new"))
"""


@pytest.mark.parametrize("kind", ["next", "same", "best"])
def test_killed_at_every_file_operation(tmp_path: Path, kind: str) -> None:
    """Catches a moment at which kill -9 leaves no complete folder, or one that the next save trips over."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), kind],
        env=source_env(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number, old, new = map(int, done.stdout.split())
    assert old + new == number > 15 and old > 5 and new > 1
