"""This module chooses the kernel of 16-bit linears for few rows, up to FEW, outside of batch-invariant mode.

A GPU has some 132 multiprocessors, and 128 rows of a linear with 3,072 columns are 24 tiles of 128 x 128. Smaller
tiles, or a K that is split among programs, use more multiprocessors. The host knows the number of rows, and rounds it
up to one of BUCKETS, so that a few kernels serve all lengths.

A table's entry in `few_rows`, by shape, epilogue and bucket, has priority. Otherwise there is a heuristic for the
architecture whose clocks were counted (`benchmarks/gemm_clocks.py`). It selects from TILES the tile with the most
programs, if there are no more programs than multiprocessors. Below this count a smaller tile is faster because it reads
less. Above it a second round of programs, or the L2 cache, takes longer than the larger tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastbert_kernels import configs, launch, tables

FEW = 512
BUCKETS = (64, 128, 256, 512)
COUNTED_ARCH, MULTIPROCESSORS = 90, 132
TILES: tuple[dict[str, int], ...] = tuple(
    {"BLOCK_ROWS": rows, "BLOCK_COLS": cols, "BLOCK_K": 64, "GROUP_ROWS": 8, "num_warps": warps, "num_stages": stages}
    for rows, cols, warps, stages in ((64, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3))
)


def key_of(dtype: torch.dtype, shape: tuple[int, int], epilogue: str, bucket: int) -> str:
    """Returns the key of one linear in a table, such as "float16/768x3072/gelu/128". shape: (K, M)."""
    return f"{configs.gemm_key(dtype, shape, epilogue)}/{bucket}"


def bucket_of(n_rows: int) -> int | None:
    """Returns the bucket of a number of rows, or None for more than FEW."""
    return next((bucket for bucket in BUCKETS if n_rows <= bucket), None)


def tile(dtype: torch.dtype, arch: int, shape: tuple[int, int], epilogue: str, n_rows: int) -> dict[str, int] | None:
    """Returns the tile of the pointer kernel for n_rows rows, or None if the tile for any number of rows is used."""
    bucket = bucket_of(n_rows)
    if bucket is None or dtype == torch.float32 or epilogue == "pre":
        return None
    return _tile(dtype, arch, shape, epilogue, bucket, launch.recorded is not None, tables.generation)


@functools.cache
def _tile(
    dtype: torch.dtype,
    arch: int,
    shape: tuple[int, int],
    epilogue: str,
    bucket: int,
    shipped_only: bool,
    generation: int,
) -> dict[str, int] | None:
    entry = tables.find("few_rows", (key_of(dtype, shape, epilogue, bucket),), arch, shipped_only)
    if entry is not None and entry[0]["kernel"] == "linear":
        return {name: size for name, size in entry[0].items() if name != "kernel"}
    return heuristic_tile(shape[1], bucket) if arch == COUNTED_ARCH else None


def heuristic_tile(n_cols: int, n_rows: int) -> dict[str, int] | None:
    """Returns the tile of TILES with the most programs of at most MULTIPROCESSORS, or None if each has more."""
    for sizes in TILES:
        n_programs = launch.cdiv(n_rows, sizes["BLOCK_ROWS"]) * launch.cdiv(n_cols, sizes["BLOCK_COLS"])
        if n_programs <= MULTIPROCESSORS:
            return sizes
    return None


@dataclass(frozen=True, eq=False)
class Split:
    """A `Split` holds the tile of a linear before LayerNorm, and the number of programs that share each tile's K."""

    tile: dict[str, int]
    splits: int


def split(dtype: torch.dtype, arch: int, shape: tuple[int, int], n_rows: int) -> Split | None:
    """Returns the split of a linear before LayerNorm for n_rows rows, or None if no table has one."""
    bucket = bucket_of(n_rows)
    if bucket is None or dtype == torch.float32:
        return None
    return _split(dtype, arch, shape, bucket, launch.recorded is not None, tables.generation)


def splits(dtype: torch.dtype, arch: int, shape: tuple[int, int]) -> bool:
    """Tells whether a table splits the linear for some number of rows."""
    return any(split(dtype, arch, shape, bucket) is not None for bucket in BUCKETS)


@functools.cache
def _split(
    dtype: torch.dtype, arch: int, shape: tuple[int, int], bucket: int, shipped_only: bool, generation: int
) -> Split | None:
    entry = tables.find("few_rows", (key_of(dtype, shape, "residual", bucket),), arch, shipped_only)
    if entry is None or entry[0]["kernel"] != "split_linear":
        return None
    return split_of(entry[0])


def split_of(entry: dict[str, int]) -> Split:
    """Converts an entry with SPLITS, from tables or candidates of `fastbert tune`, to a `Split`."""
    return Split({name: size for name, size in entry.items() if name not in ("kernel", "SPLITS")}, entry["SPLITS"])
