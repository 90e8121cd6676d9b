"""A long input is cut into blocks, and each block gets its own output file, so that a killed run can be resumed.

The cut depends only on the input. A block's file appears under its name when it is complete. So the existing files show
which blocks are done, whether one process or many machines made them. A manifest records the input, the model and the
options.
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
FORMAT = 1  # of the manifest; a different number means a different cut
BLOCK_ROWS = 16384  # rows of a Parquet file in a block
BLOCK_BYTES = 2**20  # bytes of a text file or JSON lines file in a block
INPUTS = (".parquet", ".jsonl", ".txt")
OUTPUTS = ("jsonl", "npy", "parquet")


@dataclass(frozen=True)
class Block:
    """A Block is a part of an input file.

    index: its place in the whole input. start, end: rows of a Parquet file; for other files bytes. In these, the block
    contains the lines that begin in this range.
    """

    index: int
    path: str
    start: int
    end: int

    @property
    def is_parquet(self) -> bool:
        return is_parquet(self.path)


def is_parquet(path: str) -> bool:
    """Tells whether a file is read as Parquet, by the end of its name."""
    return path.endswith(".parquet")


def plan(files: Sequence[str], block_rows: int = BLOCK_ROWS, block_bytes: int = BLOCK_BYTES) -> list[Block]:
    """Cuts files into blocks, in order. Raises ValueError if Parquet files are mixed with other files."""
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
    """Returns the texts of a column.

    Raises ValueError for a missing column, and for one with other values than texts.
    """
    if column not in table.column_names:
        raise ValueError(f"{path}: has no column {column!r}, but {', '.join(table.column_names)}")
    texts = table.column(column).to_pylist()
    for i, text in enumerate(texts):
        check_text(f"{path}, column {column!r}, row {i} of the block", text)
    return texts


def read_lines(block: Block, key: str | None) -> Iterator[str]:
    """Yields the lines that begin in a block; with a key, the field of that name from the JSON object in each line.

    Raises ValueError, with file and byte, in the cases in which `fastbert.text.files.read_texts` raises it.
    """
    with storage.open_lines(block.path) as file:
        place = max(block.start - 1, 0)
        file.seek(place)
        if block.start:  # skip the rest of a line that began before the block, or the end of the last line
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
    """Returns a hash of the files of a model: settings, vocabulary and weights. It reads them all, at about 1 GB/s."""
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
    """A `Parts` is the output folder with a file for each block.

    suffix: one of `OUTPUTS`. fingerprint: everything that the vectors depend on, by name, as JSON values.
    """

    folder: str
    suffix: str
    n_blocks: int
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def begin(self, resume: bool) -> None:
        """Makes the folder and its manifest, or with `resume` continues with the existing ones.

        Raises ValueError for a folder that is in use, and for a manifest with a different fingerprint.
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
        """Returns the indices of the blocks whose files exist."""
        pattern = re.compile(rf"part-(\d{{6,}})\.{self.suffix}")
        matches = (pattern.fullmatch(name) for name in storage.names_in(self.folder))
        return {int(match[1]) for match in matches if match}

    def finish(self) -> None:
        """Marks the output as complete in the manifest. Raises RuntimeError, with the numbers, if files are missing."""
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
