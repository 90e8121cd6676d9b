"""This module holds attention within a window. Its cost grows with length times window, not with the squared length.

It runs on every backend. In plain PyTorch the queries of a sequence are split into blocks. A block has the keys from
`window` columns before its first query to `window` columns after its last one. A mask removes keys that are too far
from a query. Sequences longer than two blocks need no (S, S) numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import attention_plan, dispatch, recording, tracing
from fastbert.ops.columns_around import ranges_of
from fastbert.ops.dispatch import Policy
from fastbert.ops.dropout import Drop, mask_of
from fastbert.ops.groups import Group, group_by_length
from fastbert.ops.library import register
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import cpu_obstacle as rows_obstacle
from fastbert.ops.training import choose, functions
from fastbert.ops.training.kernels import Attention
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout

BLOCK = 64  # the fewest queries in a block
_FAR = 1 << 30  # the column of missing keys


def reaches_all(qkv: Tensor, batch: PackedBatch, window: int, dropout: Drop, policy: Policy) -> bool:
    """Tells whether the window covers the longest sequence, so that attention without a window may run.

    The answer is no under a batch-invariant policy, because the choice would depend on the other sequences. It is also
    no if the Triton kernel runs. Then a CUDA graph, which serves any lengths, has the same bits as a plain launch.
    """
    if recording.on and recording.is_dry():  # a dry run has no particular lengths
        return False
    if torch.compiler.is_compiling():  # a program serves sequences of any length
        return False
    if policy.batch_invariant or not tracing.has_sizes() or batch.padded_length - 1 > window:
        return False
    return not dispatch.wants_triton(policy.backend, batch.device) or dropout is not None or _with_gradients(qkv)


def _with_gradients(qkv: Tensor) -> bool:
    return torch.is_grad_enabled() and qkv.requires_grad


def near(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Tells which keys are within `window` columns of which queries: (..., Q) and (..., K) -> (..., Q, K) bool."""
    return (queries[..., :, None] - keys[..., None, :]).abs() <= window


def attention(
    qkv: Tensor, batch: PackedBatch, num_heads: int, window: int, scale: float, dropout: Drop, policy: Policy
) -> Tensor:
    """Runs `ops.varlen_attention` within a window: selects the backend, records the choice, and computes."""
    trained = choose.perhaps(dropout, torch.compiler.is_compiling()) and choose.wanted(policy, dropout, qkv)
    dropout_p = dropout if isinstance(dropout, float) else 0.0
    if trained or isinstance(dropout, Dropout):
        no_kernel = choose.triton_obstacle(qkv.dtype, head_size=qkv.shape[1] // (3 * num_heads))
    else:
        no_kernel = triton_obstacle(qkv, num_heads, dropout_p)
    backend = dispatch.choose("attention", policy.backend, policy.strict, qkv.device, no_kernel)
    obstacle = cpu_obstacle(qkv, num_heads, dropout_p) if backend == "cpu" else None
    if backend != "triton":
        with_gradients = None if dispatch.direct(qkv) else "gradients within a window depend on the whole batch"
        dispatch.check_invariant("attention", policy, backend, obstacle or with_gradients)
    if recording.on:
        shape = qkv.shape[0], qkv.shape[1] // 3
        facts: dict[str, Any] = {
            "heads": num_heads,
            "compiled_obstacle": obstacle,
            "window": window,
            "shared_tiles": not policy.batch_invariant,
        }
        if recording.note("attention", backend, qkv.shape, shape, qkv.dtype, **facts):
            return qkv.new_zeros(shape)
    if trained or isinstance(dropout, Dropout):
        settings = Attention(batch, num_heads, scale, mask_of(dropout), batch.columns, window)
        head_size = qkv.shape[1] // (3 * num_heads)
        kernels = choose.kernels_of(backend, qkv.dtype, head_size=head_size) if trained else None
        if kernels is not None:
            return functions.attention(qkv, settings, kernels)
        if settings.dropout is not None:
            return functions.attention(qkv, settings, PLAIN) if trained else PLAIN.attention_forward(qkv, settings)[0]
    if backend == "triton":
        plan = _plan(qkv, batch, num_heads, policy)
        return torch.ops.fastbert.triton_windowed_attention(
            qkv, batch.cu_seqlens_cpu, *plan[:2], num_heads, scale, window, *plan[2:], batch.columns,
            ranges_of(batch, window),
        )  # fmt: skip
    if backend == "cpu" and obstacle is None and dispatch.direct(qkv):
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        return cpu.windowed_attention_forward(qkv, batch.cu_seqlens_cpu, num_heads, scale, window, batch.columns)
    if torch.compiler.is_compiling() and dropout_p == 0.0:  # the program reads lengths when it runs
        return torch.ops.fastbert.windowed_attention(qkv, batch.cu_seqlens_cpu, num_heads, scale, window, batch.columns)
    groups = batch.plan("groups", lambda: group_by_length(batch.cu_seqlens_cpu, batch.device))
    return attend(qkv, groups, batch.columns, num_heads, window, scale, dropout_p)


def _plan(qkv: Tensor, batch: PackedBatch, num_heads: int, policy: Policy) -> Any:
    """Returns the batch's plan, or NO_PLAN under a tracer if the batch has none."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if torch.compiler.is_compiling() and not batch.has_plan(attention_plan.plan_key(qkv.dtype, head_size, policy)):
        if policy.batch_invariant:
            raise dispatch.BackendError("batch_invariant: a traced model needs the batch's plan: see prepare_attention")
        return attention_plan.NO_PLAN
    return attention_plan.triton_plan(batch, qkv.dtype, head_size, policy)


def triton_obstacle(qkv: Tensor, num_heads: int, dropout_p: float) -> str | None:
    """Tells why the triton backend has no kernel within a window, or returns None."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if not 16 <= head_size <= 128:
        return f"head size {head_size} is not from 16 to 128"
    if _with_gradients(qkv):
        return "a tracer or a transform observes the gradients of attention within a window"
    return dispatch.dtype_obstacle(qkv) or dispatch.dropout_obstacle(dropout_p)


def cpu_obstacle(qkv: Tensor, num_heads: int, dropout_p: float) -> str | None:
    """Tells why the cpu backend takes PyTorch's operations within a window, or None where it has a C++ kernel."""
    head_size = qkv.shape[1] // (3 * num_heads)
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    return "dropout" if dropout_p > 0.0 else rows_obstacle(qkv)


def attend(
    qkv: Tensor,
    grouped: tuple[list[Group], Tensor | None],
    all_columns: Tensor | None,
    num_heads: int,
    window: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Computes attention of packed rows, (T, 3 * N * D) -> (T, N * D). grouped: the result of `group_by_length`.

    all_columns: (T,), or None if the tokens of each sequence are neighbours.
    """
    hidden_size = qkv.shape[1] // 3
    groups, ungroup = grouped
    if not groups:
        return qkv[:, :hidden_size].clone()
    outs = []
    for n_seqs, length, rows in groups:
        part = qkv[rows] if isinstance(rows, slice) else qkv.index_select(0, rows)
        q, k, v = part.view(n_seqs, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (sequences, N, length, D)
        if all_columns is None:
            columns = torch.arange(length, device=qkv.device)[None]
        else:
            columns = all_columns[rows].view(n_seqs, length).long()
        out = attend_in_blocks(q, k, v, columns, window, scale, dropout_p)
        outs.append(out.transpose(1, 2).reshape(n_seqs * length, hidden_size))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = out if ungroup is None else out.index_select(0, ungroup)
    return out if out.shape[0] == qkv.shape[0] else F.pad(out, (0, 0, 0, qkv.shape[0] - out.shape[0]))


def _attend_by_lengths(
    qkv: Tensor, cu_seqlens_cpu: Tensor, num_heads: int, scale: float, window: int, columns: Tensor | None
) -> Tensor:
    return attend(qkv, group_by_length(cu_seqlens_cpu, qkv.device), columns, num_heads, window, scale, 0.0)


register(
    "windowed_attention(Tensor qkv, Tensor cu_seqlens_cpu, int num_heads, float scale, int window, Tensor? columns) "
    "-> Tensor",
    kernel=_attend_by_lengths,
    eager=_attend_by_lengths,
    fake=lambda qkv, *rest: qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
)


def _kernel(
    qkv: Tensor,
    cu_seqlens_cpu: Tensor,
    row_spans: Tensor | None,
    tiles: Tensor | None,
    num_heads: int,
    scale: float,
    window: int,
    short_tiles: Tensor | None = None,
    small: bool = False,
    columns: Tensor | None = None,
    ranges: Tensor | None = None,
) -> Tensor:
    from fastbert_kernels.attention import varlen_attention_forward
    from fastbert_kernels.attention_window import Window

    plan = row_spans, tiles, short_tiles, small
    qkv, work_list, short_list, config = attention_plan.launch_arguments(qkv, cu_seqlens_cpu, plan, num_heads)
    reach = Window(window, ranges)
    return varlen_attention_forward(qkv, work_list, num_heads, scale, None, config, short_list, window=reach)


def _eager(
    qkv: Tensor,
    cu_seqlens_cpu: Tensor,
    row_spans: Tensor | None,
    tiles: Tensor | None,
    num_heads: int,
    scale: float,
    window: int,
    short_tiles: Tensor | None = None,
    small: bool = False,
    columns: Tensor | None = None,
    ranges: Tensor | None = None,
) -> Tensor:
    return _attend_by_lengths(qkv, cu_seqlens_cpu, num_heads, scale, window, columns)


register(
    "triton_windowed_attention(Tensor qkv, Tensor cu_seqlens_cpu, Tensor? row_spans, Tensor? tiles, int num_heads, "
    "float scale, int window, Tensor? short_tiles=None, bool small=False, Tensor? columns=None, Tensor? ranges=None) "
    "-> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda qkv, *rest: qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, window: int, scale: float | None, dropout_p: float = 0.0
) -> Tensor:
    """Computes attention for sequences of equal length, (B, N, S, D) each. columns: (1 or B, S), ascending."""
    n_seqs, n_heads, length, head_size = q.shape
    block = max(window, BLOCK)
    if length <= 2 * block:
        mask = near(columns, columns, window)[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    n_blocks = -(-length // block)
    tail, width = n_blocks * block - length, block + 2 * window
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (n_blocks, block)).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x, (0, 0, window, window + tail)).unfold(2, width, block).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (k, v)
    )  # each (B * blocks, N, width, D)
    queries = F.pad(columns, (0, tail), value=-1).unflatten(1, (n_blocks, block))
    keys = F.pad(columns, (window, window + tail), value=_FAR).unfold(1, width, block)
    mask = near(queries, keys, window) | (queries < 0)[..., None]  # rows that are cut off below attend to any keys
    mask = mask.expand(n_seqs, -1, -1, -1).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    return out.unflatten(0, (n_seqs, n_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
