"""This module lays out the integers of attention in static memory, and selects the kind of lists for a batch."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from fastbert.ops import masked
from fastbert.ops.attention_plan import Plan, cuttings, host_work_lists, suitable_tiles, tile_sizes
from fastbert.ops.dispatch import Policy
from fastbert.ops.masked import SHORT_BATCH
from fastbert.ops.packing import PackedBatch
from fastbert_kernels import cpu


class Kind(NamedTuple):
    """A `Kind` of static lists serves a kind of batch.

    small: the lists have smaller tiles. dense: the lists have room for three tiles in the rows of two full ones, and
    not for the greatest possible number, so that few programs of a CUDA graph are idle. holes: the column and the
    sequence of each row are included, for layers that read them if masks have holes.
    """

    small: bool = False
    dense: bool = False
    holes: bool = False


ANY_BATCH, HOLES = Kind(), Kind(holes=True)


def max_tiles(
    n_tokens: int,
    qkv_dtype: torch.dtype,
    head_size: int,
    device: torch.device,
    policy: Policy,
    kind: Kind = ANY_BATCH,
) -> tuple[int, int | None]:
    """Returns the lengths of static work lists for n_tokens tokens; None without a list of short sequences.

    If neighbours share tiles, no batch needs a longer list, unless the list is dense. If they do not share tiles,
    batches of very short sequences may need a longer one.
    """
    from fastbert_kernels import configs, launch, work_list

    arch = launch.arch(device)
    block_q = configs.attention_config(qkv_dtype, head_size, arch, kind.small).block_sizes["BLOCK_Q"]
    most = _dense_room(n_tokens, block_q) if kind.dense else work_list.max_tiles(n_tokens, block_q)
    short = configs.short_attention_config(qkv_dtype, head_size, arch) if policy.batch_invariant else None
    return most, None if short is None else work_list.max_short_tiles(n_tokens)


class StaticPlan:
    """A `StaticPlan` is the layout of attention's integers in static memory, for batches in the rows of a bucket.

    They are int32, each part 16-byte aligned. A smaller bucket needs no more of them than a larger one of its kind. If
    all are 0, there are no tiles. n_tiles: the length of the lists, by default that of `max_tiles`.
    """

    def __init__(
        self,
        bucket: int,
        qkv_dtype: torch.dtype,
        head_size: int,
        device: torch.device,
        policy: Policy,
        kind: Kind = ANY_BATCH,
        n_tiles: tuple[int, int | None] | None = None,
    ) -> None:
        from fastbert_kernels.work_list import N_COLUMNS

        cut = cuttings(qkv_dtype, head_size, device, not policy.batch_invariant, kind.small)
        shared = cut[0].share
        self.bucket, self.policy, self.kind, self.block_q = bucket, policy, kind, cut[0].block_q
        self._qkv, self._n_columns = (qkv_dtype, head_size), N_COLUMNS
        lengths = max_tiles(bucket, qkv_dtype, head_size, device, policy, kind) if n_tiles is None else n_tiles
        self._n_tiles = [length for length in lengths if length is not None]
        # Work lists, one after the other, row_spans, cu_seqlens, and the columns and sequences of rows.
        sizes = [*(N_COLUMNS * length for length in self._n_tiles), bucket if shared else 0, bucket + 1]
        sizes += [bucket, bucket] if kind.holes else [0, 0]
        starts = [sum(map(_aligned, sizes[:i])) for i in range(len(sizes) + 1)]
        self._parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.n_integers = starts[-1]
        self.columns = self._parts[-2]  # they differ between batches of the same lengths
        lists = [
            cpu.StaticList(cutting, start, room)
            for cutting, start, room in zip(cut, starts, self._n_tiles, strict=False)
        ]
        after = len(lists)
        columns = starts[after + 2] if kind.holes else None
        self.integers = cpu.StaticIntegers(lists, starts[after] if shared else None, starts[after + 1], columns)
        self._masks: dict[tuple[int, int], bool] = {}  # by B and S, whether lists fit any such mask

    def split(self, integers: torch.Tensor) -> tuple[torch.Tensor, Plan]:
        """Returns cu_seqlens (T' + 1,) and the plan of the bucket, views of static memory (at least n_integers,)."""
        *lists, row_spans, cu_seqlens, _, _ = (integers[part] for part in self._parts)
        tiles = [part.view(-1, self._n_columns) for part in lists]
        return cu_seqlens, Plan(row_spans, tiles[0], tiles[1] if len(tiles) > 1 else None, self.kind.small)

    def split_columns(self, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the columns and the sequences of rows, (T',) each, views of static memory; None without them."""
        columns, seq_ids = (integers[part] for part in self._parts[-2:])
        return (columns, seq_ids) if self.kind.holes else None

    def fits(self, batch: PackedBatch) -> bool:
        """Tells whether `write` can write the batch, or, for lengths on the device, any such batch."""
        if batch.mask is None:
            return self.write(batch, np.empty(self.n_integers, np.int32))
        shape = batch.batch_size, batch.padded_length
        if shape not in self._masks:
            most = masked.most_tiles(*shape, *self._qkv, batch.device, self.policy, self.kind.small)
            self._masks[shape] = all(n is None or n <= room for n, room in zip(most, self._n_tiles, strict=False))
        return self._masks[shape]

    def write(self, batch: PackedBatch, out: np.ndarray) -> bool:
        """Writes a batch of at most `bucket` tokens and sequences to out, (n_integers,) int32 on the host.

        Returns False, and writes nothing, if a list does not fit.
        """
        lists = host_work_lists(batch, *self._qkv, self.policy, self.kind.small)
        rows = [made.tiles.numpy().reshape(-1) for made in lists if made is not None]
        *parts, row_spans, cu_seqlens, _, seq_ids = (out[part] for part in self._parts)
        if any(tiles.shape[0] > part.shape[0] for tiles, part in zip(rows, parts, strict=True)):
            return False
        for part, tiles in zip(parts, rows, strict=True):
            part[: tiles.shape[0]] = tiles
            part[tiles.shape[0] :] = 0
        spans = lists[0].row_spans.numpy()
        row_spans[: spans.shape[0]] = spans
        offsets = batch.cu_seqlens_cpu.numpy()
        cu_seqlens[: offsets.shape[0]] = offsets
        cu_seqlens[offsets.shape[0] :] = offsets[-1]  # the other sequences are empty
        if self.kind.holes:
            seq_ids[: offsets[-1]] = np.arange(offsets.shape[0] - 1, dtype=np.int32).repeat(np.diff(offsets))
            seq_ids[offsets[-1] :] = self.bucket
        return True


def kind_of(batch: PackedBatch, bucket: int, qkv_dtype: torch.dtype, head_size: int, policy: Policy) -> Kind:
    """Returns the kind of static lists for the batch in the rows of a bucket."""
    _, padded, holes = batch.form
    if policy.batch_invariant:
        return HOLES if holes else ANY_BATCH
    device = batch.device
    sizes = tile_sizes(qkv_dtype, head_size, device)
    if padded is not None:
        small = masked.small_tiles_suit(*padded, qkv_dtype, head_size, device)
        n_tiles = masked.most_tiles(*padded, qkv_dtype, head_size, device, policy, small)[0]
    else:
        small, n_tiles = suitable_tiles(batch, sizes, qkv_dtype, head_size, policy)
    return Kind(small, n_tiles <= _dense_room(bucket, sizes.small_q if small else sizes.block_q), holes)


@functools.lru_cache(1024)
def _dense_room(n_tokens: int, block_q: int) -> int:
    """Returns the number of tiles in a dense list for n_tokens tokens."""
    from fastbert_kernels import work_list

    return min(work_list.max_tiles(n_tokens, block_q), work_list.dense_tiles(n_tokens, block_q))


def kinds(
    qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy, holes: bool = False
) -> list[Kind]:
    """Returns every kind of static lists that batches may need. holes: whether layers read columns."""
    from fastbert_kernels import configs, launch

    whole = (False, True) if holes else (False,)
    if policy.batch_invariant:
        return [ANY_BATCH._replace(holes=each) for each in whole]
    small = configs.small_attention_config(qkv_dtype, head_size, launch.arch(device)) is not None
    return [Kind(*of) for of in itertools.product((False, True) if small else (False,), (False, True), whole)]


def kinds_in(
    bucket: int, qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy, holes: bool = False
) -> list[Kind]:
    """Returns the kinds of static lists that batches of at most `bucket` tokens may need."""
    from fastbert_kernels import launch

    every = kinds(qkv_dtype, head_size, device, policy, holes)
    small = [kind for kind in every if kind.small]
    return small if small and bucket <= SHORT_BATCH * launch.n_multiprocessors(device) else every


def _aligned(n_integers: int) -> int:
    """Rounds up to whole 16 bytes."""
    return -(-n_integers // 4) * 4
