"""This module lists the kernels that pack small batches on the device, for the offline report."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fastbert_kernels import unpack
from fastbert_kernels.offline.coverage import DTYPES, Case
from fastbert_kernels.work_list import N_COLUMNS

N_SEQUENCES, LENGTH, N_ROWS = 16, 32, 512


def unpacking_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype; the kernels that pack are the same for all, and stand under bf16."""
    if dtype not in DTYPES or dtype == "tf32":
        return
    places = torch.zeros(N_SEQUENCES * LENGTH, dtype=torch.int32)
    for n_cols in (768, 9, 1):  # hidden states, and logits of a few classes
        archs = None if dtype == "bf16" and n_cols == 768 else frozenset({80, 90} if n_cols != 1 else ())
        rows = torch.empty(N_ROWS, n_cols, dtype=DTYPES[dtype])
        yield Case("unpack", "base", dtype, f"spread {n_cols} columns", archs, partial(unpack.spread, rows, places))
    if dtype != "bf16":
        return
    for mask_dtype in (torch.int64, torch.uint8):
        for name, shared, short, holes in (
            ("shared tiles", True, (0, 0), False), ("shared tiles, columns", True, (0, 0), True),
            ("tiles of their own", False, (16, 64), False), ("tiles of their own, columns", False, (16, 64), True),
        ):  # fmt: skip
            words, ids = torch.zeros(3 * N_ROWS + 2, dtype=torch.int64), torch.zeros(len(places), dtype=torch.int64)
            integers, tiles = torch.zeros(N_ROWS + 1, dtype=torch.int32), torch.zeros(24, N_COLUMNS, dtype=torch.int32)
            columns = integers if holes else None
            static = unpack.Static(
                words,
                integers,
                tiles,
                integers if shared else integers[:0],
                tiles if short[0] else None,
                columns,
                columns,
            )
            mask = torch.zeros(len(places), dtype=mask_dtype)
            call = partial(
                unpack.unpack, mask, LENGTH, ids, None, None, integers, places, integers, static, 1, 64, short
            )
            yield Case("unpack", "base", dtype, f"{name}, {mask_dtype} mask", None, call)
