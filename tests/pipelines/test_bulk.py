"""A long input is encoded block by block, and a run that was killed goes on."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder
from fastbert.pipelines.bulk import BlockEncoder, BulkJob, encode_blocks, join_parts
from fastbert.text import blocks
from fastbert.text.blocks import Block, Parts
from helpers import tiny_bert
from sentence_cases import TEXTS

pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow; extra ray has it")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow; extra ray has it")

MANY = [f"{text} {i}" for i in range(6) for text in [*TEXTS, "강물이 넓다"]]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(TEXTS * 3, 150)
    return SentenceEncoder(BertModel(config, batch_invariant=True), tokenizer)


def write_lines(path: Path, texts: list[str]) -> str:
    records = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(records) + "\n", encoding="utf-8")
    return str(path)


def write_parquet(path: Path, texts: list[str], rows_in_group: int = 7) -> str:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    parquet.write_table(table, path, row_group_size=rows_in_group)
    return str(path)


@pytest.mark.parametrize("size", [1, 7, 50, 10**6])
def test_blocks_hold_each_line_once(tmp_path: Path, size: int) -> None:
    """Catches a line that is lost or doubled where a block ends in or beside it, and a byte order mark."""
    file = tmp_path / "texts.txt"
    for content in (b"\xef\xbb\xbfone\r\n\n\nfour four\nfive", b"\n", b"", b"x" * 60 + b"\ny\n", "강\n물\n".encode()):
        file.write_bytes(content)
        plan = blocks.plan([str(file)], block_bytes=size)
        texts = [text for block in plan for text in blocks.read_lines(block, None)]
        expected = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        assert texts == (expected[:-1] if expected[-1] == "" else expected)
        assert [block.index for block in plan] == list(range(len(plan)))


@pytest.mark.parametrize(("rows", "group"), [(3, 7), (7, 7), (20, 7), (5, 100)])
def test_blocks_hold_each_row_once(tmp_path: Path, rows: int, group: int) -> None:
    """Catches rows lost or doubled where blocks and row groups overlap, and columns that are not kept."""
    files = [write_parquet(tmp_path / f"{name}.parquet", MANY, group) for name in "ab"]
    tables = [blocks.read_table(block) for block in blocks.plan(files, block_rows=rows)]
    assert [i for table in tables for i in table.column("id").to_pylist()] == [*range(len(MANY))] * 2
    assert [text for table in tables for text in blocks.texts_of_table(table, "text", "x")] == MANY * 2
    with pytest.raises(ValueError, match="x: has no column 'body', but id, text"):
        blocks.texts_of_table(tables[0], "body", "x")
    with pytest.raises(TypeError, match="column 'id', row 0 of the block: got int"):
        blocks.texts_of_table(tables[0], "id", "x")


@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl URL", "parquet URL"])
def test_a_killed_run_goes_on(
    encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, suffix: str
) -> None:
    """Catches rows that are lost, doubled or out of order after a run that ended half-way, and half a file that counts
    as a whole one."""
    is_lines, begin = kind.startswith("jsonl"), "file://" if kind.endswith("URL") else ""
    write_input = write_lines if is_lines else write_parquet
    path = begin + write_input(tmp_path / f"in.{kind.split()[0]}", MANY)
    plan = blocks.plan([path], block_rows=10, block_bytes=300)
    job = BulkJob(Parts(begin + str(tmp_path / "out"), suffix, len(plan), {"input": "a"}), "text", normalize=True)
    job.parts.begin(resume=False)
    encode, write, calls = BlockEncoder(encoder, job), blocks.storage.writing, []

    def killed(path: str) -> Any:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blocks.storage, "writing", killed)
        encode_blocks(encode, plan[1:])
    assert job.parts.done() == {1, 2}
    times = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in os.listdir(tmp_path / "out")}
    with pytest.raises(RuntimeError, match="blocks are not there: "):
        job.parts.finish()
    job.parts.begin(resume=True)
    todo = [block for block in plan if block.index not in job.parts.done()]
    assert len(todo) == len(plan) - 2
    n_before = sum(counted(path, suffix) for path in parts_of(tmp_path / "out", suffix))
    assert encode_blocks(encode, todo).texts == len(MANY) - n_before
    job.parts.finish()
    assert all(os.stat(tmp_path / "out" / name).st_mtime_ns == times[name] for name in times if name.startswith("part"))
    assert_rows(tmp_path / "out", suffix, encoder.encode(MANY, normalize_embeddings=True), with_ids=not is_lines)


def parts_of(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"part-*.{suffix}"))


def counted(path: Path, suffix: str) -> int:
    """The number of rows of a file."""
    if suffix == "npy":
        return len(np.load(path))
    return path.read_bytes().count(b"\n") if suffix == "jsonl" else parquet.read_table(path).num_rows


def assert_rows(folder: Path, suffix: str, expected: np.ndarray, with_ids: bool) -> None:
    """The files of a folder, in order, hold each row of MANY once, with its vector."""
    paths = parts_of(folder, suffix)
    if suffix == "npy":
        np.testing.assert_array_equal(np.concatenate([np.load(path) for path in paths]), expected)
        return
    if suffix == "jsonl":
        records = [json.loads(line) for path in paths for line in path.read_text("utf-8").split("\n")[:-1]]
    else:
        records = pyarrow.concat_tables([parquet.read_table(path) for path in paths]).to_pylist()
        assert not with_ids or [record["id"] for record in records] == list(range(len(MANY)))
    assert [record["text"] for record in records] == MANY
    vectors = np.array([record["embedding"] for record in records], np.float32)
    np.testing.assert_array_equal(vectors, expected)


def test_another_input_is_refused(tmp_path: Path) -> None:
    """Catches vectors of two models or two inputs in one folder, and a folder that is written over."""
    folder = str(tmp_path / "out")
    Parts(folder, "npy", 3, {"model": "a", "input": ["x", 1]}).begin(resume=True)
    Parts(folder, "npy", 3, {"model": "a", "input": ("x", 1)}).begin(resume=True)
    for parts, message in (
        (Parts(folder, "npy", 3, {"model": "b", "input": ["x", 1]}), '--resume: model was "a" when .* and is "b" now'),
        (Parts(folder, "npy", 3, {"model": "a", "input": ["x", 2]}), r'--resume: input was \["x", 1\] when'),
        (Parts(folder, "npy", 4, {"model": "a", "input": ["x", 1]}), "--resume: blocks was 3 when"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.begin(resume=True)
    with pytest.raises(ValueError, match="holds an unfinished one, which --resume continues"):
        Parts(folder, "npy", 3).begin(resume=False)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "other").touch()
    with pytest.raises(ValueError, match="holds other files"):
        Parts(folder, "npy", 3).begin(resume=True)


def test_a_model_has_a_fingerprint(tmp_path: Path) -> None:
    """Catches weights, settings or names that change and leave the fingerprint as it was."""
    seen = set()
    for name, content in (("model.safetensors", "1"), ("model.safetensors", "2"), ("config.json", "1"), ("a.txt", "")):
        (tmp_path / name).write_text(content)
        seen.add(blocks.model_fingerprint(tmp_path))
    (tmp_path / ".hidden.json").touch()
    assert len(seen) == 4 and blocks.model_fingerprint(tmp_path) in seen


def test_cut_texts_are_counted_over_all_blocks(
    encoder: SentenceEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning for each block, and a count of the last block alone."""
    path = write_lines(tmp_path / "in.jsonl", ["fish " * 100, "a", "fish " * 60])
    plan = blocks.plan([path], block_bytes=100)
    job = BulkJob(Parts(str(tmp_path / "out"), "npy", len(plan)), "text")
    job.parts.begin(resume=False)
    with caplog.at_level(logging.WARNING, "fastbert"):
        counts = encode_blocks(BlockEncoder(encoder, job), plan)
        assert not caplog.records and len(plan) > 3
        counts.warn(40)
    message = f"2 of 3 texts were longer than max_seq_length = 40 and truncated: {100 - 38 + 60 - 38} tokens cut"
    assert message in caplog.text
    join_parts(job.parts, str(tmp_path / "all.npy"), 32)
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), encoder.encode(["fish " * 100, "a", "fish " * 60]))
    assert not (tmp_path / "out").exists()


def test_bad_lines_name_file_and_byte(tmp_path: Path) -> None:
    """Catches an error without its place, which lies in a block of a long file."""
    file = tmp_path / "in.jsonl"
    for line, message in (
        (b"\xff", "line at byte 16: not UTF-8: invalid start byte at byte 1"),
        (b"x", "line at byte 16: not JSON"),
        (b'{"text": 1}', "line at byte 16: expected a JSON object with a string under 'text'"),
        (b'{"text": "\\ud800"}', "line at byte 16: lone surrogate"),
    ):
        file.write_bytes(b'{"text": "one"}\n' + line + b"\n")
        with pytest.raises(ValueError, match=message):
            list(blocks.read_lines(Block(1, str(file), 10, 100), "text"))
    with pytest.raises(ValueError, match="Parquet files beside others"):
        blocks.plan(["a.parquet", "a.txt"])
