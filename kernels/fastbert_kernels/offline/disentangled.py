"""This module lists what DeBERTa launches beside the other families' kernels, for the offline report.

The sizes are those of DeBERTa-v3-base: 12 heads of 64, and 512 rows of distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fastbert_kernels import disentangled
from fastbert_kernels.disentangled_backward import disentangled_attention_backward
from fastbert_kernels.disentangled_tiles import Distances
from fastbert_kernels.disentangled_training import disentangled_training_forward
from fastbert_kernels.masks import Dropout
from fastbert_kernels.offline.coverage import DTYPES, EIGHT_BIT, Case
from fastbert_kernels.work_list import N_COLUMNS, WorkList

HEAD_SIZES = (16, 32, 64, 80, 128)
DROPOUT = Dropout(6554, 1, 1)


def disentangled_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype: bf16 on every architecture, the others on two of them."""
    if dtype in EIGHT_BIT:
        return
    default = None if dtype == "bf16" else frozenset({80, 90}) if dtype in ("fp16", "fp32") else frozenset[int]()
    n_tokens, n_rows = 64, 512
    ids = torch.zeros(n_tokens, dtype=torch.int32)
    work_list = WorkList(torch.zeros((2, N_COLUMNS), dtype=torch.int32), ids)
    rows_of = torch.zeros(1025, dtype=torch.int32)
    for head_size in HEAD_SIZES:
        n_heads = 12 if head_size == 64 else 2
        qkv = torch.empty(n_tokens, 3 * n_heads * head_size, dtype=DTYPES[dtype])
        table = torch.empty(n_rows, n_heads * head_size, dtype=DTYPES[dtype])
        for keys, queries, columns in ((table, table, None), (table, table, ids), (table, None, None)):
            distances = Distances(keys, queries, rows_of, 0, n_rows, columns)
            name = "" if queries is not None else ", one term"
            name += "" if columns is None else ", holes"
            plain = columns is None and queries is not None
            some = default if plain or head_size == 64 else frozenset[int]()
            archs = some if head_size == 64 or dtype == "bf16" else frozenset[int]()
            # Products as in a graph, once: training has those of all rows.
            of_batch = distances._replace(needed=ids[:2]) if head_size == 64 and dtype == "bf16" else distances
            call = partial(disentangled.disentangled_attention_forward, qkv, work_list, n_heads, 0.1, of_batch)
            model = "base" if head_size == 64 else "extra"
            yield Case("disentangled", model, dtype, f"D{head_size}{name}", archs, call)
            for dropout in (DROPOUT, None):
                trained = archs if dropout is not None and queries is not None else frozenset[int]()
                variant = f"D{head_size} training{name}{'' if dropout else ', no dropout'}"
                train = partial(_training, qkv, work_list, n_heads, distances, dropout)
                yield Case("disentangled", model, dtype, variant, trained, train)


def _training(
    qkv: torch.Tensor, work_list: WorkList, n_heads: int, distances: Distances, dropout: Dropout | None
) -> None:
    out, lse = disentangled_training_forward(qkv, work_list, n_heads, 0.1, distances, dropout)
    runs_of, n_tokens = distances.rows_of, qkv.shape[0]
    disentangled_attention_backward(
        out, qkv, out, lse, work_list, n_heads, 0.1, distances, runs_of, n_tokens, dropout
    )  # fmt: skip
