"""This module makes the lists of tiles that attention's Triton kernels need for a batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastbert.ops.dispatch import Policy
from fastbert.ops.kernel_modules import dense_rows, kernels_of
from fastbert.ops.masked import SHORT_BATCH, SHORT_TEXTS
from fastbert.ops.packing import PackedBatch, to_device
from fastbert_kernels import cpu

if TYPE_CHECKING:
    from fastbert_kernels.work_list import WorkList


class Plan(NamedTuple):
    """A `Plan` holds the work list of a batch, int32 on its device: the parts of `work_list.WorkList`.

    row_spans: (T,), or (0,) if no tile is shared. tiles: (W, 5). short_tiles: the tiles of short sequences, (W', 5), or
    None if short sequences have no separate list. small: whether `tiles` have the size in
    `configs.small_attention_config`.
    """

    row_spans: torch.Tensor
    tiles: torch.Tensor
    short_tiles: torch.Tensor | None = None
    small: bool = False


NO_PLAN = None, None, None, False  # for an operation that makes a plan when it runs
LONGEST_IS_BOUND = "longest is a bound"  # marks a batch whose lengths on the host are upper bounds
TILES = "tiles"  # the key of the plan that `tiles_of` cuts, in the rows of a bucket


def circumstances() -> tuple[bool, int]:
    """Returns the values besides device, dtype and head size that the sizes of tiles depend on."""
    return kernels_of("launch").recorded is not None, kernels_of("tables").generation


def tile_sizes(dtype: torch.dtype, head_size: int, device: torch.device) -> cpu.TileChoice:
    """Returns the sizes of attention's tiles, and the limits by which a batch selects the small ones."""
    launch = kernels_of("launch")
    n_multiprocessors = launch.n_multiprocessors(device)
    return _tile_sizes(dtype, head_size, launch.arch(device), n_multiprocessors, *circumstances())


@functools.lru_cache(64)
def _tile_sizes(
    dtype: torch.dtype, head_size: int, arch: int, n_multiprocessors: int, shipped_only: bool, generation: int
) -> cpu.TileChoice:
    from fastbert_kernels import configs

    large = configs.attention_config(dtype, head_size, arch).block_sizes
    small_config = configs.small_attention_config(dtype, head_size, arch)
    small = {"BLOCK_Q": 0} if small_config is None else small_config.block_sizes
    shares = [not sizes.get("WARP_SPECIALIZE") for sizes in (large, small)]
    limits = SHORT_BATCH * n_multiprocessors, SHORT_TEXTS
    return cpu.TileChoice(large["BLOCK_Q"], shares[0], small["BLOCK_Q"], shares[1], *limits)


def cuttings(dtype: torch.dtype, head_size: int, device: torch.device, share: bool, small: bool) -> list[cpu.Cutting]:
    """Returns how sequences are cut: in one list, or in one for long and one for short ones if no tile is shared."""
    from fastbert_kernels import configs, launch

    sizes = tile_sizes(dtype, head_size, device)
    if share:
        return [cpu.Cutting(sizes.small_q, sizes.share_small) if small else cpu.Cutting(sizes.block_q, sizes.share)]
    block_q = sizes.small_q if small else sizes.block_q
    short = configs.short_attention_config(dtype, head_size, launch.arch(device))
    if short is None:
        return [cpu.Cutting(block_q, False)]
    longest = short.block_sizes["BLOCK_K"]
    return [
        cpu.Cutting(block_q, False, longer_than=longest),
        cpu.Cutting(short.block_sizes["BLOCK_Q"], False, up_to=longest),
    ]


def lists_of(
    cu_seqlens_cpu: torch.Tensor,
    dtype: torch.dtype,
    head_size: int,
    device: torch.device,
    share: bool = True,
    small: bool = False,
) -> tuple[WorkList, WorkList | None]:
    """Returns the work lists of a batch on the CPU: one for all sequences, or one for long and one for short ones."""
    from fastbert_kernels.work_list import build_work_list

    offsets = cu_seqlens_cpu.numpy()
    lists = [build_work_list(offsets, *cutting) for cutting in cuttings(dtype, head_size, device, share, small)]
    return lists[0], lists[1] if len(lists) > 1 else None


def launch_arguments(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    plan: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool],
    num_heads: int,
) -> tuple[torch.Tensor, WorkList, WorkList | None, dict[str, int]]:
    """Returns the kernel's arguments: rows of unit stride, work lists (new ones without a plan), and block sizes."""
    configs, launch, work_list_of = kernels_of("configs"), kernels_of("launch"), kernels_of("work_list").WorkList
    head_size, (row_spans, tiles, short_tiles, small) = qkv.shape[1] // (3 * num_heads), plan
    if tiles is None or row_spans is None:
        work_list = lists_of(cu_seqlens_cpu, qkv.dtype, head_size, qkv.device)[0].to(qkv.device)
        short_list, small = None, False
    else:
        work_list = work_list_of(tiles, row_spans)
        short_list = None if short_tiles is None else work_list_of(short_tiles, row_spans)  # they share no tiles
    qkv = dense_rows(qkv)
    config = configs.attention_config(qkv.dtype, head_size, launch.arch(qkv.device), small).block_sizes
    return qkv, work_list, short_list, config


def takes_small_tiles(batch: PackedBatch, dtype: torch.dtype, head_size: int, policy: Policy) -> bool:
    """Tells whether the batch runs faster in smaller tiles, because its texts are short or few.

    A tile of several texts multiplies all its rows by all its keys, so smaller tiles waste less. Few tiles also leave
    multiprocessors idle. The answer is no if bits must not depend on the batch.
    """
    if policy.batch_invariant:
        return False
    return suitable_tiles(batch, tile_sizes(dtype, head_size, batch.device), dtype, head_size, policy)[0]


def suitable_tiles(
    batch: PackedBatch, sizes: cpu.TileChoice, dtype: torch.dtype, head_size: int, policy: Policy
) -> tuple[bool, int]:
    """Tells whether small tiles suit the batch, and how many tiles it has, if neighbours may share one."""
    if cpu.obstacle() is None:
        n_tiles = cpu.suitable_tiles(batch.cu_seqlens_cpu, sizes)
        return bool(n_tiles & 1), n_tiles >> 1
    offsets = batch.cu_seqlens_cpu.numpy()
    n_tokens = int(offsets[-1])
    small = sizes.small_q > 0 and n_tokens <= sizes.few_tokens
    if sizes.small_q > 0 and not small:
        lengths = (offsets[1:] - offsets[:-1]).astype(np.int64)
        small = int(lengths @ lengths) <= sizes.short_texts * n_tokens
    return small, host_work_lists(batch, dtype, head_size, policy, small)[0].tiles.shape[0]


def plan_key(dtype: torch.dtype, head_size: int, policy: Policy) -> tuple[Any, ...]:
    return "triton attention", dtype, head_size, policy.batch_invariant


def triton_plan(batch: PackedBatch, dtype: torch.dtype, head_size: int, policy: Policy) -> Plan:
    """Returns the plan for the kernel. It is made once for each batch."""

    def make() -> Plan:
        small = takes_small_tiles(batch, dtype, head_size, policy)
        lists = host_work_lists(batch, dtype, head_size, policy, small)
        tiles, row_spans = (to_device(part, batch.device) for part in lists[0])
        short_tiles = None if lists[1] is None else to_device(lists[1].tiles, batch.device)
        return Plan(row_spans, tiles, short_tiles, small)

    return batch.plan(plan_key(dtype, head_size, policy), make)


def batch_in_rows(
    batch: PackedBatch, position_ids: torch.Tensor, qkv_dtype: torch.dtype, head_size: int, policy: Policy
) -> PackedBatch:
    """Returns the same sequences and their triton plan in the rows of position_ids. The last rows are empty.

    The results of attention for the empty rows are undefined.
    """
    plan = triton_plan(batch, qkv_dtype, head_size, policy)
    return batch.in_rows(position_ids, _plans_of(plan, qkv_dtype, head_size, policy))


def with_plan(batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy, plan: Plan) -> PackedBatch:
    """Returns the batch with a triton plan that the caller keeps. Its lists may end with tiles without rows."""
    return replace(batch, _plans=_plans_of(plan, qkv_dtype, head_size, policy))


def _plans_of(plan: Plan, qkv_dtype: torch.dtype, head_size: int, policy: Policy) -> dict[Any, Any]:
    """Returns the plans of a batch in the rows of a bucket: its plan, and the dtype and head size of its tiles."""
    return {plan_key(qkv_dtype, head_size, policy): plan, TILES: (plan, qkv_dtype, head_size)}


def _heights(plan: Plan, qkv_dtype: torch.dtype, head_size: int, device: torch.device) -> list[int]:
    """Returns the rows of a tile in each list of a plan."""
    from fastbert_kernels import configs, launch

    arch = launch.arch(device)
    heights = [configs.attention_config(qkv_dtype, head_size, arch, plan.small).block_sizes["BLOCK_Q"]]
    if plan.short_tiles is not None:
        short = configs.short_attention_config(qkv_dtype, head_size, arch)
        assert short is not None
        heights.append(short.block_sizes["BLOCK_Q"])
    return heights


def tiles_of(batch: PackedBatch, block_q: int, share: bool) -> WorkList:
    """Returns a list of tiles of at most block_q rows, for a kernel of attention with tiles of its own.

    For a batch in the rows of a bucket, they are cut on the device from the tiles of its plan, so that each CUDA graph
    replay cuts them again. For any other batch, they are made from the lengths; share tells whether short sequences may
    then share a tile.
    """
    from fastbert_kernels.work_list import WorkList, build_work_list

    if not batch.has_plan(TILES):
        return build_work_list(batch.cu_seqlens_cpu.numpy(), block_q, share).to(batch.device)
    plan, qkv_dtype, head_size = batch.plan(TILES, tuple)
    heights = _heights(plan, qkv_dtype, head_size, batch.device)
    lists = [part for part in (plan.tiles, plan.short_tiles) if part is not None]
    cut = [_cut(tiles, -(-height // block_q), block_q) for tiles, height in zip(lists, heights, strict=True)]
    return WorkList(cut[0] if len(cut) == 1 else torch.cat(cut), plan.row_spans)


def _cut(tiles: torch.Tensor, n_parts: int, block_q: int) -> torch.Tensor:
    """Cuts tiles: (W, 5) -> (W * n_parts, 5). Each part has block_q rows; parts beyond the end of a tile have none."""
    if n_parts == 1:
        return tiles
    end = tiles[:, None, 1]
    parts = torch.arange(0, n_parts * block_q, block_q, dtype=torch.int32, device=tiles.device)
    starts = torch.minimum(tiles[:, None, 0] + parts, end)
    rows = torch.stack([starts, torch.minimum(starts + block_q, end)], -1)  # (W, n_parts, 2)
    return torch.cat([rows, tiles[:, None, 2:].expand(-1, n_parts, -1)], -1).flatten(0, 1)


def host_work_lists(
    batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy, small: bool = False
) -> tuple[WorkList, WorkList | None]:
    """Returns the batch's work lists for the triton backend on the CPU: for all or long sequences, and for short ones.

    They are made once for each batch. small: whether the lists have smaller tiles.
    """
    share = not policy.batch_invariant
    key = "work lists", qkv_dtype, head_size, share, small
    return batch.plan(key, lambda: lists_of(batch.cu_seqlens_cpu, qkv_dtype, head_size, batch.device, share, small))


def gradient_plan(
    batch: PackedBatch, dtype: torch.dtype, head_size: int, biased: bool = False, windowed: bool = False
) -> Any:
    """Returns the plan for the kernels of attention's gradients. It is made once for each batch, for all layers.

    biased: whether there is a position bias. windowed: whether attention is within a window.
    """

    def make() -> Any:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention_backward import Plan as GradientPlan
        from fastbert_kernels.attention_backward import work_lists
        from fastbert_kernels.work_list import WorkList

        tiles = configs.attention_backward_configs(dtype, head_size, launch.arch(batch.device), biased, windowed)
        lists = work_lists(batch.cu_seqlens_cpu.tolist(), tiles)
        queries = WorkList(*(to_device(part, batch.device) for part in lists.queries))
        if lists.keys is lists.queries:
            return GradientPlan(queries, queries)
        return GradientPlan(queries, WorkList(*(to_device(part, batch.device) for part in lists.keys)))

    return batch.plan(("triton attention gradients", dtype, head_size, biased, windowed), make)
