"""A corpus is the matrix to search: floats, or the result of `quantize_embeddings`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.checks import one_of
from fastbert.vectors.quantize import PRECISIONS, steps_of

BINARY = ("binary", "ubinary")


class Corpus:
    """A `Corpus` returns the numbers of (N, dim) rows, which may be quantised.

    `chunk` gives them in float32 on the device, `rows` in float64 on the host.
    """

    def __init__(self, matrix: Any, precision: str, width: int, ranges: Any, device: torch.device) -> None:
        self.matrix, self.precision, self.width, self.device = matrix, precision, width, device
        self.n = len(matrix)
        self.start: np.ndarray | None = None
        if ranges is not None:
            start, step = steps_of(ranges, width)
            empty = np.asarray(ranges)[0] == np.asarray(ranges)[1]
            # A level stands for the middle of its step, in float64. Where all vectors had one value there is no step.
            self.step = np.where(empty, 0.0, step.astype(np.float64))
            self.start = start.astype(np.float64) + self.step / 2

    def chunk(self, first: int, last: int) -> Tensor:
        """Returns the numbers of rows from first to last: (n, dim) float32, on the device."""
        part = self.matrix[first:last]
        part = part if isinstance(part, Tensor) else _tensor(part)
        part = part.to(self.device)
        if self.precision == "float32":
            return part.float()
        levels = part.to(torch.int16) + (128 if part.dtype == torch.int8 and self._has_offset else 0)
        if self.precision in BINARY:
            shifts = torch.arange(7, -1, -1, device=part.device)
            bits = (levels[:, :, None] >> shifts) & 1  # (n, bytes, 8), the first dimension in the highest bit
            return bits.flatten(1)[:, : self.width].float() * 2 - 1
        if self.start is None:
            return levels.float()
        step, start = (torch.from_numpy(x.astype(np.float32)).to(self.device) for x in (self.step, self.start))
        return levels.float() * step + start

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Returns the numbers of the rows of these ids: (m, dim) float64, on the host."""
        if isinstance(self.matrix, Tensor):
            part = self.matrix[torch.from_numpy(ids).to(self.matrix.device)].cpu()
            rows = part.double().numpy() if part.is_floating_point() else part.numpy()
        else:
            rows = np.asarray(self.matrix[ids])
        return np.ascontiguousarray(rows if self.precision == "float32" else self._numbers(rows), np.float64)

    def queries(self, queries: np.ndarray) -> np.ndarray:
        """Returns (Q, dim) numbers to compare rows with. Floats become signs where rows are signs."""
        if queries.dtype.kind != "f":
            return self._numbers(queries)
        return np.where(queries > 0, 1.0, -1.0) if self.precision in BINARY else queries

    @property
    def _has_offset(self) -> bool:
        """Tells whether an int8 value is a level minus 128; without ranges it is a plain number."""
        return self.precision == "binary" or self.start is not None

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        levels = rows.astype(np.int64) + (128 if rows.dtype == np.int8 and self._has_offset else 0)
        if self.precision in BINARY:
            return signs(levels.astype(np.uint8), self.width)
        return levels.astype(np.float64) if self.start is None else levels * self.step + self.start


def signs(packed: np.ndarray, width: int) -> np.ndarray:
    """Unpacks signs: (n, bytes) uint8 -> (n, width) of -1 and 1."""
    return np.unpackbits(packed, axis=-1)[..., :width] * 2.0 - 1.0


def corpus_of(
    matrix: Any, queries: np.ndarray, width: int, precision: str | None, ranges: Any, device: torch.device
) -> Corpus:
    """Returns a Corpus of the matrix, after a check against the queries. width: the width of the queries."""
    if isinstance(matrix, (list, tuple)):
        matrix = torch.stack(list(matrix)) if matrix and isinstance(matrix[0], Tensor) else np.asarray(matrix)
    if len(matrix) == 0:
        return Corpus(np.zeros((0, width), np.float32), "float32", width, None, device)
    if not hasattr(matrix, "dtype") or len(matrix.shape) != 2:
        shape = tuple(getattr(matrix, "shape", ()))
        raise ValueError(f"corpus_embeddings: expected shape (N, dim), got {type(matrix).__name__} of {shape}")
    dtype, columns = getattr(matrix.dtype, "name", str(matrix.dtype)).removeprefix("torch."), matrix.shape[1]
    floats = queries.dtype.kind == "f"
    if precision is None:
        is_float = dtype.startswith(("float", "bfloat"))
        precision = "float32" if is_float else _guessed_precision(dtype, columns, width, floats)
    one_of("corpus_precision", precision, *PRECISIONS)
    expected = {"int8": ("int8",), "uint8": ("uint8",), "binary": ("int8",), "ubinary": ("uint8",)}
    dtypes = expected.get(precision, ("float16", "bfloat16", "float32", "float64"))
    if dtype not in dtypes:
        raise TypeError(f"corpus_embeddings: got {dtype} for precision {precision!r}, expected {' or '.join(dtypes)}")
    if not floats and queries.dtype != np.dtype(dtypes[0] if precision in expected else np.float32):
        raise TypeError(f"query_embeddings: got {queries.dtype} for a corpus of precision {precision!r}")
    bits = precision in BINARY
    if columns != ((width + 7) // 8 if bits and floats else width) and len(queries):
        size = f"{columns} bytes of signs" if bits else f"{columns} columns"
        raise ValueError(f"query_embeddings: got {width} columns for a corpus of {size}")
    if precision in ("int8", "uint8") and floats and ranges is None:
        raise ValueError(f"ranges: needed for float queries in a corpus of precision {precision!r}, (2, {width})")
    if ranges is not None and precision not in ("int8", "uint8"):
        raise ValueError(f"ranges: not for a corpus of precision {precision!r}")
    return Corpus(matrix, precision, columns * 8 if bits and not floats else width, ranges, device)


def _guessed_precision(dtype: str, columns: int, width: int, floats: bool) -> str:
    """Returns the precision of a corpus of bytes, which follows from the width of float queries."""
    if dtype not in ("int8", "uint8"):
        raise TypeError(f"corpus_embeddings: got {dtype}, expected floats, or int8 or uint8 of a quantisation")
    if not floats or (columns == width and columns == (width + 7) // 8):
        raise ValueError("corpus_precision: needed where queries are no floats or have one dimension")
    if columns == width:
        return dtype
    return "binary" if dtype == "int8" else "ubinary"


def _tensor(part: np.ndarray) -> Tensor:
    """Returns a view if possible. A memory-mapped array may be read-only, and a tensor cannot be."""
    usable = part.flags.writeable and part.flags.c_contiguous and part.dtype.isnative
    return torch.from_numpy(part if usable else np.array(part, dtype=part.dtype.newbyteorder("="), order="C"))
