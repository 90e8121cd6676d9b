"""A run that was killed, stopped or starved of disk goes on, and ends with the bits of one that never stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import pretraining_cases as cases
from fastbert.training import checkpoints
from fastbert.training.pretrain import pretrain
from fastbert.training.run import CHECKPOINTS

STEPS = cases.LONG_STEPS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "model"
    pretrain(cases.long_settings(output))
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_goes(number: int, uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a run that loses its steps when it is told to stop, or ends as if it were done."""
    output = tmp_path / "model"
    settings = cases.long_settings(output, checkpoint_every=1000)
    process = cases.start(settings)
    cases.wait_until(lambda: cases.last_step(output) >= 4, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    (checkpoint,) = (output / CHECKPOINTS).iterdir()
    assert 4 <= int(checkpoint.name.removeprefix("step-")) < STEPS
    assert not (output / "model.safetensors").exists()
    cases.run(settings, as_a_user=number == signal.SIGTERM)
    assert cases.weights(output) == cases.weights(uninterrupted)


def test_killed_before_its_first_checkpoint_begins_anew(uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a run that cannot resume where there is nothing to resume from yet."""
    output = tmp_path / "model"
    settings = cases.long_settings(output, checkpoint_every=1000)
    process = cases.start(settings)
    cases.wait_until(lambda: cases.last_step(output) >= 2, process)
    process.kill()
    process.communicate()
    cases.run(settings)
    assert cases.weights(output) == cases.weights(uninterrupted)
    assert cases.journal(output) == cases.journal(uninterrupted)


def test_torn_checkpoint_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a resume from a checkpoint that lacks a part, or hangs on it."""
    output = tmp_path / "model"
    pretrain(cases.long_settings(output, checkpoint_every=25, keep=3))
    for name in ("model.safetensors", "training.jsonl"):
        (output / name).unlink()
    shutil.rmtree(output / CHECKPOINTS / f"step-{STEPS:08d}")
    (output / CHECKPOINTS / "step-00000050" / "optimizer.pt").write_bytes(b"torn")
    pretrain(cases.long_settings(output))
    assert cases.weights(output) == cases.weights(uninterrupted)


def test_finished_run_has_nothing_to_do(uninterrupted: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a finished run that trains on, or writes its end twice."""
    before = cases.journal(uninterrupted)
    assert pretrain(cases.long_settings(uninterrupted)).steps == STEPS
    assert "is finished" in caplog.text
    assert cases.journal(uninterrupted) == before


CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 5},
    "steps": {"steps": STEPS + 1},
    "nsp": {"nsp": False},
    "max_length": {"max_length": 32},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused(name: str, uninterrupted: Path) -> None:
    """Catches a resume with other settings, which would be neither run."""
    with pytest.raises(ValueError, match=rf"resume: .*{name} was"):
        pretrain(cases.long_settings(uninterrupted, **CHANGES[name]))


def test_another_corpus_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a resume on a text that has changed; a text that has moved is the same."""
    text = (cases.folder() / "text.jsonl").read_text(encoding="utf-8")
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    moved.write_text(text, encoding="utf-8")
    changed.write_text(text.replace("statement", "sentence", 1), encoding="utf-8")
    pretrain(cases.long_settings(uninterrupted, text=(str(moved),)))
    with pytest.raises(ValueError, match="resume: .*corpus was"):
        pretrain(cases.long_settings(uninterrupted, text=(str(changed),)))


def test_another_tokenizer_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a resume with ids that mean other words."""
    from fastbert import Tokenizer

    texts = [line for line in (cases.folder() / "text.jsonl").read_text().splitlines()[:40]]
    Tokenizer.train(texts, vocab_size=cases.VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"resume: .*tokenizer"):
        pretrain(cases.long_settings(uninterrupted, tokenizer=str(tmp_path)))


def test_full_disk_leaves_the_last_good_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that dies of a full disk on the way, or takes a checkpoint for good that is not whole."""
    output = tmp_path / "model"
    save, full = checkpoints.Checkpoints.save, range(20, 41)

    def failing(self: Any, step: int, write: Any) -> Path:
        def torn(folder: Path) -> None:
            write(folder)
            (folder / "optimizer.pt").write_bytes(b"")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return save(self, step, torn if step in full else write)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", failing)
    pretrain(cases.long_settings(output, checkpoint_every=10, keep=10))
    assert "No space left" in caplog.text and "step-00000010 stays" in caplog.text
    steps = checkpoints.Checkpoints(output / CHECKPOINTS).steps()
    assert steps == [10, 50, 60]
    assert cases.weights(output) == cases.weights(uninterrupted)


def test_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that says that all is well where its last step is lost."""

    def failing(self: Any, step: int, write: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.Checkpoints, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        pretrain(cases.long_settings(tmp_path / "model", steps=3, checkpoint_every=100))


def test_where_things_lie_may_differ(uninterrupted: Path, tmp_path: Path) -> None:
    """Catches a resume that is refused for what changes no number."""
    output = tmp_path / "moved"
    shutil.copytree(uninterrupted, output)
    settings = dataclasses.replace(cases.long_settings(output), workers=2, log_every=5, cache=str(tmp_path / "cache"))
    assert pretrain(settings).steps == STEPS
