"""This kernel computes attention on Hopper with warps that only load keys. It has not run on a GPU yet.

It has the tiles of `attention`, and the same result except for rounding. It loads keys and values by tensor descriptors
of its own sequences, which the program makes itself, so that rows past them read as zeros. A loop that Triton
specialises allows no other descriptors: a descriptor made on the host keeps its box when Triton splits the tile between
two groups of warps, so that copies overrun their buffers (https://github.com/triton-lang/triton/issues/11587). So this
kernel has no descriptor among its arguments. Such a loop also cannot load a mask. So no tile may have several
sequences, and work lists for it have no such tiles (`fastbert.ops.attention_plan`).

Triton specialises only with 4 warps; the program then has 12. The kernel is not a default: a table selects it by
WARP_SPECIALIZE, which `fastbert tune` writes if its results are right and it is the fastest.
"""

from __future__ import annotations

import contextvars
from typing import Any

import torch
import triton
import triton.language as tl

from fastbert_kernels import launch
from fastbert_kernels.attention_tiles import LOG2_E, LOWEST, load_tile
from fastbert_kernels.jit import jit
from fastbert_kernels.work_list import WorkList

ARCH = 90  # The only architecture on which it compiles correctly.
STEPS = (64, 128)  # Numbers of keys a step to try.


@jit
def _specialized_attention_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D)
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    qkv_row_stride,
    out_row_stride,
    scale_log2,  # softmax scale times log2(e)
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the head size
):
    head = tl.program_id(0)
    first_row, end_row, first_key, end_key, _ = load_tile(tiles_ptr, tl.program_id(1))
    column = head * BLOCK_D
    start = first_key.to(tl.int64) * qkv_row_stride + column
    n_keys = end_key - first_key
    k_desc = tl.make_tensor_descriptor(k_ptr + start, [n_keys, BLOCK_D], [qkv_row_stride, 1], [BLOCK_K, BLOCK_D])
    v_desc = tl.make_tensor_descriptor(v_ptr + start, [n_keys, BLOCK_D], [qkv_row_stride, 1], [BLOCK_K, BLOCK_D])
    q_start = first_row.to(tl.int64) * qkv_row_stride + column
    q_shape = [end_row - first_row, BLOCK_D]
    q_desc = tl.make_tensor_descriptor(q_ptr + q_start, q_shape, [qkv_row_stride, 1], [BLOCK_Q, BLOCK_D])
    q = q_desc.load([0, 0])

    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    row_max = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)
    for block_start in tl.range(0, n_keys, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
        k = k_desc.load([block_start, 0])
        scores = tl.dot(q, tl.trans(k))
        scores = tl.where((block_start + tl.arange(0, BLOCK_K) < n_keys)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        v = v_desc.load([block_start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc)
        row_max = new_max

    out = acc * (1.0 / tl.where(row_mask, row_sum, 1.0))[:, None]
    out_offs = rows.to(tl.int64)[:, None] * out_row_stride + column + tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def tiles() -> list[dict[str, int]]:
    """Lists the tiles to try, without BLOCK_D."""
    fixed = {"BLOCK_Q": 128, "WARP_SPECIALIZE": 1, "num_warps": 4, "num_stages": 2}
    return [{**fixed, "BLOCK_K": keys} for keys in STEPS]


def obstacle(qkv: torch.Tensor, work_list: WorkList, head_size: int, for_arch: int) -> str | None:
    """Tells why the kernel does not support this qkv, (T, 3 * N * D), and list, or returns None."""
    if for_arch != ARCH and not launch.interpreted():
        return f"it is for sm_{ARCH}"
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for 16 bits, not {qkv.dtype}"
    if head_size not in (32, 64, 128):
        return f"head size {head_size} is not 32, 64 or 128"
    if qkv.stride(0) % 8 or qkv.data_ptr() % 16:
        return "rows do not begin at multiples of 16 bytes"
    return "tiles are of several sequences" if work_list.row_spans.shape[0] else None


def fallback(config: dict[str, int]) -> dict[str, int]:
    """Returns a tile of the kernel of `attention` with the same work list as a specialised tile."""
    return {"BLOCK_Q": config["BLOCK_Q"], "BLOCK_K": 64, "BLOCK_D": config["BLOCK_D"], "num_warps": 8, "num_stages": 3}


def specialized_attention_forward(
    qkv: torch.Tensor, work_list: WorkList, num_heads: int, scale: float, config: dict[str, int], out: torch.Tensor
) -> None:
    """Computes the result of `varlen_attention_forward` into out, (T, N * D), with the same tiles.

    config: BLOCK_Q, BLOCK_K, BLOCK_D, WARP_SPECIALIZE, num_warps (4 where WARP_SPECIALIZE) and num_stages. Raises
    ValueError if there is an `obstacle`.
    """
    reason = obstacle(qkv, work_list, config["BLOCK_D"], launch.arch(qkv.device))
    if reason is None and config["WARP_SPECIALIZE"] and config["num_warps"] != 4:
        reason = f"Triton specialises 4 warps, not {config['num_warps']}"
    if reason is not None:
        raise ValueError(f"warp-specialised attention: {reason}")
    hidden_size = qkv.shape[1] // 3
    # The allocator is set only in this context, because a user may have set another one.
    contextvars.copy_context().run(
        _run_with_memory,
        _specialized_attention_kernel,
        (num_heads, work_list.tiles.shape[0]),
        config,
        q_ptr=qkv,
        k_ptr=qkv[:, hidden_size:],
        v_ptr=qkv[:, 2 * hidden_size :],
        out_ptr=out,
        tiles_ptr=work_list.tiles,
        qkv_row_stride=qkv.stride(0),
        out_row_stride=out.stride(0),
        scale_log2=scale * LOG2_E.value,
    )


def _run_with_memory(kernel: Any, grid: tuple[int, ...], config: dict[str, int], **arguments: Any) -> None:
    """Launches a kernel that makes descriptors. Triton requests global memory for them."""
    triton.set_allocator(_allocate)
    launch.run(kernel, grid, config, **arguments)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # on the current device, on which the launch is
