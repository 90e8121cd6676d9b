"""Records have what stands in a file, with its place, and what cannot be read is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.training.finetuning.records import RecordError, read_records
from fastbert.training.finetuning.squad import answers_of


def made(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(path: Path, **options: Any) -> list[tuple[Any, Any, str]]:
    """(text, label, place) of the records of a file."""
    return [(r.values.get("text"), r.values.get("label"), r.place) for r in read_records(path, **options)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(tmp_path: Path, end: str, mark: str) -> None:
    """Catches a byte order mark in a name, a line end or separator in quotes, and the lines of records after them."""
    rows = ["text,label", '"a, ""b""' + end + end + 'c",x', "", "d,y", "e,"]
    path = made(tmp_path, "t.csv", mark + end.join(rows) + end)
    assert pairs(path) == [
        (f'a, "b"{end}{end}c', "x", "t.csv, line 2"), ("d", "y", "t.csv, line 6"), ("e", None, "t.csv, line 7"),
    ]  # fmt: skip


def test_separators_of_csv(tmp_path: Path) -> None:
    """Catches a table of semicolons that is read as one column, and a cell longer than csv's own limit."""
    assert pairs(made(tmp_path, "t.csv", "text;label\na,b;x\n")) == [("a,b", "x", "t.csv, line 2")]
    long = "word " * 40_000
    assert pairs(made(tmp_path, "t.csv", f"text,label\n{long},x\n"))[0][0] == long


def test_quotes_of_tsv(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a quote at the start of a cell of GLUE's that swallows the lines up to the next one."""
    glue = 'sentence\tlabel\n"a b\tx\nc\ty\nd"\tz\n'
    assert [pair[:2] for pair in pairs(made(tmp_path, "t.tsv", glue))] == [('"a b', "x"), ("c", "y"), ('d"', "z")]
    assert "quotes are part of the text" in caplog.text
    caplog.clear()
    excel = 'sentence\tlabel\n"a ""b"""\tx\n"c\nd"\ty\n'
    assert pairs(made(tmp_path, "t.tsv", excel)) == [
        ('a "b"', "x", "t.tsv, line 2"), ("c\nd", "y", "t.tsv, line 3"),
    ]  # fmt: skip
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv: the file is empty"),
        ("t.csv", b"\n \n", "t.csv: the file is empty"),
        ("t.csv", b"text,label\n", "t.csv: there are no records"),
        ("t.csv", b"text,text,label\na,b,c\n", "t.csv, line 1: column 'text' is there twice, as columns 1 and 2"),
        ("t.csv", b'text,label\n"a\nb",x\nc\n', "t.csv, line 4: got 1 cells, expected 2"),
        ("t.csv", b'text,label\nz,x\n"a,x\nb,y\n', "t.csv, line 3 to 4: unexpected end of data"),
        ("t.csv", b"text,label\na,x\n\xe9t\xe9,y\n", "t.csv, line 3: not UTF-8: invalid continuation byte at byte 15"),
        ("t.csv", "text,label\na,b\n".encode("utf-16"), "t.csv, line 1: not UTF-8: .* at byte 0 .*UTF-16"),
        ("t.csv", b"sentence,premise,label\na,b,x\n", "columns 'sentence' and 'premise' may each be 'text'"),
        ("t.csv", b"text,class,target\na,b,x\n", "columns 'class' and 'target' may each be 'label'"),
        ("t.tsv", b"question\tsentence\tlabel\na\tb\tx\n", "columns 'question' and 'sentence' may each be 'text'"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": \n', "t.jsonl, line 3: not JSON"),
        ("t.jsonl", b'{"text": "a"}\n["a"]\n', "t.jsonl, line 2: got a JSON list"),
        ("t.jsonl", b'{"text": "a", "text": "b"}\n', "t.jsonl, line 1: the key 'text' is there twice"),
        ("t.jsonl", b'{"text": "\\ud800"}\n', "t.jsonl, line 1: column 'text' has half of a UTF-16 pair"),
        ("t.json", b'[{"text": "a"},\n 3]', "t.json, record 2: got a JSON int"),
        ("t.conll", b"a B-X\nb\n", "t.conll, line 2: got 1 columns, expected 2"),
        ("t.conll", b"a\nb\n", "t.conll, line 1: got one column"),
        ("t.txt", b"a", "t.txt: what it holds is not clear"),
        ("t.parquet", b"PAR1", "t.parquet: cannot be read as Parquet"),
        ("t.csv.gz", b"text", "cannot be read at byte"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Catches a file that is read in part or wrongly in the place of an error with its line."""
    with pytest.raises(RecordError, match=message):
        read_records(made(tmp_path, name, content))


def test_columns(tmp_path: Path) -> None:
    """Catches an alias that wins over a name or over the mapping, and a missing column without those that are there."""
    path = made(tmp_path, "t.csv", "Sentence A,label,class,review\na,x,y,z\n")
    assert [r.values["label"] for r in read_records(path)] == ["x"]
    mapped = read_records(path, columns={"text": "review", "label": "class"})[0]
    assert (mapped.values["text"], mapped.values["label"], mapped.values["review"]) == ("z", "y", "z")
    with pytest.raises(RecordError, match="no column 'body', which .*'text' to; there are 'Sentence A', 'label'"):
        read_records(path, columns={"text": "body"})
    with pytest.raises(RecordError, match="t.csv, line 2: no column 'text'; there are 'Sentence A'.*text=COLUMN"):
        read_records(path)[0].value("text")
    two = read_records(made(tmp_path, "p.csv", "Premise,Hypothesis,gold-label\na,b,x\n"))[0].values
    assert (two["text"], two["text_pair"], two["label"]) == ("a", "b", "x")
    scored = read_records(made(tmp_path, "s.csv", "sentence1,sentence2,score\na,b,2.5\n"))[0].values
    assert scored["label"] == scored["score"] == "2.5"
    searched = read_records([{"query": "a", "positive": "b", "neg": "c"}])[0].values
    assert (searched["anchor"], searched["positive"], searched["negative"]) == ("a", "b", "c")


def test_empty_cells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches NaN or nothing that becomes a label, and a warning without its count and lines."""
    path = made(tmp_path, "t.csv", "text,label\na,x\nb,\nc,NaN\nd,y\n,x\ne, \n")
    records = read_records(path)
    assert [r.values["label"] for r in records] == ["x", None, None, "y", "x", None]
    assert "t.csv: column 'label' is empty in 3 records (t.csv, line 3; t.csv, line 4; t.csv, line 7)" in caplog.text
    assert "t.csv: column 'text' is empty in 1 record (t.csv, line 6)" in caplog.text
    with pytest.raises(RecordError, match="t.csv, line 3: column 'label' is empty"):
        records[1].value("label")
    assert read_records([{"text": "nan", "label": float("nan")}])[0].values == {"text": "nan", "label": None}


def test_rows_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the empty rows at the end of a spreadsheet as records, and that they are gone without a word."""
    assert pairs(made(tmp_path, "t.csv", "text,label\na,x\n,\n  \nb,y\n , \n")) == [
        ("a", "x", "t.csv, line 2"), ("b", "y", "t.csv, line 5"),
    ]  # fmt: skip
    assert "left out: 3 records (t.csv, line 3; t.csv, line 4; t.csv, line 6)" in caplog.text


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n,;"\t\r'), max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_any_cells(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str) -> None:
    """Catches a cell that is changed between the library that writes CSV and ours, and a line that is counted wrong."""
    rows = [(f"x{a}", f"y{b}") for a, b in rows]  # neither is empty
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    lines = []
    for row in [("text", "label"), *rows]:
        before = buffer.getvalue()
        lines.append(1 + len(re.findall("\r\n|\r|\n", before)))
        writer.writerow(row)
    path = made(tmp_path_factory.mktemp("cells"), "t.csv", buffer.getvalue())
    expected = [(a, b, f"t.csv, line {line}") for (a, b), line in zip(rows, lines[1:], strict=True)]
    assert pairs(path) == expected


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path: Path, suffix: str, pack: Any) -> None:
    """Catches a suffix of compression that hides what a file holds."""
    path = made(tmp_path, "t.jsonl" + suffix, pack(b'\xef\xbb\xbf{"text": "a", "label": 3}\n'))
    assert pairs(path) == [("a", 3, f"t.jsonl{suffix}, line 1")]


def test_json_in_lines_or_whole(tmp_path: Path) -> None:
    """Catches JSON lines under the name .json that are read as one value, and a text with "data" taken for SQuAD's."""
    lines = '{"text": "a\u2028b \\"data\\"", "label": "x"}\n\n{"text": "c", "label": "data"}'
    expected = [('a\u2028b "data"', "x", "t.json, line 1"), ("c", "data", "t.json, line 3")]
    assert pairs(made(tmp_path, "t.json", lines)) == expected
    listed = '[{"text": "a", "label": 1}, {"text": "b", "label": 2}]'
    assert pairs(made(tmp_path, "t.json", listed)) == [("a", 1, "t.json, record 1"), ("b", 2, "t.json, record 2")]


def test_parquet_and_datasets(tmp_path: Path) -> None:
    """Catches numbers of classes whose names are lost, in memory or in Parquet, and -1 as a class."""
    datasets = pytest.importorskip("datasets", reason="makes a Dataset")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]),
        ner_tags=datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
    )  # fmt: skip
    rows = {"text": ["a", "b"], "label": [1, -1], "ner_tags": [[0, 1], []]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "t.parquet")
    arrays = data.with_format("numpy")
    for source, place in ((data, "record 1"), (arrays, "record 1"), (tmp_path / "t.parquet", "t.parquet, row 1")):
        first, second = read_records(source)
        assert (first.values["label"], first.values["labels"], first.place) == ("yes", ["O", "B-X"], place)
        assert second.values["label"] is None
    with pytest.raises(RecordError, match="got a mapping of train, test"):
        read_records({"train": [], "test": []})


def test_memory() -> None:
    """Catches a frame whose columns are read as records, and an item that is no dict."""
    pandas = pytest.importorskip("pandas", reason="makes a frame")
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [1.0, float("nan")]})
    assert [r.values["label"] for r in read_records(frame)] == [1.0, None]
    assert [r.place for r in read_records({"text": t} for t in "ab")] == ["record 1", "record 2"]
    for bad, message in (([], "there are no records"), ([{"text": "a"}, "b"], "record 2: got str")):
        with pytest.raises(RecordError, match=message):
            read_records(bad)
    with pytest.raises(TypeError, match="got int"):
        read_records(3)
    with pytest.raises(FileNotFoundError, match="'nowhere'"):
        read_records("nowhere")
    with pytest.raises(RecordError, match="got a folder"):
        read_records(".")


def test_conll(tmp_path: Path) -> None:
    """Catches a document's line or a comment among the tokens, a sentence lost at the end, and other columns."""
    text = "-DOCSTART- -X- O O\n\nEU NNP I O-X\nx\u00a0y NN I B-Y\n\n-DOCSTART- -X- O O\n# CD I O"
    records = read_records(made(tmp_path, "t.conll", text))
    assert [(r.values["tokens"], r.values["labels"], r.place) for r in records] == [
        (["EU", "x\u00a0y"], ["O-X", "B-Y"], "t.conll, line 3"), (["#"], ["O"], "t.conll, line 7"),
    ]  # fmt: skip
    chosen = read_records(tmp_path / "t.conll", columns={"labels": "2", "tokens": "1"})
    assert [r.values["labels"] for r in chosen] == [["NNP", "NN"], ["CD"]]
    universal = "# text = a b\n1\ta b\tNOUN\n2\tc\tVERB\n\n# x\n1\td\tADV\n"
    records = read_records(made(tmp_path, "t.conllu", universal), columns={"tokens": "2"})
    assert [r.values["tokens"] for r in records] == [["a b", "c"], ["d"]]
    with pytest.raises(RecordError, match="line 2: there are 3 columns"):
        read_records(tmp_path / "t.conllu", columns={"labels": "9"})


def test_squad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an answer or a place that is lost in SQuAD's form, and a question without an answer that gets one."""
    answers = [{"text": "c", "answer_start": 0}, {"text": "d", "answer_start": 2}]
    qas = [
        {"id": "1", "question": "q?", "answers": answers},
        {"id": "2", "question": "r?", "answers": [], "is_impossible": True, "plausible_answers": answers},
    ]
    whole = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "c d", "qas": qas}]}]}
    path = made(tmp_path, "t.json", json.dumps(whole))
    with caplog.at_level(logging.WARNING):
        first, second = read_records(path)
    assert not caplog.records
    assert answers_of(first) == [("c", 0), ("d", 2)] and answers_of(second) == []
    assert (first.values["context"], first.values["id"]) == ("c d", "1")
    assert second.place == "t.json, article 1, paragraph 1, question 2"
    del whole["data"][0]["paragraphs"][0]["qas"][1]["question"]  # type: ignore[index]
    with pytest.raises(RecordError, match="paragraph 1, question 2: expected a text under 'question'"):
        read_records(made(tmp_path, "t.json", json.dumps(whole)), kind="squad")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", [("a", None)]), (["a", "b"], [("a", None), ("b", None)]), (None, []), ([], []),
        ([{"text": "a", "start": 3}], [("a", 3)]), ({"text": ["a"], "answer_start": [0]}, [("a", 0)]),
        ({"text": ["a", "b"], "answer_start": [0]}, "2 texts"), ([3], "expected a text"), ({"x": 1}, "expected a text"),
    ],
)  # fmt: skip
def test_answers(value: Any, expected: Any) -> None:
    """Catches a form of answers that is misread."""
    record = read_records([{"question": "q", "answers": value}])[0]
    if isinstance(expected, str):
        with pytest.raises(RecordError, match=f"record 1.*{expected}"):
            answers_of(record)
    else:
        assert answers_of(record) == expected
