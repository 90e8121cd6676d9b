"""JSON and text files of a checkpoint are read and written whole."""

from __future__ import annotations

import pytest

from checkpoint_cases import files
from fastbert.checkpoint.files import read_json, write_text


def test_read_json(tmp_path):
    """Catches a file that holds no JSON object and is read, or an error that does not name the file."""
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"x\.json not found"):
        read_json(path)
    for text, message in (("{,}", "is not valid JSON"), ("3", "holds a JSON int, expected an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            read_json(path)
        assert str(path) in str(raised.value)
    path.write_text('{"å": [1]}', encoding="utf-8")
    assert read_json(path) == {"å": [1]}


def test_write_text(tmp_path, monkeypatch):
    """Catches a failed write that loses the old text or leaves a temporary file."""
    path = tmp_path / "x.txt"
    write_text(path, "å\n")
    assert path.read_bytes() == "å\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == "å\n".encode() and files(tmp_path) == ["x.txt"]
