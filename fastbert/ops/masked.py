"""This module packs small batches on the device by a kernel. The host knows only B and S, not the lengths.

The tile of attention and the length of its lists follow from B and S. For other batches they depend on the lengths.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.dispatch import Policy
from fastbert.ops.packed_batch import PackedBatch

# The most elements of a mask of such a batch. Rows of padding are computed. This costs almost nothing while each linear
# has fewer tiles than the GPU has multiprocessors (counted in benchmarks/NOTES.md).
MOST_PLACES = 512
# The greatest length of short sequences, averaged over tokens: at least two fit into a tile of 128 rows.
SHORT_TEXTS = 64
# The most tokens of a short batch for each multiprocessor: 16 heads have no more tiles of 128 rows than there are
# multiprocessors.
SHORT_BATCH = 8


def batch_of(mask: Tensor, reads_columns: bool = False) -> PackedBatch:
    """Returns the batch of a mask, (B, S) on a device, with 1 to MOST_PLACES elements. The host does not read the mask.

    Its T is B * S. Its cu_seqlens and places are valid after a kernel has written them (`unpack`). It has no
    position_ids. reads_columns: whether layers read columns, as if the mask had holes.
    """
    batch_size, padded_length = mask.shape
    n_places, device = batch_size * padded_length, mask.device
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    elif mask.dtype not in (torch.int64, torch.uint8):
        mask = (mask != 0).view(torch.uint8)
    memory = torch.empty(batch_size + 1 + n_places, dtype=torch.int32, device=device)
    return PackedBatch.later(
        {},
        n_places,
        device,
        cu_seqlens=memory[: batch_size + 1],
        cu_seqlens_cpu=torch.empty(0, dtype=torch.int32, device="cpu"),  # nothing reads it
        batch_size=batch_size,
        padded_length=padded_length,
        last_position=padded_length - 1,  # an upper bound
        mask=mask.reshape(-1),
        places=memory[batch_size + 1 :],
        reads_columns=reads_columns,
    )


def unpack(
    batch: PackedBatch, ids: tuple[Tensor | None, ...], static: Any, number: int, block_q: int, short: tuple[int, int]
) -> None:
    """Packs a batch of `batch_of`. ids: three tensors of (B * S,), or None, as in `fastbert_kernels.unpack.unpack`."""
    from fastbert_kernels import unpack as kernels

    input_ids, token_type_ids, position_ids = (None if x is None else x.long().contiguous() for x in ids)
    mask, places = batch.mask, batch.places
    assert mask is not None and places is not None and input_ids is not None
    kernels.unpack(
        mask, batch.padded_length, input_ids, token_type_ids, position_ids, batch.cu_seqlens, places, seq_ids(batch),
        static, number, block_q, short,
    )  # fmt: skip


def seq_ids(batch: PackedBatch) -> Tensor:
    """Returns the sequence of each row, (B * S,) int32, undefined after the last token."""
    assert batch.places is not None
    rows: Tensor = batch.plan("seq_ids", functools.partial(torch.empty_like, batch.places))
    return rows


def pack(x: Tensor, batch: PackedBatch, fill: int) -> Tensor:
    """Packs (B, S, ...) -> (B * S, ...): the tokens' rows first, then rows of `fill`."""
    assert batch.places is not None
    flat, n_rows = x.reshape(-1, *x.shape[2:]), batch.n_tokens
    rows = torch.where(batch.places < 0, n_rows, batch.places).long()  # padding goes to an extra row, which is cut off
    out = flat.new_full((n_rows + 1, *flat.shape[1:]), fill)
    return out.index_copy_(0, rows, flat)[:n_rows]


def pad(x: Tensor, batch: PackedBatch) -> Tensor:
    """Pads rows, (B * S, ...) -> (B, S, ...), with zeros at the padding positions."""
    from fastbert_kernels.unpack import spread

    places, shape = batch.places, (batch.batch_size, batch.padded_length, *x.shape[1:])
    assert places is not None
    if x.dim() == 2 and x.is_floating_point() and x.stride(-1) == 1:
        return spread(x, places).view(shape)
    rows = x.index_select(0, places.clamp(min=0))
    empty = (places < 0).view(-1, *(1 for _ in x.shape[1:]))
    return rows.masked_fill(empty, 0).view(shape)


# The functions below give attention's tiles for such a batch.


def small_tiles_suit(batch_size: int, length: int, dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    """Tells whether smaller tiles suit every batch with a mask of this shape.

    If so, `attention_plan.takes_small_tiles` gives the same answer for each of these batches.
    """
    from fastbert_kernels import configs, launch

    if configs.small_attention_config(dtype, head_size, launch.arch(device)) is None:
        return False
    return length <= SHORT_TEXTS or batch_size * length <= SHORT_BATCH * launch.n_multiprocessors(device)


def most_tiles(
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    head_size: int,
    device: torch.device,
    policy: Policy,
    small: bool,
) -> tuple[int, int | None]:
    """Returns upper bounds of the numbers of tiles for a mask of this shape; None if short sequences have no list."""
    from fastbert_kernels import configs, launch, work_list

    arch = launch.arch(device)
    sizes = configs.attention_config(dtype, head_size, arch, small).block_sizes
    block_q = sizes["BLOCK_Q"]
    slices = batch_size * -(-length // block_q)
    if not policy.batch_invariant and not sizes.get("WARP_SPECIALIZE"):
        return min(slices, work_list.max_tiles(batch_size * length, block_q)), None
    short_q, longest = short_tile(dtype, head_size, device, policy)
    if not short_q:
        return slices, None
    return slices if length > longest else 0, batch_size * -(-min(length, longest) // short_q)


def short_tile(dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy) -> tuple[int, int]:
    """Returns the rows of a tile of short sequences, and their greatest length; zeros if they have no list."""
    from fastbert_kernels import configs, launch

    if not policy.batch_invariant:
        return 0, 0
    short = configs.short_attention_config(dtype, head_size, launch.arch(device))
    return (0, 0) if short is None else (short.block_sizes["BLOCK_Q"], short.block_sizes["BLOCK_K"])
