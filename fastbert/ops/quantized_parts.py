"""This module holds 8-bit operations for layers of other forms than BERT's: gates, sums before norms, windows, rows.

Each has a twin in plain PyTorch. Letters, scales, errors and policies are as in `fastbert.ops.quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import attention, attention_plan, dispatch, eight_bit, layer_norm
from fastbert.ops.columns_around import ranges_of
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.gated import activation_obstacle
from fastbert.ops.gelu import activate
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantize import DTYPES, OUT_GROUP, Quantized, dequantize, quantize


def rows(
    x: Tensor, precision: str, group: int | None = None, *, rotated: bool = False, policy: Policy = AUTO
) -> Quantized:
    """Quantises x, (T, K), in a separate pass, if no earlier kernel has done it: see `quantize.quantize`.

    group: a divisor of K, by default K. rotated: only for int8, with group K.
    """
    group = x.shape[1] if group is None else group
    if x.shape[1] % group:
        raise ValueError(f"group: expected a divisor of {x.shape[1]}, got {group}")
    if rotated:
        eight_bit.check_width(x.shape[1], precision)
    obstacle = layer_norm.triton_obstacle(group, x)
    data, scale = eight_bit.run("rows", precision, policy, obstacle, _ROWS, x, precision, group, rotated)
    return Quantized(data, scale, group)


def gated_linear(
    x: Quantized, weight: Quantized, bias: Tensor | None, activation: str = "gelu", *, policy: Policy = AUTO
) -> Quantized:
    """Computes activation(x @ up^T + up_bias) * (x @ gate^T + gate_bias), quantised as x, one scale for 128 columns.

    x: (T, K) with one scale for each row. weight: (2 I, K), up above gate. bias: (2 I,) or None. Neither product is
    rounded.
    """
    eight_bit.check_operands(x, weight, bias)
    if x.group < x.data.shape[1] or weight.data.shape[0] % 2:
        raise ValueError(f"x, weight: expected one scale a row and (2 I, K), got {x.group}, {tuple(weight.data.shape)}")
    obstacle = activation_obstacle(activation)
    arguments = x.data, x.scale, x.group, weight.data, weight.scale, bias, activation
    data, scale = eight_bit.run("gated", x.precision, policy, obstacle, _GATED, *arguments)
    return Quantized(data, scale, min(OUT_GROUP, data.shape[1]))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    precision: str,
    *,
    policy: Policy = AUTO,
) -> tuple[Tensor, Quantized]:
    """Returns x + residual, (T, H), and its LayerNorm in 8 bits, one scale for each row (int8: rotated)."""
    eight_bit.check_width(x.shape[-1], precision)
    obstacle = layer_norm.triton_obstacle(x.shape[-1], x, residual, weight, ln_bias)
    arguments = x, residual, weight, ln_bias, eps, precision
    total, data, scale = eight_bit.run("sum_norm", precision, policy, obstacle, _SUM_NORM, *arguments)
    return total, Quantized(data, scale, data.shape[1])


def windowed_attention(
    qkv: Tensor, batch: PackedBatch, num_heads: int, window: int, precision: str, *, policy: Policy = AUTO
) -> Quantized:
    """Computes `ops.varlen_attention` within a window, with its result in 8 bits, one scale for each row and head."""
    head_size = qkv.shape[1] // (3 * num_heads)
    obstacle = attention.triton_obstacle(head_size, qkv)
    plan: Any = attention_plan.NO_PLAN
    key = attention_plan.plan_key(qkv.dtype, head_size, policy)
    planned = not torch.compiler.is_compiling() or batch.has_plan(key)
    if planned and dispatch.decide("attention", policy, qkv.device, obstacle).backend == "triton":
        plan = attention_plan.triton_plan(batch, qkv.dtype, head_size, policy)
    ranges = None if batch.columns is None else ranges_of(batch, window)
    settings = num_heads, head_size**-0.5, precision, window, plan[3], batch.columns, ranges
    arguments = qkv, batch.cu_seqlens, batch.cu_seqlens_cpu, *plan[:2], *settings
    data, scale = eight_bit.run("attention", precision, policy, obstacle, _WINDOWED, *arguments)
    return Quantized(data, scale, head_size)


def _rows_kernel(x: Tensor, precision: str, group: int, rotated: bool) -> tuple[Tensor, Tensor]:
    from fastbert_kernels.quantized_rows import quantized_rows_forward

    data, scale = quantized_rows_forward(x.contiguous().view(-1, group), DTYPES[precision], rotated)
    return data.view(x.shape), scale.view(x.shape[0], x.shape[1] // group)


def _rows_twin(x: Tensor, precision: str, group: int, rotated: bool) -> tuple[Tensor, Tensor]:
    q = quantize(x, precision, group, rotated=rotated)
    return q.data, q.scale


def _gated_kernel(
    x: Tensor, x_scale: Tensor, group: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    from fastbert_kernels.quantized_gated_linear import quantized_gated_linear_forward

    activation = "silu" if activation == "swish" else activation
    operands = x.contiguous(), x_scale.contiguous(), weight.contiguous(), weight_scale.flatten()
    return quantized_gated_linear_forward(*operands, bias, activation)


def _gated_twin(
    x: Tensor, x_scale: Tensor, group: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    precision = "int8" if x.dtype == torch.int8 else "fp8"
    both = F.linear(dequantize(Quantized(x, x_scale, group)), weight.float() * weight_scale)
    first, second = (both if bias is None else both + bias.float()).chunk(2, -1)
    q = quantize(activate(first, activation) * second, precision, OUT_GROUP)
    return q.data, q.scale


def _sum_norm_kernel(
    x: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor | None, eps: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    from fastbert_kernels.sum_norm import sum_norm_forward

    x, residual = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    buffers = eight_bit.buffers(x, x.shape[1], 1, DTYPES[precision])
    total, _ = sum_norm_forward(x, residual, weight, ln_bias, eps, True, buffers)
    assert total is not None
    return total, *buffers


def _sum_norm_twin(
    x: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor | None, eps: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    normed = F.layer_norm(total, weight.shape, weight, ln_bias, eps)
    q = quantize(normed, precision, rotated=precision == "int8")
    return total, q.data, q.scale


def _windowed_kernel(
    qkv: Tensor, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor, row_spans: Tensor | None, tiles: Tensor | None,
    num_heads: int, scale: float, precision: str, window: int, small: bool = False, columns: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastbert_kernels.attention import varlen_attention_forward
    from fastbert_kernels.attention_window import Window

    buffers = eight_bit.buffers(qkv, qkv.shape[1] // 3, num_heads, DTYPES[precision])
    plan = row_spans, tiles, None, small  # no list of short sequences
    qkv, work_list, _, config = attention_plan.launch_arguments(qkv, cu_seqlens_cpu, plan, num_heads)
    varlen_attention_forward(qkv, work_list, num_heads, scale, buffers, config, window=Window(window, ranges))
    return buffers


def _windowed_twin(*arguments: Any) -> tuple[Tensor, Tensor]:
    # PyTorch leaves out the last arguments if they are the defaults.
    qkv, _, cu_seqlens_cpu, _, _, num_heads, scale, precision, window, *rest = arguments
    columns = rest[1] if len(rest) > 1 else None
    out = torch.ops.fastbert.windowed_attention(qkv, cu_seqlens_cpu, num_heads, scale, window, columns)
    q = quantize(out, precision, out.shape[1] // num_heads)
    return q.data, q.scale


_ROWS = eight_bit.register(
    "quantized_rows(Tensor x, str precision, int group, bool rotated) -> (Tensor, Tensor)",
    _rows_kernel,
    _rows_twin,
    lambda x, precision, group, rotated: eight_bit.empty_result(
        x, x.shape[0], x.shape[1], x.shape[1] // group, DTYPES[precision]
    ),
)
_GATED = eight_bit.register(
    f"quantized_gated_linear({eight_bit.LINEAR}) -> (Tensor, Tensor)",
    _gated_kernel,
    _gated_twin,
    lambda x, x_scale, group, weight, *rest: eight_bit.empty_result(
        x, x.shape[0], weight.shape[0] // 2, -(-weight.shape[0] // (2 * OUT_GROUP)), x.dtype
    ),
)
_SUM_NORM = eight_bit.register(
    "sum_norm_quantized(Tensor x, Tensor residual, Tensor weight, Tensor? ln_bias, float eps, str precision) "
    "-> (Tensor, Tensor, Tensor)",
    _sum_norm_kernel,
    _sum_norm_twin,
    lambda x, *rest: (x.new_empty(x.shape), *eight_bit.empty_result(x, x.shape[0], x.shape[1], 1, DTYPES[rest[-1]])),
)
_WINDOWED = eight_bit.register(
    "windowed_attention_quantized(Tensor qkv, Tensor cu_seqlens, Tensor cu_seqlens_cpu, Tensor? row_spans, "
    "Tensor? tiles, int num_heads, float scale, str precision, int window, bool small=False, Tensor? columns=None, "
    "Tensor? ranges=None) -> (Tensor, Tensor)",
    _windowed_kernel,
    _windowed_twin,
    lambda qkv, *rest: eight_bit.empty_result(qkv, qkv.shape[0], qkv.shape[1] // 3, rest[4], DTYPES[rest[6]]),
)
