"""The tool that records bits and compares recordings, on made-up ones: a proof that it gives must not be empty."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import source_env

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from

import bits_recording  # noqa: E402

SAME = {"environment": {"torch": "1"}, "bits": {"a": "tensor 1", "b": "raises ValueError"}, "text": {"report": "one\n"}}


def written(folder: Path, *documents: Any) -> tuple[Path, Path]:
    paths = folder / "before.json", folder / "after.json"
    for path, document in zip(paths, documents, strict=True):
        path.write_text(json.dumps(document))
    return paths


@pytest.mark.parametrize(
    ("change", "code", "lines"),
    [
        ({}, 0, ["0 differences of bits, in 2 and 2 entries"]),
        ({"bits": {**SAME["bits"], "a": "tensor 2"}}, 1, ["a", "  - tensor 1", "  + tensor 2", "1 differences"]),
        ({"bits": {"a": "tensor 1"}}, 1, ["b", "  + (not recorded)", "1 differences of bits, in 2 and 1 entries"]),
        ({"bits": {**SAME["bits"], "c": "None"}}, 1, ["c", "  - (not recorded)", "  + None"]),
        ({"text": {"report": "two\n"}, "environment": {"torch": "2"}}, 0, ["-one", "+two", "environment: torch"]),
    ],
    ids=["same", "other bits", "one less", "one more", "other text"],
)
def test_compare(
    change: dict[str, Any], code: int, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a difference that is not listed, or does not fail, and a text that does."""
    paths = written(tmp_path, SAME, SAME | change)
    assert bits_recording.compare(*paths) == code
    printed = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(wanted) for line in printed) for wanted in lines), printed


def test_exit_code(tmp_path: Path) -> None:
    """Catches a comparison that finds a difference and succeeds."""
    paths = written(tmp_path, SAME, SAME | {"bits": {}})
    command = [sys.executable, str(ROOT / "benchmarks" / "bits.py"), "--compare", *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=source_env(), timeout=120)
    assert result.returncode == 1 and "2 differences of bits" in result.stdout, result.stderr


def test_digests_tell_values_apart() -> None:
    """Catches two outputs that differ in a bit, a shape or a dtype, and are recorded alike."""
    zeros = torch.zeros(2, 3)
    others = [-zeros, zeros.T, zeros.bfloat16(), zeros.int(), zeros + 1e-45, zeros[:0], zeros.numpy(), [zeros], None]
    values = [zeros, *others, (zeros,), {"x": zeros}, [], "text", 0.0, -0.0]
    recorded = [tuple(bits_recording.entries_of("name", value)) for value in values]
    assert len(set(recorded)) == len(values)
    assert recorded[0] == tuple(bits_recording.entries_of("name", torch.zeros(3, 2).T.clone()))


def test_cases_are_isolated(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a case that takes the others down with it, or whose output is lost."""

    def refuse() -> None:
        raise ValueError("two\nlines")

    def record(recording: bits_recording.Recording, name: str) -> None:
        recording.case(f"{name}/refused", refuse)
        assert recording.case(f"{name}/array", np.arange, 3).tolist() == [0, 1, 2]
        raise TypeError

    recording = bits_recording.Recording()
    recording.group("group", record)
    assert recording.bits["group/refused"] == "raises ValueError" and recording.bits["group"] == "raises TypeError"
    assert recording.bits["group/array"].startswith("array int64 (3,) ")
    assert recording.messages["group/refused"] == "ValueError: two"
    with pytest.raises(AssertionError, match="two cases"):
        recording.case("group/array", np.arange, 3)
