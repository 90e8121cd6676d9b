"""What attention's Triton kernels need of a batch: which sequence each row is of, and lists of tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastbert.ops.dispatch import Policy
from fastbert.ops.packing import PackedBatch, to_device

# (seq_ids (T,), work list (W, 4), that of short sequences (W', 4) or None), int32: what the kernel needs of a batch.
Plan = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]
_N_COLUMNS = 4  # of a work list


def lists_of(
    cu_seqlens_cpu: torch.Tensor, dtype: torch.dtype, head_size: int, device: torch.device, share: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(W, 4) and, where sequences share no tile, (W', 4) of short ones; int32, on the CPU, for the device's tiles."""
    from fastbert_kernels import configs, launch
    from fastbert_kernels.attention import build_work_list

    offsets, arch = cu_seqlens_cpu.tolist(), launch.arch(device)
    block_q = configs.attention_config(dtype, head_size, arch).block_sizes["BLOCK_Q"]
    short = None if share else configs.short_attention_config(dtype, head_size, arch)
    if short is None:
        return build_work_list(offsets, block_q, share), None
    longest = short.block_sizes["BLOCK_K"]
    long_list = build_work_list(offsets, block_q, False, longer_than=longest)
    return long_list, build_work_list(offsets, short.block_sizes["BLOCK_Q"], False, up_to=longest)


def plan_key(dtype: torch.dtype, head_size: int, policy: Policy) -> tuple[Any, ...]:
    return "triton attention", dtype, head_size, policy.batch_invariant


def triton_plan(batch: PackedBatch, dtype: torch.dtype, head_size: int, policy: Policy) -> Plan:
    """Returns what the kernel needs, made once a batch."""

    def make() -> Plan:
        work_list, short_list = host_work_lists(batch, dtype, head_size, policy)
        if short_list is not None:
            short_list = to_device(short_list, batch.device)
        return batch.seq_ids, to_device(work_list, batch.device), short_list

    return batch.plan(plan_key(dtype, head_size, policy), make)


def batch_in_rows(
    batch: PackedBatch, position_ids: torch.Tensor, qkv_dtype: torch.dtype, head_size: int, policy: Policy
) -> PackedBatch:
    """Returns the same sequences, with their triton plan, in the rows of position_ids, the last ones empty.

    What attention gives for the empty rows is undefined.
    """
    plan = triton_plan(batch, qkv_dtype, head_size, policy)
    return batch.in_rows(position_ids, {plan_key(qkv_dtype, head_size, policy): plan})


def with_plan(batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy, plan: Plan) -> PackedBatch:
    """Returns the batch with a triton plan that the caller keeps. Tiles of no rows may fill its lists up."""
    return replace(batch, _plans={plan_key(qkv_dtype, head_size, policy): plan})


def host_work_lists(
    batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the work lists of the batch for the triton backend, (W, 4) int32, on the CPU: all or long, and short."""
    return lists_of(batch.cu_seqlens_cpu, qkv_dtype, head_size, batch.device, not policy.batch_invariant)


def max_tiles(
    n_tokens: int, qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy
) -> tuple[int, int | None]:
    """Tells how long static work lists for n_tokens tokens are; None where there is no list of short sequences.

    No batch needs a longer one where neighbours share tiles. Where they share none, ones of a few tokens each may.
    """
    from fastbert_kernels import attention, configs, launch

    arch = launch.arch(device)
    block_q = configs.attention_config(qkv_dtype, head_size, arch).block_sizes["BLOCK_Q"]
    short = configs.short_attention_config(qkv_dtype, head_size, arch) if policy.batch_invariant else None
    return attention.max_tiles(n_tokens, block_q), None if short is None else attention.max_short_tiles(n_tokens)


class StaticPlan:
    """A `StaticPlan` says how the integers of attention lie in static memory, for batches in the rows of a bucket.

    They are int32, each part 16-byte aligned. A smaller bucket needs no more of them than a larger one. Where all are
    0, there are no tiles.
    """

    def __init__(
        self, bucket: int, qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy
    ) -> None:
        self.bucket, self.policy = bucket, policy
        self._kind = qkv_dtype, head_size
        lengths = max_tiles(bucket, qkv_dtype, head_size, device, policy)
        self._n_tiles = [length for length in lengths if length is not None]
        # Work lists, one after the other, seq_ids and cu_seqlens.
        sizes = [*(_N_COLUMNS * length for length in self._n_tiles), bucket, bucket + 1]
        ends = np.cumsum([_aligned(size) for size in sizes])
        self._parts = [
            slice(int(end) - _aligned(size), int(end) - _aligned(size) + size)
            for end, size in zip(ends, sizes, strict=True)
        ]
        self.n_integers = int(ends[-1])

    def split(self, integers: torch.Tensor) -> tuple[torch.Tensor, Plan]:
        """Returns cu_seqlens (T' + 1,) and the plan of the bucket, views of static memory (at least n_integers,)."""
        *lists, seq_ids, cu_seqlens = (integers[part] for part in self._parts)
        tiles = [part.view(-1, _N_COLUMNS) for part in lists]
        return cu_seqlens, (seq_ids, tiles[0], tiles[1] if len(tiles) > 1 else None)

    def fits(self, batch: PackedBatch) -> bool:
        """Tells whether `write` would write the batch."""
        return self.write(batch, np.empty(self.n_integers, np.int32))

    def write(self, batch: PackedBatch, out: np.ndarray) -> bool:
        """Writes a batch of at most `bucket` tokens and sequences to out, (n_integers,) int32 on the host.

        Returns False, with nothing written, where a list does not fit.
        """
        lists = [tiles for tiles in host_work_lists(batch, *self._kind, self.policy) if tiles is not None]
        if any(tiles.shape[0] > length for tiles, length in zip(lists, self._n_tiles, strict=True)):
            return False  # of neighbours that do not share tiles
        *parts, seq_ids, cu_seqlens = (out[part] for part in self._parts)
        for part, tiles in zip(parts, lists, strict=True):
            part[: tiles.numel()] = tiles.numpy().ravel()
            part[tiles.numel() :] = 0
        offsets = batch.cu_seqlens_cpu.numpy()
        seq_ids[: batch.n_tokens] = np.repeat(np.arange(batch.batch_size, dtype=np.int32), np.diff(offsets))
        cu_seqlens[: offsets.shape[0]] = offsets
        return True


def _aligned(n_integers: int) -> int:
    """Rounds up to whole 16 bytes."""
    return -(-n_integers // 4) * 4


def gradient_plan(batch: PackedBatch, dtype: torch.dtype, head_size: int) -> Any:
    """Returns what the kernels of attention's gradients need of a batch, made once for all layers."""

    def make() -> Any:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention_backward import Plan as GradientPlan
        from fastbert_kernels.attention_backward import work_lists

        tiles = configs.attention_backward_configs(dtype, head_size, launch.arch(batch.device))
        lists = work_lists(batch.cu_seqlens_cpu.tolist(), tiles)
        query_tiles = to_device(lists[0], batch.device)
        key_tiles = query_tiles if lists[1] is lists[0] else to_device(lists[1], batch.device)
        return GradientPlan(batch.cu_seqlens, batch.seq_ids, query_tiles, key_tiles)

    return batch.plan(("triton attention gradients", dtype, head_size), make)
