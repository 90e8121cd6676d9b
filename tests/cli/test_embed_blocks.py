"""`fastbert embed` on several devices, block by block, and on what a killed run has left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cli_cases import TEXTS, encode, fails
from fastbert.cli import embed_blocks
from fastbert.cli.main import main
from fastbert.pipelines.bulk import BlockEncoder
from fastbert.text import blocks

pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow; extra ray has it")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow; extra ray has it")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, or of some lines."""
    plan = blocks.plan
    monkeypatch.setattr(blocks, "plan", lambda files: plan(files, 3, 20))


def embed(models: SimpleNamespace, *arguments: Any) -> int:
    return main(["embed", *map(str, arguments), "--model", models.sentence, "--device", "cpu"])


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.jsonl"])
def test_one_file_is_resumed(
    models: SimpleNamespace, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Catches a run that begins anew, an output that looks finished before it is, and blocks that are left behind."""
    output, call, calls = tmp_path / name, BlockEncoder.__call__, []

    def counted(self: BlockEncoder, block: blocks.Block, progress: Any = None) -> Any:
        calls.append(block.index)
        if len(calls) == 3:
            raise RuntimeError("no power")
        return call(self, block, progress)

    monkeypatch.setattr(BlockEncoder, "__call__", counted)
    assert embed(models, text_file, "-o", output, "--resume") == 1 and "no power" in capsys.readouterr().err
    assert not output.exists() and os.path.isdir(f"{output}.parts")
    assert embed(models, text_file, "-o", output, "--resume", "--normalize") == 1
    assert "--resume: options was" in capsys.readouterr().err
    assert embed(models, text_file, "-o", output, "--resume") == 0
    assert "2 of" in capsys.readouterr().err and len(calls) == len(set(calls)) + 1
    assert sorted(os.listdir(tmp_path)) == ["texts.txt", name]
    if name.endswith("npy"):
        np.testing.assert_allclose(np.load(output), encode(models, TEXTS), atol=1e-6)
    else:
        assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == TEXTS


def test_a_folder_of_parquet(models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches columns that are lost, a folder that is written over, and a format that is not kept."""
    source = tmp_path / "in"
    source.mkdir()
    for i in range(2):
        parquet.write_table(pyarrow.table({"key": range(6), "body": TEXTS}), source / f"{i}.parquet")
    (source / "_SUCCESS").touch()
    assert embed(models, source, tmp_path / "out", "--field", "body") == 0
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [table.num_rows for table in tables] == [3, 3, 3, 3]
    rows = pyarrow.concat_tables(tables).to_pylist()
    assert [(row["key"], row["body"]) for row in rows] == list(enumerate(TEXTS)) * 2
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_allclose(vectors, np.tile(encode(models, TEXTS), (2, 1)), atol=1e-6)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is True
    assert embed(models, source, tmp_path / "out", "--field", "body") == 1
    assert "holds a finished output" in capsys.readouterr().err
    assert embed(models, source, tmp_path / "out", "--field", "body", "--resume") == 0
    assert embed(models, source, tmp_path / "npy", "--field", "body", "--format", "npy") == 0
    parts = [np.load(path) for path in sorted((tmp_path / "npy").glob("*.npy"))]
    np.testing.assert_allclose(np.concatenate(parts), vectors, atol=1e-6)


def test_workers(models: SimpleNamespace, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --workers that change vectors or their order, and are not started."""
    from fastbert.pipelines.pool import Pool

    started: list[Any] = []
    start = Pool.start
    monkeypatch.setattr(Pool, "start", lambda self: started.append(self.devices) or start(self))
    assert embed(models, text_file, "-o", tmp_path / "x.npy", "--workers", "2") == 0
    assert len(started[0]) == 2
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), encode(models, TEXTS), atol=1e-6)


def test_wrong_use(
    models: SimpleNamespace, text_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches options that contradict one another, or do nothing, in silence."""
    model = ("--model", models.sentence)
    for arguments, message in (
        (
            ["--workers", "2", "--devices", "cpu,cpu", "-o", "x.npy"],
            "--workers and --devices: got both, expected one of them",
        ),
        (["--format", "npy", "-o", "x.npy"], "--format: expected only with a folder as output"),
        (["out", "-o", "x.npy"], "output: named twice"),
        ([], "required: -o/--output"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["embed", str(text_file), *arguments, *model])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    output = str(tmp_path / "out")
    for arguments, message in (
        (["-", "--resume", "-o", output], "expected files, which can be read again"),
        ([str(text_file), "--ray", "-o", output + ".npy"], "expected a folder with --ray"),
        ([str(text_file), "--resume", "-o", output + "/no/x.npy"], "there is no folder"),
        ([str(tmp_path / "none"), "-o", output], "input: there is no file"),
        ([str(tmp_path), "-o", str(tmp_path)], "holds other files"),
    ):
        assert message in fails(capsys, "embed", *arguments, *model)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ray", "IN", "OUT"], ("", "IN", "OUT")),
        (["--ray", "s3://b/in", "s3://b/out"], ("", "s3://b/in", "s3://b/out")),
        (["--ray", "auto", "IN", "OUT"], ("auto", "IN", "OUT")),
        (["--ray", "10.0.0.1:6379", "IN", "-o", "OUT"], ("10.0.0.1:6379", "IN", "OUT")),
        (["--ray", "ray://head:10001", "IN", "OUT"], ("ray://head:10001", "IN", "OUT")),
        (["IN", "OUT", "--ray"], ("", "IN", "OUT")),
        (["--ray=local", "IN", "OUT"], ("local", "IN", "OUT")),
    ],
)
def test_the_address_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: tuple[str, ...]
) -> None:
    """Catches an input that is taken for an address, and an address for an input."""
    seen: list[Any] = []
    monkeypatch.setattr(embed_blocks, "run", seen.append)
    assert main(["embed", *arguments, "--model", "x"]) == 0
    assert (seen[0].ray, seen[0].input, seen[0].output) == expected


def test_without_ray(
    models: SimpleNamespace, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Catches an ImportError of Ray's that does not say what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "ray" else object())
    error = fails(capsys, "embed", str(text_file), str(tmp_path / "out"), "--ray", "--model", models.sentence)
    assert "--ray needs Ray: pip install 'fastbert-engine[ray]'" in error
