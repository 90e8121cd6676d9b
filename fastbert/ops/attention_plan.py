"""What attention's Triton kernels need of a batch: which sequence each row is of, and lists of tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastbert.ops.dispatch import Policy
from fastbert.ops.packing import PackedBatch, to_device

# (seq_ids (T,), work list (W, 4), that of short sequences (W', 4) or None), int32: what the kernel needs of a batch.
Plan = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


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
