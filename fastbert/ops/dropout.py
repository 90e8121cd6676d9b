"""This module holds dropout. A mask is a function of a seed and a place, so all backends and both passes draw the same.

`fastbert_kernels.masks` defines this function. The seed of a batch comes from PyTorch's generator on the CPU, which
`torch.manual_seed` governs, and which activation checkpointing saves and restores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import recording, tracing
from fastbert.ops.packing import PackedBatch
from fastbert_kernels import masks
from fastbert_kernels.masks import Dropout, threshold_of

_WORD = 0xFFFFFFFF


def seed_of(batch: PackedBatch) -> int:
    """Returns the seed of the batch's masks. The first call draws it."""
    if recording.on and recording.is_dry():
        return 0
    seed: int = batch.plan("dropout seed", lambda: int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")))
    return seed


# A float is the probability of a dropout that PyTorch draws, in a program that is traced or transformed.
Drop = Dropout | float | None


def of_batch(p: float, batch: PackedBatch | None, site: int) -> Drop:
    """Returns the dropout of one site with probability p, or None if nothing is dropped.

    batch: the batch of the rows, or None if it is not known.
    """
    threshold = threshold_of(p)
    if not threshold:
        return None
    if batch is None or batch.valid is not None or torch.compiler.is_compiling() or tracing.transformed() is not None:
        return p
    return Dropout(threshold, seed_of(batch), site + masks.SITES_A_LAYER * batch.n_layers_before)


def probability_of(dropout: Drop) -> float:
    """Returns the probability with which elements are dropped, for any generator of the mask."""
    return dropout.threshold / masks.RANGE if isinstance(dropout, Dropout) else dropout or 0.0


def mask_of(dropout: Drop) -> Dropout | None:
    """Returns the dropout if its mask is drawn from a seed, or None."""
    return dropout if isinstance(dropout, Dropout) else None


def keep(rows: Tensor, n_columns: int, dropout: Dropout, num_heads: int | None = None, first: int = 0) -> Tensor:
    """Draws the mask, True where an element is kept, in plain PyTorch.

    rows: (...,) integers, the packed rows. Returns (..., n_columns) bool; with num_heads, for attention, rows are
    (B, S) and the result is (B, N, S, n_columns). first: the first of the columns, a multiple of 8.
    """
    n_groups = -(-n_columns // masks.GROUP)
    device = rows.device
    column = torch.arange(first // masks.GROUP, first // masks.GROUP + n_groups, dtype=torch.int64, device=device)
    row = rows.long()[..., None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    if num_heads is not None:
        row, head = row[:, None], torch.arange(num_heads, dtype=torch.int64, device=device)[:, None, None]
    site = torch.full((), dropout.site, dtype=torch.int64, device=device)
    words = _philox(list(torch.broadcast_tensors(column, row, head, site)), dropout.seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(halves, -1).flatten(-2)[..., :n_columns]
    return numbers >= dropout.threshold


def apply(x: Tensor, dropout: Drop) -> Tensor:
    """Sets elements of packed rows, (T, H), to zero and scales the others, in plain, differentiable PyTorch."""
    if dropout is None:
        return x
    if isinstance(dropout, float):
        return F.dropout(x, dropout)
    rows = torch.arange(x.shape[0], device=x.device)
    return x * (keep(rows, x.shape[1], dropout).to(x.dtype) * dropout.scale)


def _philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Computes Philox4x32 on 32-bit words, each stored in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(masks.N_ROUNDS):
        a, b = c0 * masks.MULTIPLIERS[0], c2 * masks.MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + masks.WEYL[0]) & _WORD, (k1 + masks.WEYL[1]) & _WORD
    return [c0, c1, c2, c3]
