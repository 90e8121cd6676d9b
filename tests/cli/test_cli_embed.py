"""`fastbert embed` reads texts and writes vectors."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cli_cases import TEXTS, encode, fails
from fastbert import (
    SentenceEncoder,
)
from fastbert.cli.main import main


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("window", [16384, 4])
def test_embed_to_npy(
    models: SimpleNamespace, text_file: Path, monkeypatch: pytest.MonkeyPatch, window: int, tmp_path: Path
) -> None:
    """Catches rows lost between windows, empty lines left out, and an array that NumPy does not read."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", window)
    output = tmp_path / "vectors.npy"
    assert main(["embed", str(text_file), "--model", models.sentence, "-o", str(output), "--device", "cpu"]) == 0
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encode(models, TEXTS), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]


def test_embed_jsonl_to_jsonl(models: SimpleNamespace, tmp_path: Path) -> None:
    """Catches a field that is not read, texts changed on the way, and numbers that lose bits of a float32."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [*TEXTS, '강\u2028과 "fish"']
    source.write_text("".join(json.dumps({"text": "x", "body": text}) + "\n" for text in texts))
    argv = ["embed", str(source), "--field", "body", "--model", models.sentence, "-o", str(output), "--device", "cpu"]
    assert main(argv) == 0
    records = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [record["text"] for record in records] == texts
    vectors = np.array([record["embedding"] for record in records])
    assert (vectors == vectors.astype(np.float32)).mean() < 1, "printed short"
    np.testing.assert_array_equal(vectors.astype(np.float32), encode(models, texts))
    argv[2:4] = []
    assert main(argv) == 0
    assert json.loads(output.read_text().split("\n")[0])["text"] == "x", "the default field of .jsonl is text"


def test_embed_from_stdin_to_stdout(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a byte order mark or CR in a text, a last line without end lost, and output beside the JSON lines."""
    feed(monkeypatch, b"\xef\xbb\xbffish\r\n\nsmall boats\n cross")
    assert main(["embed", "--model", models.sentence, "-o", "-", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["fish", "", "small boats", " cross"]
    assert err == "", "no progress bar where standard error is no terminal"


def test_progress_bar_on_a_terminal(
    models: SimpleNamespace,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a bar that is missing, does not know its end, or stops before it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    output = str(tmp_path / "x.npy")
    assert main(["embed", str(text_file), "--model", models.sentence, "-o", output, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and f"{len(TEXTS)}/{len(TEXTS)}" in err


def test_embed_options(models: SimpleNamespace, text_file: Path, tmp_path: Path) -> None:
    """Catches an option that does not reach the encoder."""
    output = tmp_path / "vectors.npy"

    def vectors(*options: str) -> np.ndarray:
        argv = ["embed", str(text_file), "--model", models.sentence, "-o", str(output), "--device", "cpu"]
        assert main([*argv, *options]) == 0
        return np.load(output)

    close: Callable[..., None] = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    close(vectors("--prompt-name", "query"), encode(models, TEXTS, prompt="query: "))
    close(vectors("--prompt", "boats "), encode(models, TEXTS, prompt="boats "))
    close(vectors("--batch-tokens", "5", "--normalize"), encode(models, TEXTS))
    close(vectors("--backend", "torch", "--dtype", "float32"), encode(models, TEXTS))
    short = SentenceEncoder.from_pretrained(models.sentence, device="cpu")
    short.max_seq_length = 4
    close(vectors("--max-length", "4"), short.encode(TEXTS))
    assert not np.allclose(vectors("--dtype", "bfloat16"), encode(models, TEXTS), atol=1e-5)


def test_embed_nothing(models: SimpleNamespace, tmp_path: Path) -> None:
    """Catches a crash on an empty file."""
    (tmp_path / "empty").touch()
    output = tmp_path / "vectors.npy"
    argv = ["embed", str(tmp_path / "empty"), "--model", models.sentence, "-o", str(output), "--device", "cpu"]
    assert main(argv) == 0 and np.load(output).shape == (0, 32)


def test_truncation_is_told_once(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a warning for each window, or none."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 2)
    feed(monkeypatch, b"fish " * 100 + b"\nfish\nfish\nfish\n" + b"fish " * 30)
    assert main(["embed", "--model", models.sentence, "-o", str(tmp_path / "x.npy"), "--device", "cpu"]) == 0
    warning = "fastbert: warning: encode: 2 of 5 texts were longer than max_seq_length = 24 and truncated: "
    assert capsys.readouterr().err == f"{warning}{100 - 22 + 30 - 22} tokens cut\n"


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"fish\n\xff\xfe\n", ".txt", "line 2: not UTF-8: invalid start byte at byte 1"),
        (b'{"text": "fish"}\n\n', ".jsonl", "line 2: not JSON"),
        (b'{"body": "fish"}\n', ".jsonl", "line 1: expected a JSON object with a string under 'text'"),
        (b'"fish"\n', ".jsonl", "line 1: expected a JSON object"),
        (b'{"text": "\\ud800"}\n', ".jsonl", "line 1: lone surrogate U+D800"),
    ],
)
def test_bad_input_names_file_and_line(
    models: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    suffix: str,
    message: str,
) -> None:
    """Catches replacement characters in silence, and an error without its place."""
    file, output = tmp_path / f"texts{suffix}", tmp_path / "vectors.npy"
    file.write_bytes(content)
    error = fails(capsys, "embed", str(file), "--model", models.sentence, "-o", str(output))
    assert f"{file}, {message}" in error
    assert not output.exists()


def test_failure_half_way_keeps_the_old_file(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an output file that looks finished after an error in a later window, and temporary files left over."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 2)
    source = tmp_path / "texts.txt"
    source.write_bytes(b"fish\n" * 9 + b"\xff\n")
    for name in ("vectors.npy", "vectors.jsonl"):
        (tmp_path / name).write_text("older")
        fails(capsys, "embed", str(source), "--model", models.sentence, "-o", str(tmp_path / name))
        assert (tmp_path / name).read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 3
