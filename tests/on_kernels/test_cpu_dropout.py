"""The C++ kernels draw the dropout masks that fastbert.ops.dropout.keep draws, in each instruction set."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import dropout as plain
from fastbert_kernels import cpu
from fastbert_kernels.masks import EMBEDDINGS, Dropout

SEEDS = [0, 1, (1 << 62) - 1, 0x1234_5678_9ABC_DEF0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_columns", [1, 7, 8, 63, 64, 65, 400])
def test_masks_of_rows(n_columns, seed, variant):
    """Catches groups out of order, a wrong half of a word, a key or counter cut to 32 bits wrongly, or a lost tail."""
    dropout = Dropout(20000, seed, 4097)
    ours = cpu.dropout_mask(12345, 9, n_columns, dropout)
    assert torch.equal(ours[0], plain.keep(torch.arange(12345, 12354), n_columns, dropout))


@pytest.mark.parametrize("threshold", [0, 1, 32767, 32768, 32769, 65535, 65536])
def test_masks_of_any_threshold(threshold, variant):
    """Catches numbers that are compared as signed ones, or a threshold of all or none that wraps around."""
    dropout = Dropout(threshold, 77, EMBEDDINGS)
    ours = cpu.dropout_mask(0, 300, 1000, dropout)
    assert torch.equal(ours[0], plain.keep(torch.arange(300), 1000, dropout))


def test_masks_of_heads(variant):
    """Catches a head that counts as a row, or the same mask for every head."""
    dropout = Dropout(6554, 5, 8)
    ours = cpu.dropout_mask(3, 40, 90, dropout, num_heads=5)
    assert torch.equal(ours, plain.keep(torch.arange(3, 43)[None], 90, dropout, num_heads=5)[0])
