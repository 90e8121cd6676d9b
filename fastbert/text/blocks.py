"""A long input is cut into blocks, and the output has a file for each: a run that was killed goes on with the others.

The cut depends on the input alone. A block's file appears under its name when it is whole, so that the files that are
there say which blocks are done, whoever made them: one process, or many machines. A manifest says of which input, model
and options they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.checks import check_text
from fastbert.text import storage
from fastbert.text.files import field_of

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; another number is another cut
BLOCK_ROWS = 16384  # of a Parquet file
BLOCK_BYTES = 2**20  # of a text file or JSON lines
INPUTS = (".parquet", ".jsonl", ".txt")
OUTPUTS = ("jsonl", "npy", "parquet")


@dataclass(frozen=True)
class Block:
    """A Block is a part of an input file.

    index: its place in the whole input. start, end: rows of a Parquet file; of other files bytes, and the lines that
    begin there belong to the block.
    """

    index: int
    path: str
    start: int
    end: int

    @property
    def is_parquet(self) -> bool:
        return is_parquet(self.path)


def is_parquet(path: str) -> bool:
    """Tells whether a file is read as Parquet: its name ends so."""
    return path.endswith(".parquet")


def plan(files: Sequence[str], block_rows: int = BLOCK_ROWS, block_bytes: int = BLOCK_BYTES) -> list[Block]:
    """Cuts files into blocks, in order. Raises ValueError for Parquet files beside others."""
    if len({is_parquet(path) for path in files}) > 1:
        raise ValueError("input: got Parquet files beside others, expected one kind")
    blocks: list[Block] = []
    for path in files:
        total, step = (_parquet_rows(path), block_rows) if is_parquet(path) else (storage.size_of(path), block_bytes)
        for start in range(0, total, step):
            blocks.append(Block(len(blocks), path, start, min(start + step, total)))
    return blocks


def read_table(block: Block) -> Any:
    """Returns the rows of a block of a Parquet file, as a pyarrow Table with all columns."""
    from pyarrow import parquet

    with storage.open_file(block.path) as source:
        file = parquet.ParquetFile(source)
        groups: list[int] = []
        first = before = 0
        for i in range(file.num_row_groups):
            n_rows = file.metadata.row_group(i).num_rows
            if before < block.end and before + n_rows > block.start:
                first = first if groups else before
                groups.append(i)
            before += n_rows
        return file.read_row_groups(groups).slice(block.start - first, block.end - block.start)


def texts_of_table(table: Any, column: str, path: str) -> list[str]:
    """Returns the texts of a column. Raises ValueError for a column that is not there, or holds something else."""
    if column not in table.column_names:
        raise ValueError(f"{path}: has no column {column!r}, but {', '.join(table.column_names)}")
    texts = table.column(column).to_pylist()
    for i, text in enumerate(texts):
        check_text(f"{path}, column {column!r}, row {i} of the block", text)
    return texts


def read_lines(block: Block, key: str | None) -> Iterator[str]:
    """Yields the lines that begin in a block, or with a key that field of the JSON object in each.

    Raises ValueError, with file and byte, as `fastbert.text.files.read_texts` does with file and line.
    """
    with storage.open_lines(block.path) as file:
        place = max(block.start - 1, 0)
        file.seek(place)
        if block.start:  # the rest of a line that began before, or the end of the last one
            place += len(file.readline())
        while place < block.end and (line := file.readline()):
            yield _text(line, place, block.path, key)
            place += len(line)


def _text(line: bytes, place: int, path: str, key: str | None) -> str:
    where = f"{path}, line at byte {place}"
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8" if place else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
    return text if key is None else field_of(text, key, where)


def model_fingerprint(folder: Path) -> str:
    """Returns a hash of the files of a model: settings, vocabulary and weights. It reads them all, about 1 GB/s."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        wanted = path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin")
        if not wanted or not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


@dataclass
class Parts:
    """Parts are the folder of an output with a file for each block.

    suffix: one of `OUTPUTS`. fingerprint: what the vectors depend on, by name, as JSON has it.
    """

    folder: str
    suffix: str
    n_blocks: int
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def begin(self, resume: bool) -> None:
        """Makes the folder and its manifest, or with `resume` goes on with those that are there.

        Raises ValueError for a folder that is in use, and where what the vectors depend on was another.
        """
        names = storage.names_in(self.folder)
        if MANIFEST not in names:
            if names:
                raise ValueError(f"output: the folder {self.folder!r} holds other files")
            storage.make_folder(self.folder)
            self._write({"complete": False})
            return
        before = self._read()
        if not resume:
            state = "a finished output" if before.get("complete") else "an unfinished one, which --resume continues"
            raise ValueError(f"output: the folder {self.folder!r} holds {state}")
        for name, value in {"format": FORMAT, "blocks": self.n_blocks, **self.fingerprint}.items():
            value = json.loads(json.dumps(value))
            if before.get(name) != value:
                raise ValueError(
                    f"--resume: {name} was {_short(before.get(name))} when {self.folder!r} was begun, and is "
                    f"{_short(value)} now: name another output, or remove that one"
                )

    def path(self, index: int) -> str:
        """Returns the path of a block's file."""
        return storage.join(self.folder, f"part-{index:06}.{self.suffix}")

    def done(self) -> set[int]:
        """Returns the indices of the blocks whose files are there."""
        pattern = re.compile(rf"part-(\d{{6,}})\.{self.suffix}")
        matches = (pattern.fullmatch(name) for name in storage.names_in(self.folder))
        return {int(match[1]) for match in matches if match}

    def finish(self) -> None:
        """Notes in the manifest that all files are there. Raises RuntimeError where one is not, with its number."""
        missing = sorted(set(range(self.n_blocks)) - self.done())
        if missing:
            raise RuntimeError(f"output: {len(missing)} of {self.n_blocks} blocks are not there: {_short(missing)}")
        self._write({"complete": True})

    def _write(self, state: dict[str, Any]) -> None:
        content = {"format": FORMAT, "blocks": self.n_blocks, **self.fingerprint, **state}
        with storage.writing(storage.join(self.folder, MANIFEST)) as file:
            file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def _read(self) -> dict[str, Any]:
        with storage.open_file(storage.join(self.folder, MANIFEST)) as file:
            return json.loads(file.read())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _parquet_rows(path: str) -> int:
    storage.need_pyarrow(path)
    from pyarrow import parquet

    with storage.open_file(path) as source:
        return parquet.ParquetFile(source).metadata.num_rows
