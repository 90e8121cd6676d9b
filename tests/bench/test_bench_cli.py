"""`fastbert bench` turns its arguments into a table and files."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

import fastbert
from fastbert.bench.results import MISSING, OK, Results
from fastbert.cli import bench
from fastbert.pipelines.modules import Normalize
from helpers import docstrings, source_env

FEW = [
    "--peers",
    "sentence-transformers",
    "--seconds",
    "0.5",
    "--rounds",
    "3",
    "--limit",
    "12",
    "--device",
    "cpu",
    "--no-memory",
]


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """Without a GPU these tests run in a process where Triton interprets; nothing here runs a Triton kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "tiny-model"
    tokenizer = fastbert.Tokenizer.train(docstrings(60), vocab_size=300)
    config = fastbert.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=80,
    )  # fmt: skip
    fastbert.SentenceEncoder(fastbert.BertModel(config).eval(), tokenizer, "mean", [Normalize()]).save_pretrained(
        folder
    )
    return folder


def run(*args):
    commands = argparse.ArgumentParser().add_subparsers()
    bench.add(commands)
    return bench.run(commands.choices["bench"].parse_args([str(arg) for arg in args]))


def test_table_and_files(folder, tmp_path, capsys):
    """Catches a command that prints no table, writes other rows than it shows, or leaves out throughput or latency."""
    assert run(folder, *FEW, "--out", tmp_path / "r.json") == 0
    table = capsys.readouterr().out
    results = Results.load(tmp_path / "r.json")
    names = ["fastbert", "transformers eager", "sentence-transformers"]
    assert [row.competitor for row in results.rows] == names * 2
    assert [row.extra["setting"] for row in results.rows] == ["throughput"] * 3 + ["latency"] * 3
    for row in results.rows:
        assert row.status == OK and row.error <= row.bound and row.seconds > 0, row
        assert row.error <= row.extra["max_error"] < 1e-5 and row.extra["prepare_seconds"] >= 0
        assert row.extra["model"].endswith("/tiny-model") and row.dtype == "float32" and row.suite == "text"
        assert row.competitor in table
        assert (row.speedup is None) == (row.competitor == "fastbert")
    throughput, latency = results.rows[0], results.rows[3]
    assert throughput.items == 12 and throughput.tokens_per_second > throughput.items / throughput.seconds
    assert latency.items == 1 and latency.rounds >= 20 and latency.p50 <= latency.p95 <= latency.p99
    assert results.notes["texts"].startswith("12 of ") and "cut to 80 tokens" in results.notes["texts"]
    assert "memory" in results.notes
    assert results.environment["packages"]["transformers"]


def test_memory_is_that_of_a_process_each(folder, tmp_path, capsys):
    """Catches memory left out on a CPU, that of all competitors shown as one's, or the model's counted alone."""
    options = [option for option in FEW if option != "--no-memory"]
    assert run(folder, *options, "--out", tmp_path / "r.json") == 0
    throughput, latency = Results.load(tmp_path / "r.json").rows[:3], Results.load(tmp_path / "r.json").rows[3:]
    assert all(100e6 < row.peak_bytes < 3e9 for row in throughput), [row.peak_bytes for row in throughput]
    assert throughput[0].peak_bytes < throughput[2].peak_bytes  # sentence-transformers imports more
    assert all(row.peak_bytes is None for row in latency)
    assert "peak memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_own_texts_in_a_report(name, folder, tmp_path):
    """Catches a report that is not written, or that is about other texts than the file's."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\ufeffOne text.\r\n\n   \nAnother one, a little longer.\nNaïve café.\n", encoding="utf-8")
    assert run(folder, "--texts", texts, *FEW, "--no-latency", "--dtype", "bfloat16", "--out", tmp_path / name) == 0
    page = (tmp_path / name).read_text(encoding="utf-8")
    assert "3 texts" in page and "sentence-transformers" in page and "latency" not in page


def test_package_that_is_not_installed_is_a_row(folder, tmp_path, monkeypatch, capsys):
    """Catches a competitor left out of the table in silence."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(
        "fastbert.bench.text_encoders.package_obstacle", lambda package: f"the package {package} is not installed"
    )
    assert run(folder, *FEW, "--no-latency", "--out", tmp_path / "r.json") == 0
    rows = Results.load(tmp_path / "r.json").rows
    assert [row.status for row in rows] == [OK, MISSING, MISSING]
    assert "the package sentence-transformers is not installed" in capsys.readouterr().out


def test_texts_are_taken_by_pace(folder, monkeypatch):
    """Catches a large model that takes half an hour on a small machine."""
    from fastbert.bench import run as bench_run
    from fastbert.bench.text_task import TextTask

    taken = []
    monkeypatch.setattr(
        TextTask, "use", lambda task, texts, use=TextTask.use: taken.append(len(texts)) or use(task, texts)
    )
    monkeypatch.setattr(bench_run, "seconds_of", lambda encode, texts: 0.1 * len(texts))
    options = [option for option in FEW if option not in ("--limit", "12")]
    assert run(folder, *options, "--no-latency", "--seconds", "60") == 0
    assert taken == [300, 40]


def test_wrong_fastbert_is_an_error(folder, monkeypatch, capsys):
    """Catches exit code 0, or a speed, although fastbert's own vectors are wrong."""
    from fastbert.bench.text_encoders import FastBert

    right = FastBert.encode
    monkeypatch.setattr(FastBert, "encode", lambda self, texts: right(self, texts) * 1.01)
    assert run(folder, *FEW, "--no-latency") == 1
    assert "error 0.01 above the bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--texts", "none.txt"], FileNotFoundError, "none.txt"),
        (["--texts", "blank.txt"], ValueError, "blank.txt: holds no text"),
        (["--texts", "latin.txt"], ValueError, "latin.txt, line 2: not UTF-8"),
        (["--out", "r.pdf"], ValueError, "out: got 'r.pdf', expected a name that ends in .html, .md, .json"),
        (["--out", "nowhere/r.md"], FileNotFoundError, "out: there is no folder 'nowhere'"),
        (["--peers", "sdpa, eager"], ValueError, "peers: got 'sdpa', 'eager', expected names among fastbert, transf"),
        (["--dtype", "int8"], ValueError, "dtype: got 'int8', expected one of float32, bfloat16, float16"),
        (["--device", "cuda"], ValueError, "device: got 'cuda', but PyTorch finds no NVIDIA GPU"),
        (["--device", "meta"], ValueError, "device: got 'meta', expected cpu or cuda"),
    ],
)
def test_bad_arguments(args, error, message, folder, tmp_path, monkeypatch):
    """Catches an error that comes after minutes of work, or that does not say what is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(error, match=message.replace(".", r"\.")):
        run(folder, *args)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such folder"), ("{}", "config.json|weights|model.safetensors")]
)
def test_wrong_folder(content, message, tmp_path):
    """Catches a traceback from deep inside for a folder that holds no model."""
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        run(folder, *FEW)


def test_interpreter_is_never_timed(folder, monkeypatch):
    """Catches the speed of Triton's interpreter shown as that of the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: nothing is measured"):
        run(folder, *FEW)


def test_help_waits_for_no_import():
    """Catches --help that waits seconds for the import of PyTorch."""
    code = (
        "import argparse, sys; from fastbert.cli import bench; bench.add(argparse.ArgumentParser().add_subparsers());"
        "print(sorted({'torch', 'transformers', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=source_env(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
