"""Documents are read from files of every kind, and bad input is named with its place."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.training.data import reading, records, streams
from fastbert.training.data.sentences import LONGEST
from fastbert.training.data.sources import Counts, Reading, find_files, read_documents


def read(path: Path | list[Path], **options: Any) -> tuple[list[list[str]], Counts]:
    """The documents of files, and their counts."""
    counts = Counts()
    return list(read_documents(find_files(path), Reading(**options), counts)), counts


def file_with(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_sentence_a_line(tmp_path: Path) -> None:
    """Catches blank lines that make empty documents, line ends of Windows, and a last line without an end."""
    path = file_with(tmp_path, "a.txt", "\ufeff\n\n One. Two. \r\nThree\r\n \t\n\n\nvier\x0b\x85\u2028fünf\n\n\n\nEnd")
    expected = [["One. Two.", "Three"], ["vier\x0b\x85\u2028fünf"], ["End"]]
    for options in ({}, {"layout": "sentences"}):
        documents, counts = read(path, **options)
        assert documents == expected
        assert (counts.documents, counts.sentences, counts.read_bytes) == (3, 4, path.stat().st_size)
        assert counts.characters == sum(len(sentence) for document in documents for sentence in document)


def test_a_document_a_line_or_a_file(tmp_path: Path) -> None:
    """Catches running text that is not split, a line that runs into the next document, and files that run together."""
    path = file_with(tmp_path, "a.txt", "One. Two\n\n3.5 is a number. Yes!\n")
    other = file_with(tmp_path, "b.txt", "A head\n\nA line\nis wrapped. End")
    assert read(path, layout="documents")[0] == [["One.", "Two"], ["3.5 is a number.", "Yes!"]]
    assert read([path, other], layout="files")[0] == [
        ["One.", "Two", "3.5 is a number.", "Yes!"],
        ["A head", "A line is wrapped.", "End"],
    ]
    assert read([path, other])[0][-1] == ["A line", "is wrapped. End"]
    empty = file_with(tmp_path, "c.txt", "\n \n")
    documents, counts = read([other, empty], layout="files")
    assert len(documents) == 1 and counts.empty_documents == 1


def test_korean_text_is_left_as_it_is(tmp_path: Path) -> None:
    """Catches normalisation while reading, and NUL or other control characters that end a text."""
    text = "한국어 \u1112\u1161\u11ab e\u0301\x00\x01 ﬁ"
    assert read(file_with(tmp_path, "a.txt", text))[0] == [[text]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".GZ"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    """Catches a compression that is not taken off, second members of a file among it, and a wrong progress."""
    pack: Callable[[bytes], bytes] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[
        suffix.lower()
    ]
    file_with(tmp_path, f"a.txt{suffix}", pack(b"one\ntwo\n") + pack("\nthree é\n".encode()))
    file_with(tmp_path, f"b.jsonl{suffix}", pack(b'{"text": "One. Two."}\n'))
    documents, counts = read(tmp_path)
    assert documents == [["one", "two"], ["three é"], ["One.", "Two."]]
    assert counts.read_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_damaged_compressed_files_are_named(suffix: str, tmp_path: Path) -> None:
    """Catches a file that was copied in part and passes for a whole one, or an error without its name."""
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    content = pack(os.urandom(5000).hex().encode())
    for damaged in (content[:-30], b"no archive at all"):
        path = file_with(tmp_path, f"a.txt{suffix}", damaged)
        with pytest.raises(ValueError, match=f"a.txt{suffix} cannot be read at byte"):
            read(path)


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a .zst file that is read as text, and a missing library that is not named with its pip line."""
    path = file_with(tmp_path, "a.txt.zst", gzip.compress(b"one\n"))
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a.txt.zst: .*pip install zstandard"):
        find_files(path)
    stub = types.SimpleNamespace(stream_reader=lambda raw, read_across_frames: gzip.GzipFile(fileobj=raw))
    monkeypatch.setitem(sys.modules, "zstandard", types.SimpleNamespace(ZstdDecompressor=lambda: stub))
    assert read(path)[0] == [["one"]]


def test_json_lines(tmp_path: Path) -> None:
    """Catches records that run together, a list of sentences that is split again, and empty ones that are lost."""
    values = ["One. Two.\n\nHead\nline", ["A. B.", " c ", ""], None, "", []]
    lines = [json.dumps({"id": i, "text": value}, ensure_ascii=i % 2 == 0) for i, value in enumerate(values)]
    for name in ("a.jsonl", "a.ndjson", "a.json"):
        documents, counts = read(file_with(tmp_path, name, "\n\n".join(lines)))
        assert documents == [["One.", "Two.", "Head line"], ["A. B.", "c"]]
        assert (counts.documents, counts.empty_documents) == (2, 3)
    path = file_with(tmp_path, "b.jsonl", '{"body": "한 문장. 또\\n하나"}')
    assert read(path, field="body")[0] == [["한 문장.", "또 하나"]]
    assert read(path, field="body", layout="sentences")[0] == [["한 문장. 또", "하나"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "a", "id": 1}', "line 3: no field 'text'; there are 'body', 'id'"),
        ("{}", "line 3: no field 'text'; there are none"),
        ("[1]", "line 3: got a JSON list, expected one object"),
        ("{", "line 3: not JSON"),
        ("[" * 100_000, "line 3: not JSON"),
        ('{"text": 5}', "line 3: got int in field 'text', expected a text or a list of sentences"),
        ('{"text": ["a", 5]}', "line 3: got a list with a int in field 'text'"),
        ('{"text": "a\\ud800"}', "line 3: half of a UTF-16 pair at character 1 .*--errors replace"),
    ],
)
def test_bad_records_are_named(line: str, message: str, tmp_path: Path) -> None:
    """Catches a bad record that is skipped, or an error without file, line, fields and what to do."""
    path = file_with(tmp_path, "a.jsonl", f'{{"text": "x"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        read(path)


def test_halves_of_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    """Catches a lone surrogate that reaches the tokenizer, which cannot take it."""
    path = file_with(tmp_path, "a.jsonl", '{"text": ["a\\ud800b \\ud83d\\ude00"]}\n')
    documents, counts = read(path, errors="replace")
    assert documents == [["a\ufffdb 😀"]] and counts.replaced_bytes == 1


def test_records_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line of JSON without end that fills the memory."""
    monkeypatch.setattr(records, "LONG_RECORD", 1000)
    path = file_with(tmp_path, "a.jsonl", '{"text": "x"}\n{"text": "' + "x" * 2000)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: got a record of more than 1000 characters"):
        read(path)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are lost between batches, lists of sentences, nulls, and a wrong field or file."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow")
    texts = [f"Row {i}. 끝 {i}." for i in range(200)]
    table = pyarrow.table({"text": [*texts, None], "parts": [[text, "b"] for text in texts] + [[]]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    documents, counts = read(tmp_path)
    assert documents == [[f"Row {i}.", f"끝 {i}."] for i in range(200)]
    assert counts.empty_documents == 1 and counts.read_bytes == (tmp_path / "a.parquet").stat().st_size
    assert read(tmp_path, field="parts")[0] == [[text, "b"] for text in texts]
    with pytest.raises(ValueError, match=r"a.parquet: no field 'body'; there are 'text', 'parts'"):
        read(tmp_path, field="body")
    bad = pyarrow.array([b"ok", b"a\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2 is not UTF-8: .* at byte 1 .*--errors replace"):
        read(tmp_path)
    documents, counts = read(tmp_path, errors="replace")
    assert documents == [["ok"], ["a\ufffd"]] and counts.replaced_bytes == 1
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: got int in field 'text'"):
        read(tmp_path)
    file_with(tmp_path, "a.parquet", "no Parquet")
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read as Parquet"):
        read(tmp_path)


def test_parquet_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing library that shows late, or without its pip line."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    with pytest.raises(ValueError, match=r"a.parquet: .*pip install pyarrow"):
        find_files(file_with(tmp_path, "a.parquet", "x"))
    with pytest.raises(ValueError, match=r"a.parquet.gz: .*decompress"):
        find_files(file_with(tmp_path, "a.parquet.gz", "x"))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("part", [2**20, 7])
def test_bytes_that_are_not_utf8(is_packed: bool, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong offset behind long characters and between reads, and a count of bytes that is off."""
    monkeypatch.setattr(streams, "PART", part)
    good = "é한😀\n".encode() * 3
    bad = good + b"a\xe4b\n" + good + b"\xff\xfe\xed\x95"
    path = file_with(tmp_path, "a.txt.gz" if is_packed else "a.txt", gzip.compress(bad) if is_packed else bad)
    with pytest.raises(ValueError, match=rf"a.txt.* is not UTF-8: .* at byte {len(good) + 1}\. .*--errors replace"):
        read(path)
    documents, counts = read(path, errors="replace")
    assert documents == [["é한😀"] * 3 + ["a\ufffdb"] + ["é한😀"] * 3 + ["\ufffd\ufffd\ufffd"]]
    assert counts.replaced_bytes == 5


def test_a_file_in_utf16_is_refused_at_its_first_byte(tmp_path: Path) -> None:
    """Catches UTF-16 that is read as something else."""
    with pytest.raises(ValueError, match="at byte 0"):
        read(file_with(tmp_path, "a.txt", "abc".encode("utf-16")))


@pytest.mark.parametrize("layout", ["sentences", "documents", "files"])
@pytest.mark.parametrize("unit", ["word ", "wör한", "\n", " ", "a.", "Ab cd. "])
def test_lines_of_megabytes(layout: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with a line or a document, text that is lost, and cuts that are not counted."""
    monkeypatch.setattr(streams, "PART", 2**15)
    monkeypatch.setattr(streams, "LONG_LINE", 2**15)
    monkeypatch.setattr(reading, "PARAGRAPH", 2**13)
    monkeypatch.setattr(reading, "LONG_DOCUMENT", 30_000)
    text = unit * (1_000_000 // len(unit.encode()))
    path = file_with(tmp_path, "a.txt", text)
    counts, n, longest, characters = Counts(), 0, 0, 0
    tracemalloc.start()
    try:
        for document in read_documents([path], Reading(layout), counts):
            n += 1
            longest = max(longest, *map(len, document))
            assert sum(map(len, document)) <= reading.LONG_DOCUMENT
            characters += sum(len("".join(sentence.split())) for sentence in document)
        assert tracemalloc.get_traced_memory()[1] < 1.6e6
    finally:
        tracemalloc.stop()
    assert characters == len("".join(text.split())) and longest <= LONGEST
    assert n == counts.documents and (n > 1) == bool(text.strip())
    is_cut = bool(text.strip())
    is_split = unit == "Ab cd. " and layout != "sentences"
    assert (counts.cut_documents, counts.cut_sentences) == (is_cut, is_cut and not is_split)


def test_cuts_are_counted_once_a_text(tmp_path: Path) -> None:
    """Catches a count for each piece, and a count that is missing for the second long sentence."""
    long = "word " * 9_000
    path = file_with(tmp_path, "a.txt", f"{long}\nshort\n{long}\n\n{long}\n")
    assert read(path)[1].cut_sentences == 3 and read(path)[1].cut_documents == 0
    assert read(path, layout="documents")[1].cut_sentences == 3


def test_files_of_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order that differs between machines, hidden or foreign files, and a file that counts twice."""
    names = [
        "b/z.txt",
        "b/a.md",
        "b/c/d.jsonl.gz",
        "a.text",
        "c.ndjson",
        "data.log",
        ".hidden.txt",
        ".git/x.txt",
        "x.pdf",
    ]
    for name in names:
        file_with(tmp_path, name, "x")
    monkeypatch.chdir(tmp_path)
    known = ["a.text", "b/a.md", "b/c/d.jsonl.gz", "b/z.txt", "c.ndjson"]

    def found(*items: str | Path) -> list[str]:
        return [path.absolute().relative_to(tmp_path).as_posix() for path in find_files(items)]

    assert found(tmp_path) == found(".") == found("**") == known
    assert found("**/*.txt") == ["b/z.txt"]
    assert found("*.log") == ["data.log"] and found("data.log", ".hidden.txt") == ["data.log", ".hidden.txt"]
    assert found("*") == known and found("b/*") == known[1:4]
    assert found("c.ndjson", "b", tmp_path, "./b/z.txt") == [
        "c.ndjson",
        "b/a.md",
        "b/c/d.jsonl.gz",
        "b/z.txt",
        "a.text",
    ]
    assert find_files("b/z.txt") == find_files(Path("b/z.txt")) == [Path("b/z.txt")]
    (tmp_path / "b/c/loop").symlink_to(tmp_path)
    assert sorted(found(tmp_path)) == sorted(known)


@pytest.mark.parametrize("item", ["missing", "missing/*.txt", "empty", "*.pdf"])
def test_what_matches_nothing_is_named(item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a typo in one of several names that goes unnoticed."""
    monkeypatch.chdir(tmp_path)
    file_with(tmp_path, "a.txt", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=item.replace("*", r"\*")):
        find_files(["a.txt", item])


def test_no_text_is_refused(tmp_path: Path) -> None:
    """Catches an empty corpus, and a pipe that cannot be read twice."""
    with pytest.raises(ValueError, match="text: got no files"):
        find_files([])
    with pytest.raises(ValueError, match="are empty"):
        find_files(file_with(tmp_path, "a.txt", ""))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="more than once"):
        find_files(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("options", "name"), [({"layout": "lines"}, "layout"), ({"errors": "ignore"}, "errors"), ({"field": ""}, "field")]
)
def test_wrong_options_are_named(options: dict[str, Any], name: str) -> None:
    """Catches a wrong option that shows after hours, or does nothing."""
    with pytest.raises(ValueError, match=f"^{name}: got"):
        Reading(**options)
