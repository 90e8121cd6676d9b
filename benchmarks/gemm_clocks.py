"""The script counts the clocks of a linear on an H100 or H200, by tile. The result is a lower bound, not a measurement.

    python benchmarks/gemm_clocks.py                          up + GELU of BERT-base on 16,384 rows
    python benchmarks/gemm_clocks.py --rows 128 --l2 8448     few rows, with twice the rate of the L2 cache
    python benchmarks/gemm_clocks.py --m 2304 --epilogue gated    up and gate of ModernBERT-base

For each step of K, a tile takes clocks of the tensor cores, of shared memory (written by copies, read by wgmma) and of
the L2 cache. Then it takes the instructions of its epilogue. All that can overlap is assumed to overlap fully. Two
numbers are unknown and assumed: the rate of the L2 cache for all multiprocessors together, and the latency of the first
step. So a choice is clear only if it holds for both rates.

Source of rates: NVIDIA, "H100 Tensor Core GPU Architecture", 2022: 132 multiprocessors, each with 2,048 multiply-adds
of bf16, 128 bytes of shared memory and 64 of the L2 cache a clock.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

MULTIPROCESSORS, CLOCKS_A_US = 132, 1755
MULTIPLY_ADDS, SHARED_BYTES, L2_BYTES = 2048, 128, 64  # a clock and multiprocessor, of bf16
L2_LOW, L2_HIGH = 4000, 8448  # bytes a clock for all together: 7 TB/s, and the most that the multiprocessors can take
LATENCY = 1000  # clocks from the start of a program to its first product
# Epilogue instructions for each column of the product, for 32 lanes of 4 schedulers. GELU in 16 bits compiles to 961 a
# warp of 64 columns; a gate with GELU to 997 of 128 columns, which are 64 outputs.
INSTRUCTIONS = {"gelu": 15.0, "gated": 8.0, "none": 4.0}


@dataclass(frozen=True)
class Tile:
    """A Tile is the tile of a linear, and the way its programs run.

    programs: on a multiprocessor at a time. splits: shares of K. prefetches: whether the next tile's first steps are
    loaded during the epilogue.
    """

    name: str
    rows: int
    cols: int
    depth: int = 64
    programs: int = 1
    splits: int = 1
    prefetches: bool = False


LARGE = (
    Tile("128x128 persistent", 128, 128, prefetches=True),
    Tile("128x128 pointers, 2 a multiprocessor", 128, 128, programs=2),
    Tile("128x128 persistent, 2 a multiprocessor", 128, 128, programs=2, prefetches=True),
    Tile("128x256 persistent", 128, 256, prefetches=True),
)
FEW = (
    Tile("128x128 persistent", 128, 128, prefetches=True),
    Tile("128x256 persistent", 128, 256, prefetches=True),
    Tile("64x128", 64, 128), Tile("64x64", 64, 64, programs=2), Tile("64x32", 64, 32, programs=4),
    Tile("128x64", 128, 64), Tile("64x64, K in 2", 64, 64, programs=2, splits=2),
    Tile("64x64, K in 4", 64, 64, programs=2, splits=4), Tile("64x64, K in 8", 64, 64, programs=2, splits=8),
)  # fmt: skip


def clocks(tile: Tile, n_rows: int, k: int, m: int, epilogue: str, l2_rate: float) -> float:
    """Returns the least clocks for x (n_rows, k) times a weight (m, k)."""
    n_programs = math.ceil(n_rows / tile.rows) * math.ceil(m / tile.cols) * tile.splits
    busy = min(n_programs, MULTIPROCESSORS)
    each = min(tile.programs, math.ceil(n_programs / MULTIPROCESSORS))  # programs side by side on a multiprocessor
    waves = math.ceil(n_programs / (MULTIPROCESSORS * each))
    steps = math.ceil(k / (tile.depth * tile.splits))
    loaded = 2 * (tile.rows + tile.cols) * tile.depth
    read = 2 * math.ceil(tile.rows / 64) * (64 + tile.cols) * tile.depth
    products = steps * max(tile.rows, 64) * tile.cols * tile.depth / MULTIPLY_ADDS
    shared = steps * (loaded + read) / SHARED_BYTES
    l2 = steps * loaded / min(L2_BYTES, l2_rate / busy)
    finish = tile.rows * tile.cols * INSTRUCTIONS[epilogue if tile.splits == 1 else "none"] / 128
    if tile.prefetches and each == 1:
        wave = max(l2, max(products, shared) + finish)
    else:
        wave = max(each * max(products, shared, l2), max(products, shared, l2) + finish)
    hidden = tile.prefetches or each > 1
    return waves * wave + LATENCY * (1 if hidden else waves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--k", type=int, default=768)
    parser.add_argument("--m", type=int, default=3072)
    parser.add_argument("--epilogue", choices=INSTRUCTIONS, default="gelu")
    parser.add_argument("--l2", type=float, nargs="+", default=[L2_LOW, L2_HIGH], help="bytes a clock")
    args = parser.parse_args()
    flops = 2.0 * args.rows * args.k * args.m
    print(f"{args.rows} x {args.k} x {args.m} {args.epilogue}: us (TFLOP/s) at least, by bytes a clock of the L2 cache")
    for tile in LARGE if args.rows > 512 else FEW:
        cells = []
        for rate in args.l2:
            us = clocks(tile, args.rows, args.k, args.m, args.epilogue, rate) / CLOCKS_A_US
            cells.append(f"{us:8.2f} ({flops / us / 1e6:4.0f})")
        print(f"  {tile.name:42}" + "".join(cells))


if __name__ == "__main__":
    main()
