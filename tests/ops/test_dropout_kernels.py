"""Masks that Triton kernels draw are those of `fastbert.ops.dropout.keep`."""

from __future__ import annotations

import pytest
import torch

from dropout_kernel import draw
from fastbert.ops.dropout import keep
from fastbert_kernels.masks import EMBEDDINGS, RANGE, Dropout, threshold_of
from helpers import guarded

DROPOUTS = {
    "one in ten": Dropout(threshold_of(0.1), 0x0123456789ABCDEF, 5),
    "large words": Dropout(40_000, (1 << 63) - 1, EMBEDDINGS),
    "negative low word": Dropout(1, 0xFFFFFFFF, 0),
    "nothing": Dropout(0, 7, 4),
    "everything": Dropout(RANGE, 7, 4),
}


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize(("block_rows", "block_columns"), [(1, 64), (16, 8), (4, 32)])
def test_masks_do_not_depend_on_tiles(name, block_rows, block_columns, device):
    """Catches a mask that is not `keep`'s, for any shape of a tile and however its numbers are drawn."""
    n_rows, n_columns, dropout = 37, 83, DROPOUTS[name]
    expected = keep(torch.arange(n_rows, device=device), n_columns, dropout)
    for by_bits in (False, True):
        out = guarded(torch.full((n_rows, n_columns), 2, dtype=torch.int32, device=device), extra_columns=3)
        draw(out, dropout, 0, by_bits, block_rows, block_columns)
        assert torch.equal(out, expected.int()), by_bits


def test_heads_and_late_rows(device):
    """Catches a head or a high row that does not reach the counter."""
    dropout, first_row = DROPOUTS["one in ten"], 1 << 20
    rows = torch.arange(first_row, first_row + 8, device=device)
    expected = keep(rows[None], 64, dropout, num_heads=3)[0]
    for head in range(3):
        out = torch.full((8, 64), 2, dtype=torch.int32, device=device)
        draw(out, dropout, head, False, 8, 64, first_row)
        assert torch.equal(out, expected[head].int())
