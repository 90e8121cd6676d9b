"""This module encodes a long input block by block: each block is read, encoded and written, and may be repeated."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from fastbert.pipelines.pool import Pool
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text import blocks
from fastbert.text.blocks import Block, Parts
from fastbert.text.files import open_output, write_jsonl

logger = logging.getLogger("fastbert")

EMBEDDING = "embedding"  # the column of vectors
CUT = "encode: %d of %d texts were longer"  # begins the warning of a run


@dataclass(frozen=True)
class BulkJob:
    """A BulkJob describes the result of each block, and its place.

    key: the field of JSON lines or the column of a Parquet file with the texts, None for plain lines. prompt,
    prompt_name, normalize: as in `SentenceEncoder.encode_stream`.
    """

    parts: Parts
    key: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    normalize: bool = False


@dataclass
class Counts:
    """Counts has the numbers of texts, of truncated texts, and of the tokens that were cut off."""

    texts: int = 0
    truncated: int = 0
    truncated_tokens: int = 0

    def add(self, other: Counts) -> None:
        self.texts += other.texts
        self.truncated += other.truncated
        self.truncated_tokens += other.truncated_tokens

    def warn(self, limit: int | None) -> None:
        """Logs one warning for all blocks, if a text was truncated. limit: max_seq_length, None if unknown."""
        if self.truncated:
            logger.warning(
                "embed: %d of %d texts were longer than max_seq_length%s and truncated: %d tokens cut",
                self.truncated, self.texts, "" if limit is None else f" = {limit}", self.truncated_tokens,
            )  # fmt: skip


class BlockEncoder:
    """A BlockEncoder makes the file of a block. A second run is harmless: its file replaces the first."""

    def __init__(self, encoder: SentenceEncoder, job: BulkJob, pool: Pool | None = None) -> None:
        self.encoder, self.job, self.pool = encoder, job, pool

    def __call__(self, block: Block, progress: Callable[[int], Any] | None = None) -> Counts:
        """Reads, encodes and writes a block. Errors name the file and the place in it."""
        job, table = self.job, None
        if block.is_parquet:
            table = blocks.read_table(block)
            texts = blocks.texts_of_table(table, job.key or "text", block.path)
        else:
            texts = list(blocks.read_lines(block, job.key))
        counts = Counts(len(texts))
        with _counting(counts):
            windows = list(
                self.encoder.encode_stream(
                    texts, prompt_name=job.prompt_name, prompt=job.prompt, normalize_embeddings=job.normalize,
                    progress=progress, pool=self.pool,
                )
            )  # fmt: skip
        dimension = self.encoder.get_embedding_dimension()
        vectors = np.concatenate(windows) if windows else np.zeros((0, dimension), np.float32)
        with blocks.storage.writing(job.parts.path(block.index)) as file:
            write(file, job.parts.suffix, texts, vectors.astype(np.float32, copy=False), table)
        return counts


def write(file: BinaryIO, suffix: str, texts: Sequence[str], vectors: np.ndarray, table: Any) -> None:
    """Writes texts and their (n, dim) float32 vectors. A table keeps its columns and gets one more."""
    if suffix == "npy":
        np.save(file, vectors)
    elif suffix == "jsonl":
        text_file = io.TextIOWrapper(file, encoding="utf-8", newline="")
        write_jsonl(text_file.write, texts, vectors)
        text_file.flush()
        text_file.detach()
    else:
        import pyarrow
        from pyarrow import parquet

        if table is None:
            table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        if EMBEDDING in table.column_names:
            raise ValueError(f"input: has a column {EMBEDDING!r} already")
        flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        parquet.write_table(table.append_column(EMBEDDING, column), file)


def encode_blocks(encode: BlockEncoder, todo: Sequence[Block], progress: Callable[[int], Any] | None = None) -> Counts:
    """Makes the files of blocks one after the other."""
    counts = Counts()
    for block in todo:
        counts.add(encode(block, progress))
    return counts


def join_parts(parts: Parts, output: str, dimension: int) -> None:
    """Joins the files of all blocks into one file, as `fastbert.text.files.open_output` writes it, and removes them."""
    paths = [parts.path(i) for i in range(parts.n_blocks)]
    if parts.suffix == "npy":
        with open_output(output, dimension) as write_rows:
            for path in paths:
                vectors = np.load(path, mmap_mode="r") if os.path.getsize(path) > 2**20 else np.load(path)
                write_rows([""] * len(vectors), vectors)
    else:
        with blocks.storage.writing(output) as file:
            for path in paths:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, file)
    shutil.rmtree(parts.folder)


@contextmanager
def _counting(counts: Counts) -> Iterator[None]:
    """Counts truncated texts instead of a warning for each block."""

    def is_other(record: logging.LogRecord) -> bool:
        args = record.args
        if not record.msg.startswith(CUT) or not isinstance(args, tuple):
            return True
        counts.truncated, counts.truncated_tokens = int(str(args[0])), int(str(args[3]))
        return False

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
