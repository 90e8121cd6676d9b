"""Batches, tables of distances and expected results for tests of disentangled attention."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert.ops import packing
from fastbert.ops.disentangled import Positions, rows_of_distances
from fastbert.ops.packing import PackedBatch
from fastbert.reference.deberta import disentangled_scores
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout
from helpers import cu_seqlens_of, guarded

HEADS = 2
BUCKETS = (16, 30)  # 8 distances on either side have a row each, and rows end at 30
# Neighbours that share a tile, an empty text, one token, texts beyond the farthest bucket, a tile and a task of C++.
LENGTHS = {"nothing": [0, 0], "short": [5, 1, 0, 9], "long": [70, 3, 41], "longest": [230]}
CASES = [("nothing", False), ("short", True), ("short", False), ("long", False), ("long", True), ("longest", False)]
TERMS = ("c2p p2c", "c2p", "p2c")
COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))


def make(
    case: str, holes: bool, device: torch.device, dtype: torch.dtype, terms: str = TERMS[0], head_size: int = 16
) -> tuple[PackedBatch, Tensor, Positions, float]:
    """(batch, qkv, positions, scale) of a case, on the device."""
    generator, lengths = torch.Generator().manual_seed(1), LENGTHS[case]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    qkv, width = randn(sum(lengths), 3 * HEADS * head_size), HEADS * head_size
    keys, queries = (guarded(randn(2 * BUCKETS[0], width)) if name in terms else None for name in ("c2p", "p2c"))
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    if holes:
        columns = [torch.randperm(2 * n + 1, generator=generator)[:n].sort().values for n in lengths]
        batch = replace(batch, columns=torch.cat(columns).int().to(device), padded_length=2 * max(lengths) + 1)
    return batch, qkv, Positions(keys, queries, BUCKETS), (3 * head_size) ** -0.5


def judged(
    batch: PackedBatch,
    qkv: Tensor,
    positions: Positions,
    scale: float,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> Tensor:
    """Attention by the reference's scores, a text at a time, in a dtype."""
    outs, offsets = [], batch.cu_seqlens_cpu.tolist()
    table, radius = torch.tensor(rows_of_distances(*BUCKETS)), len(rows_of_distances(*BUCKETS)) // 2
    tables = [
        None if t is None else t.cpu().to(dtype).unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in positions[:2]
    ]
    for start, end in itertools.pairwise(offsets):
        q, k, v = qkv[start:end].cpu().to(dtype).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)[:, None]
        columns = torch.arange(end - start) if batch.columns is None else batch.columns[start:end].cpu().long()
        rows = table[(columns[:, None] - columns).clamp(-radius, radius) + radius]
        scores = disentangled_scores(q, k, *tables, rows, terms=1)  # divided by the root of the head size
        scores = scores * (scale * q.shape[-1] ** 0.5)
        p = torch.softmax(scores, -1)
        if dropout is not None:
            kept = masks.keep(torch.arange(start, end)[None], end - start, dropout, HEADS)
            p = p * (kept.to(dtype) * dropout.scale)
        outs.append((p @ v)[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)
