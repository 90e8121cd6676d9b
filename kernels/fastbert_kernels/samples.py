"""This kernel compares numbers at any addresses of a GPU's memory with their earlier values.

addresses: (n,) int64, of numbers of the same size; before: (n,), their earlier values, as integers of that size. If one
differs, the kernel writes the number of the batch to the upper 32 bits of the fourth word of the notes
(`embedding.Notes`). The host reads the word without waiting when it runs the next batch. Bytes moved: 2 n numbers and
their addresses, some 60 KB for BERT-base.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.embedding import Notes
from fastbert_kernels.jit import jit

BLOCK = 128
CHANGED = 3  # the word of the notes


@jit(do_not_specialize=["number", "n_numbers"])
def _compare_samples_kernel(
    addresses_ptr,  # (n,)
    before_ptr,  # (n,) integers of 1, 2, 4 or 8 bytes
    word_ptr,  # (1,)
    batch_ptr,  # (2,)
    number,
    n_numbers,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_numbers
    addresses = tl.load(addresses_ptr + offs, mask=mask, other=0)
    before = tl.load(before_ptr + offs, mask=mask, other=0)
    now = tl.load(addresses.to(before_ptr.dtype), mask=mask, other=0)
    batch = tl.load(batch_ptr) + number
    tl.store(word_ptr + tl.zeros_like(addresses), (batch << 32) + tl.zeros_like(addresses), mask=mask & (now != before))


def compare_samples(addresses: torch.Tensor, before: torch.Tensor, notes: Notes) -> None:
    """Records in `notes` if a number at these addresses, (n,) int64, differs from `before`, (n,) integers."""
    # Grid: one program per BLOCK numbers.
    launch.run(
        _compare_samples_kernel,
        (launch.cdiv(addresses.shape[0], BLOCK),),
        {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 1},
        addresses_ptr=addresses,
        before_ptr=before,
        word_ptr=notes.words[CHANGED:],
        batch_ptr=notes.batch,
        number=notes.number,
        n_numbers=addresses.shape[0],
    )
