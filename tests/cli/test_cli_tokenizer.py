"""`fastbert tokenizer train` learns from files of every kind, samples evenly, and says what it did."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fastbert.cli.main import main
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data.sampling import draw
from helpers import docstrings
from tokenizer_cases import KOREAN

TEXTS = [" ".join(text.split()) for text in docstrings(200)]


def train(*arguments: str | Path) -> int:
    return main(["tokenizer", "train", *map(str, arguments)])


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a vocabulary that differs from Tokenizer.train's, Korean that is taken apart, and a silent command."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    lines = "\n".join(json.dumps({"body": text}) for text in KOREAN * 20)
    (tmp_path / "text/b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    out = tmp_path / "tokenizer"
    assert train("--files", tmp_path / "text", "--field", "body", "--vocab-size", 1200, "--output", out) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    tokenizer = Tokenizer.from_pretrained(out)
    assert tokenizer.vocab_size == 1200
    size = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert "1,200 tokens\n" in printed and f"{size:,} bytes read of 2 files" in printed
    assert "(all but the held-out ones)" in printed
    assert "[UNK]" in printed and "held-out sentences" in printed and str(out) in printed
    assert tokenizer.decode(tokenizer("다람쥐 값 ABC")["input_ids"]) == "다람쥐 값 abc"
    assert not any("\u1100" <= character <= "\u11ff" for token in tokenizer.get_vocab() for character in token)
    cased = tmp_path / "cased"
    assert train("--files", tmp_path / "text/a.txt", "--no-lowercase", "--vocab-size", 600, "--output", cased) == 0
    assert Tokenizer.from_pretrained(cased).tokenize("The") == ["The"]


def test_a_sample_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a vocabulary that is learnt from a part of the text without a word."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS * 20), encoding="utf-8")
    out = tmp_path / "tokenizer"
    assert train("--files", path, "--sample-bytes", 100_000, "--vocab-size", 500, "--output", out) == 0
    assert "%, evenly drawn)" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_vocabulary(tmp_path: Path) -> None:
    """Catches a sample that differs from run to run, or does not follow the seed."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    vocabularies = []
    for i, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(i)
        options = ("--sample-bytes", 20_000, "--seed", seed, "--vocab-size", 400)
        assert train("--files", path, *options, "--output", out) == 0
        vocabularies.append(Tokenizer.from_pretrained(out).get_vocab())
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]


@pytest.mark.parametrize("limit", [1000, 20_000, 10**9])
def test_sentences_are_drawn_evenly(limit: int, tmp_path: Path) -> None:
    """Catches a sample of the first files alone, above its limit, far below it, or with what is held out."""
    documents = [[f"sentence {i} of\n{j}" for j in range(5)] for i in range(4000)]
    sample = draw(documents, limit, 3, tmp_path / "sample")
    lines = (tmp_path / "sample").read_text().splitlines()
    assert sample.all_sentences == 20_000 and sample.sentences == len(lines) == len(set(lines))
    assert sample.size == (tmp_path / "sample").stat().st_size <= limit
    assert sample.all_size == sum(len(sentence) + 1 for document in documents for sentence in document)
    assert not set(lines) & set(sample.held_out) and 100 < len(sample.held_out) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]
    if limit > sample.all_size:
        assert len(lines) + len(sample.held_out) == 20_000
        return
    assert sample.size > 0.5 * limit
    places = [int(line.split()[1]) for line in lines]
    assert places == sorted(places)
    quarters = [sum(1000 * i <= place < 1000 * (i + 1) for place in places) for i in range(4)]
    assert min(quarters) > 0.12 * len(places)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff", "a.txt is not UTF-8: invalid start byte at byte 9. "),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl, line 1: no field 'text'; there are 'body'"),
        ("a.txt", b"\n\n", "hold too little text"),
        ("a.txt", b"", "are empty"),
        ("b.txt", b"x", "there is no file or folder"),
    ],
)
def test_bad_text_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches bad text that shows as a traceback, or leaves a folder behind."""
    (tmp_path / name).write_bytes(content)
    asked = tmp_path / ("a.txt" if name == "b.txt" else name)
    assert train("--files", asked, "--output", tmp_path / "tokenizer") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastbert: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "tokenizer").exists()


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches --errors that does not reach the reader, and a count that is not shown."""
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\xfe\n" + "\n".join(TEXTS).encode())
    assert train("--files", tmp_path / "a.txt", "--errors", "replace", "--output", tmp_path / "tokenizer") == 0
    assert "2 bytes that are not UTF-8" in capsys.readouterr().out


def test_a_tokenizer_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the tokenizer of a trained model that a second run replaces."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    assert train("--files", tmp_path / "a.txt", "--output", tmp_path) == 0
    assert train("--files", tmp_path / "a.txt", "--output", tmp_path) == 1
    assert "holds a tokenizer already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--output", "o"], ["--files", "a"], ["--files", "a", "--output", "o", "--sample-bytes", str(2**32)]],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches counts that overflow after hours, and arguments that are missing."""
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    assert stop.value.code == 2 and "usage: fastbert tokenizer train" in capsys.readouterr().err
