"""This module holds bidirectional attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.ops import attention_plan, dispatch, recording, tracing
from fastbert.ops import window as windowed
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.dropout import Drop, mask_of, probability_of
from fastbert.ops.grouped_attention import (
    attend_by_lengths,
    attend_in_groups,
    attend_in_place,
    gradients_by_lengths,
)
from fastbert.ops.groups import group_by_length
from fastbert.ops.kernel_modules import kernels_of
from fastbert.ops.library import register
from fastbert.ops.packing import PackedBatch
from fastbert.ops.position_bias import check as check_bias
from fastbert.ops.position_bias import for_kernel
from fastbert.ops.tracing import constant, untraced
from fastbert.ops.training import choose, functions
from fastbert.ops.training.kernels import Attention
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout

KERNELS = {
    "triton": "fastbert_kernels.attention",
    "torch": "torch.nn.functional.scaled_dot_product_attention, sequences of equal length together",
}


def _eager(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    row_spans: torch.Tensor | None,
    tiles: torch.Tensor | None,
    num_heads: int,
    scale: float,
    short_tiles: torch.Tensor | None = None,
    small: bool = False,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    return attend_by_lengths(qkv, cu_seqlens_cpu, num_heads, scale, table, columns)


def _kernel(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    row_spans: torch.Tensor | None,
    tiles: torch.Tensor | None,
    num_heads: int,
    scale: float,
    short_tiles: torch.Tensor | None = None,
    small: bool = False,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    plan = row_spans, tiles, short_tiles, small
    qkv, work_list, short_list, config = attention_plan.launch_arguments(qkv, cu_seqlens_cpu, plan, num_heads)
    bias = None if table is None else for_kernel(table, columns)
    out: torch.Tensor = kernels_of("attention").varlen_attention_forward(
        qkv, work_list, num_heads, scale, quantized, config, short_list, bias=bias
    )
    return out


def _backward(grad: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    _, cu_seqlens_cpu, _, _, num_heads, scale, _, _, table, columns = rest
    d_qkv, d_table = _gradients(grad, qkv, cu_seqlens_cpu, num_heads, scale, table, columns)
    return d_qkv, *(None,) * 8, d_table, None


def _grouped_op_backward(grad: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor | None, ...]:
    d_qkv, d_table = _gradients(grad, *inputs)
    return d_qkv, None, None, None, d_table, None


def _gradients(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    table: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # The registered operation has no derivative. The same computation in PyTorch has one, for create_graph=True.
    run = gradients_by_lengths if torch.is_grad_enabled() else torch.ops.fastbert.varlen_attention_backward
    d_qkv, d_table = run(grad, qkv, cu_seqlens_cpu, num_heads, scale, table, columns)
    return d_qkv, None if table is None else d_table


def _fake_gradients(
    grad: torch.Tensor, qkv: torch.Tensor, cu: Any, heads: Any, scale: Any, table: Any = None, columns: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    d_table = qkv.new_empty((), dtype=torch.promote_types(qkv.dtype, torch.float32)) if table is None else table
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(d_table)


def _fake(qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


register(
    "varlen_attention(Tensor qkv, Tensor cu_seqlens, Tensor cu_seqlens_cpu, Tensor? row_spans, Tensor? tiles, "
    "int num_heads, float scale, Tensor? short_tiles=None, bool small=False, Tensor? bias=None, "
    "Tensor? columns=None) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=_fake,
    backward=_backward,
)
# Two more operations read the lengths on the host, which a tracer cannot do: the plain path and the backward pass of
# all.
register(
    "grouped_attention(Tensor qkv, Tensor cu_seqlens_cpu, int num_heads, float scale, Tensor? bias=None, "
    "Tensor? columns=None) -> Tensor",
    kernel=attend_by_lengths,
    eager=attend_by_lengths,
    fake=_fake,
    backward=_grouped_op_backward,
)
register(
    "varlen_attention_backward(Tensor grad, Tensor qkv, Tensor cu_seqlens_cpu, int num_heads, float scale, "
    "Tensor? bias=None, Tensor? columns=None) -> (Tensor, Tensor)",
    kernel=gradients_by_lengths,
    eager=gradients_by_lengths,
    fake=_fake_gradients,
)


register(
    "cpu_attention(Tensor qkv, Tensor cu_seqlens_cpu, int num_heads, float scale, Tensor? bias=None, "
    "Tensor? columns=None) -> Tensor",
    kernel=lambda *args: _compiled(*args),
    eager=lambda *args: _compiled(*args),
    fake=_fake,
    backward=_grouped_op_backward,
)


def _compiled(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    table: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    bias = None if table is None else cpu.PositionBias.of(table, columns)
    return cpu.varlen_attention_forward(qkv, cu_seqlens_cpu, num_heads, scale, bias)


def cpu_obstacle(head_size: int, qkv: torch.Tensor, dropout_p: float = 0.0) -> str | None:
    """Tells why the cpu backend runs PyTorch's attention and not the C++ kernel, or returns None."""
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        return f"there is no C++ kernel for {qkv.dtype}"
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    if dropout_p > 0.0:
        return "dropout"
    if (transformed := tracing.transformed(qkv)) is not None:
        return transformed
    return _kernels_obstacle()


@constant
def _kernels_obstacle() -> str | None:
    return cpu.obstacle()


def triton_obstacle(head_size: int, qkv: torch.Tensor, dropout_p: float = 0.0) -> str | None:
    """Tells why the triton backend cannot run this call, or returns None."""
    if not 16 <= head_size <= 128:
        return f"head size {head_size} is not from 16 to 128"
    return dispatch.dtype_obstacle(qkv) or dispatch.dropout_obstacle(dropout_p)


@untraced
def prepare(batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy = AUTO) -> None:
    """Makes the batch's plan before the layers need it, outside of the code that torch.compile traces."""
    if torch.compiler.is_exporting() or (recording.on and recording.is_dry()):
        return
    obstacle = triton_obstacle(head_size, torch.empty(0, dtype=qkv_dtype, device=batch.device))
    if dispatch.decide("attention", policy, batch.device, obstacle).backend == "triton":
        attention_plan.triton_plan(batch, qkv_dtype, head_size, policy)


def varlen_attention(
    qkv: torch.Tensor,
    batch: PackedBatch,
    num_heads: int,
    *,
    scale: float | None = None,
    position_bias: torch.Tensor | None = None,
    window: int | None = None,
    dropout: Drop = None,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """Computes softmax(scale * q k^T + bias) v within each sequence of the batch.

    qkv: (T, 3 * N * D), laid out [q | k | v], each (N, D). scale: D^-0.5 by default. position_bias: (N, 2R + 1), added
    to the scores by the distance in columns between key and query (fastbert.ops.position_bias). Columns are those of
    the batch, after `packing.find_holes`. window: the number of columns on either side of a query, None for all; it
    excludes a position bias. dropout: the dropout of the probabilities. Returns (T, N * D) in qkv's dtype. Raises
    ValueError for wrong shapes.
    """
    table, columns = position_bias, None if position_bias is None else batch.columns
    if table is not None:
        check_bias(table, num_heads, qkv)
    if batch.valid is not None:
        in_place = tracing.transformed(qkv) or "the batch holds rows of padding"
        dispatch.choose("attention", policy.backend, policy.strict, qkv.device, in_place)
        dispatch.check_invariant("attention", policy, "cpu", in_place)
        return attend_in_place(qkv, batch, num_heads, scale, probability_of(dropout), table, window)
    if qkv.dim() != 2 or qkv.shape[1] % (3 * num_heads) or qkv.shape[0] != batch.n_tokens:
        expected = f"(T, 3 * N * D) with T = {batch.n_tokens} and N = {num_heads}"
        raise ValueError(f"qkv: expected shape {expected}, got {tuple(qkv.shape)}")
    head_size = qkv.shape[1] // (3 * num_heads)
    scale = head_size**-0.5 if scale is None else scale
    if window is not None and not windowed.reaches_all(qkv, batch, window, dropout, policy):
        if table is not None:
            raise ValueError("window: expected None with a position bias")
        return windowed.attention(qkv, batch, num_heads, window, scale, dropout, policy)
    compiling = torch.compiler.is_compiling()
    trained = choose.perhaps(dropout, compiling)
    trained = trained and choose.wanted(policy, dropout, qkv, table)
    dropout_p = dropout if isinstance(dropout, float) else 0.0
    if trained or isinstance(dropout, Dropout):
        obstacle = choose.triton_obstacle(qkv.dtype, head_size=head_size)
    else:
        obstacle = triton_obstacle(head_size, qkv, dropout_p)
    backend = dispatch.choose("attention", policy.backend, policy.strict, qkv.device, obstacle)
    no_kernel = cpu_obstacle(head_size, qkv, dropout_p) if backend == "cpu" else None
    if backend != "triton":
        refused = no_kernel or dispatch.training_obstacle(probability_of(dropout))
        dispatch.check_invariant("attention", policy, backend, refused)
    if recording.on:
        shape = qkv.shape[0], qkv.shape[1] // 3
        facts: dict[str, Any] = {
            "heads": num_heads,
            "compiled_obstacle": no_kernel,
            "shared_tiles": not policy.batch_invariant,
            **({} if table is None else {"position_bias": tuple(table.shape)}),
        }
        if recording.note("attention", backend, qkv.shape, shape, qkv.dtype, **facts):
            return qkv.new_zeros(shape)
    if trained or isinstance(dropout, Dropout):
        settings = Attention(batch, num_heads, scale, mask_of(dropout), columns)
        kernels = choose.kernels_of(backend, qkv.dtype, head_size=head_size) if trained else None
        if kernels is not None:
            return functions.attention(qkv, settings, kernels, table)
        if settings.dropout is not None:
            if trained:
                return functions.attention(qkv, settings, PLAIN, table)
            return PLAIN.attention_forward(qkv, settings, table)[0]
    if backend == "triton":
        # A tracer finds the plan if `prepare` made it; otherwise the operation makes one when it runs.
        unplanned = compiling and not batch.has_plan(attention_plan.plan_key(qkv.dtype, head_size, policy))
        if unplanned and policy.batch_invariant:
            raise dispatch.BackendError("batch_invariant: a traced model needs the batch's plan: see prepare_attention")
        row_spans, tiles, short_tiles, small = (
            attention_plan.NO_PLAN if unplanned else attention_plan.triton_plan(batch, qkv.dtype, head_size, policy)
        )
        return torch.ops.fastbert.varlen_attention(
            qkv, batch.cu_seqlens, batch.cu_seqlens_cpu, row_spans, tiles, num_heads, scale, short_tiles, small,
            table, columns,
        )  # fmt: skip
    if backend == "cpu" and no_kernel is None:
        run = (
            _compiled if dispatch.direct(qkv) else torch.ops.fastbert.cpu_attention
        )  # fewer steps on the host, for a short text
        return run(qkv, batch.cu_seqlens_cpu, num_heads, scale, table, columns)
    differentiable = torch.is_grad_enabled() and qkv.requires_grad and tracing.transformed(qkv) is None
    if (compiling or differentiable) and dropout_p == 0.0:  # PyTorch's attention has no second derivative
        return torch.ops.fastbert.grouped_attention(qkv, batch.cu_seqlens_cpu, num_heads, scale, table, columns)
    groups, ungroup = batch.plan("groups", lambda: group_by_length(batch.cu_seqlens_cpu, batch.device))
    return attend_in_groups(qkv, groups, ungroup, num_heads, scale, dropout_p, table, columns)
