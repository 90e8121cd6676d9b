"""This module holds operations on 8-bit operands, for inference: linear, and quantising LayerNorm, embedding,
attention.

Each has a twin in plain PyTorch, which quantises in the same way and multiplies dequantised operands in float32. T
tokens, K and M features, H hidden, N heads, D head size, G groups of columns that share a scale.

The scales of operands: LayerNorm's rows have one each (int8: after a rotation, see `quantize`), attention's rows one
for each head, GELU's rows one for 128 columns, weights one for each output channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import attention, attention_plan, dispatch, eight_bit, embedding, gelu, layer_norm
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.eight_bit import MIN_ARCH, device_obstacle
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantize import (
    DTYPES,
    OUT_GROUP,
    PRECISIONS,
    ROTATION,
    TINY,
    TOP,
    Quantized,
    check_precision,
    dequantize,
    hadamard,
    quantize,
    quantize_weight,
    rotate,
)

__all__ = [
    "DTYPES", "MIN_ARCH", "OUT_GROUP", "PRECISIONS", "ROTATION", "TINY", "TOP", "Quantized", "check_precision",
    "dequantize", "device_obstacle", "hadamard", "quantize", "quantize_weight", "rotate",
]  # fmt: skip
KERNELS = {"triton": "fastbert_kernels.quantized_linear", "torch": "quantised in torch.float32 (emulation)"}


def model_obstacle(hidden_size: int, intermediate_size: int, head_size: int, activation: str, dtype: torch.dtype,
             device: torch.device) -> str | None:  # fmt: skip
    """Tells why a model of these sizes has no 8-bit kernels, on any GPU, or returns None."""
    for name, size in (("hidden size", hidden_size), ("intermediate size", intermediate_size)):
        if size % ROTATION:
            return f"{name} {size} is not a multiple of {ROTATION}"
    if head_size % 16:
        return f"head size {head_size} is not a multiple of 16"
    like = torch.empty(0, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
    obstacle = attention.triton_obstacle(head_size, like) or dispatch.hidden_size_obstacle(hidden_size)
    if obstacle is None and torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return obstacle or gelu.activation_obstacle(activation)


def linear(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    *,
    policy: Policy = AUTO,
) -> Tensor:
    """Computes activation(x @ weight^T + bias) in dtype.

    x: (T, K), weight: (M, K) with one scale for each row, bias: (M,) or None.

    activation: "none", "gelu" (erf) or "gelu_tanh". Raises ValueError for operands that do not fit together,
    BackendError under a strict policy. It has no gradient.
    """
    eight_bit.check_operands(x, weight, bias)
    arguments = x.data, x.scale, x.group, weight.data, weight.scale, bias, activation
    obstacle = gelu.activation_obstacle(activation)
    return eight_bit.run("linear", x.precision, policy, obstacle, _Q_LINEAR, *arguments, dtype)


def linear_quantized(
    x: Quantized, weight: Quantized, bias: Tensor | None, activation: str = "none", *, policy: Policy = AUTO
) -> Quantized:
    """Computes `linear`, and quantises its result as x is, with one scale for 128 columns, for the next linear."""
    eight_bit.check_operands(x, weight, bias)
    arguments = x.data, x.scale, x.group, weight.data, weight.scale, bias, activation
    obstacle = gelu.activation_obstacle(activation)
    out = eight_bit.run("linear", x.precision, policy, obstacle, _Q_LINEAR_QUANTIZED, *arguments)
    return Quantized(out[0], out[1], min(OUT_GROUP, weight.data.shape[0]))


def bias_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    precision: str,
    *,
    policy: Policy = AUTO,
) -> tuple[Tensor, Quantized]:
    """Computes `ops.bias_residual_layer_norm`, and the same rows in 8 bits, one scale for each (int8: rotated)."""
    arguments = x, bias, residual, weight, ln_bias, eps, precision
    eight_bit.check_width(x.shape[-1], precision)
    obstacle = layer_norm.triton_obstacle(x.shape[-1], x, bias, residual, weight, ln_bias)
    out, data, scale = eight_bit.run("layer_norm", precision, policy, obstacle, _Q_LAYER_NORM, *arguments)
    return out, Quantized(data, scale, data.shape[1])


def embedding_layer_norm(
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    precision: str,
    *,
    policy: Policy = AUTO,
) -> tuple[Tensor, Quantized]:
    """Computes `ops.embedding_layer_norm`, and the same rows in 8 bits, one scale for each (int8: rotated).

    If input_ids is None, word holds the embeddings themselves, (T, H). If token_type or position is None, there are no
    segments or no positions.
    """
    tables = word, token_type, position, weight, ln_bias
    token_type_ids = None if token_type is None else token_type_ids
    position_ids = None if position is None else position_ids
    arguments = input_ids, token_type_ids, position_ids, *tables, eps, precision
    eight_bit.check_width(word.shape[1], precision)
    obstacle = embedding.triton_obstacle(word.shape[1], *tables)
    out, data, scale = eight_bit.run("embedding", precision, policy, obstacle, _Q_EMBEDDING, *arguments)
    return out, Quantized(data, scale, data.shape[1])


def varlen_attention(
    qkv: Tensor,
    batch: PackedBatch,
    num_heads: int,
    precision: str,
    *,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    policy: Policy = AUTO,
) -> Quantized:
    """Computes `ops.varlen_attention` with its result in 8 bits, one scale for each row and head.

    The products inside stay in 16 bits.
    """
    if qkv.dim() != 2 or qkv.shape[1] % (3 * num_heads) or qkv.shape[0] != batch.n_tokens:
        expected = f"(T, 3 * N * D) with T = {batch.n_tokens} and N = {num_heads}"
        raise ValueError(f"qkv: expected shape {expected}, got {tuple(qkv.shape)}")
    head_size = qkv.shape[1] // (3 * num_heads)
    check_precision(precision)
    obstacle = attention.triton_obstacle(head_size, qkv)
    plan: tuple[Tensor | None, Tensor | None, Any, bool] = attention_plan.NO_PLAN
    on_device = obstacle or device_obstacle(precision, qkv.device)
    # A tracer finds the plan if `prepare_attention` made it; otherwise the operation makes one when it runs.
    key = attention_plan.plan_key(qkv.dtype, head_size, policy)
    planned = not torch.compiler.is_compiling() or batch.has_plan(key)
    if planned and dispatch.decide("attention", policy, qkv.device, on_device).backend == "triton":
        plan = attention_plan.triton_plan(batch, qkv.dtype, head_size, policy)
    bias = position_bias, None if position_bias is None else batch.columns
    settings = num_heads, head_size**-0.5 if scale is None else scale, precision, plan[3], *bias
    arguments = qkv, batch.cu_seqlens, batch.cu_seqlens_cpu, *plan[:2], *settings
    data, scales = eight_bit.run("attention", precision, policy, obstacle, _Q_ATTENTION, *arguments)
    return Quantized(data, scales, head_size)


def _product(
    x: Tensor, x_scale: Tensor, group: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    x, weight = dequantize(Quantized(x, x_scale, group)), weight.float() * weight_scale
    return gelu.activate(F.linear(x, weight, None if bias is None else bias.float()), activation)


def _linear_kernel(*arguments: Any) -> Tensor:
    from fastbert_kernels.quantized_linear import quantized_linear_forward

    x, x_scale, group, weight, weight_scale, *rest = arguments
    operands = x.contiguous(), x_scale.contiguous(), group, weight.contiguous(), weight_scale.flatten()
    return quantized_linear_forward(*operands, *rest)


def _linear_quantized_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight = arguments[0], arguments[3]
    from fastbert_kernels import launch

    n_groups = -(-weight.shape[0] // OUT_GROUP)
    scale = launch.empty((x.shape[0], n_groups), like=x, dtype=torch.float32)
    return _linear_kernel(*arguments, x.dtype, scale), scale


def _linear_quantized_twin(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q = quantize(_product(x, *rest), "int8" if x.dtype == torch.int8 else "fp8", OUT_GROUP)
    return q.data, q.scale


def _normalized(out: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    q = quantize(out, precision, rotated=precision == "int8")
    return out, q.data, q.scale


def _layer_norm_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rest: list[Any]
    *rest, precision = arguments
    x: Tensor = rest[0]
    buffers = eight_bit.buffers(x, x.shape[1], 1, DTYPES[precision])
    rest.append(buffers)
    return (layer_norm._kernel(*rest), *buffers)


def _embedding_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rest: list[Any]
    *rest, precision = arguments
    word = rest[3]
    like = word.new_empty(0).expand((word if rest[0] is None else rest[0]).shape[0], 0)
    buffers = eight_bit.buffers(like, word.shape[1], 1, DTYPES[precision])
    rest += [None, buffers]  # no padding_idx
    return (embedding._kernel(*rest), *buffers)


def _attention_kernel(
    qkv: Tensor, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor, row_spans: Tensor | None, tiles: Tensor | None,
    num_heads: int, scale: float, precision: str, small: bool = False, table: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    buffers = eight_bit.buffers(qkv, qkv.shape[1] // 3, num_heads, DTYPES[precision])
    lists = row_spans, tiles
    short_tiles = None  # no list of short sequences
    attention._kernel(
        qkv, cu_seqlens, cu_seqlens_cpu, *lists, num_heads, scale, short_tiles, small, table, columns, buffers
    )
    return buffers


def _attention_twin(*arguments: Any) -> tuple[Tensor, Tensor]:
    # PyTorch leaves out the last arguments if they are the defaults.
    (qkv, _, cu_seqlens_cpu, _, _, num_heads, scale, precision), bias = arguments[:8], arguments[9:]
    # A registered operation, because a tracer cannot read the lengths on the host.
    out = torch.ops.fastbert.grouped_attention(qkv, cu_seqlens_cpu, num_heads, scale, *bias)
    q = quantize(out, precision, out.shape[1] // num_heads)
    return q.data, q.scale


_Q_LINEAR = eight_bit.register(
    f"quantized_linear({eight_bit.LINEAR}, ScalarType dtype) -> Tensor",
    _linear_kernel,
    lambda *args: _product(*args[:-1]).to(args[-1]),
    lambda x, x_scale, group, weight, weight_scale, bias, activation, dtype: x.new_empty(
        x.shape[0], weight.shape[0], dtype=dtype
    ),
)
_Q_LINEAR_QUANTIZED = eight_bit.register(
    f"quantized_linear_quantized({eight_bit.LINEAR}) -> (Tensor, Tensor)",
    _linear_quantized_kernel,
    _linear_quantized_twin,
    lambda x, x_scale, group, weight, *rest: eight_bit.empty_result(
        x, x.shape[0], weight.shape[0], -(-weight.shape[0] // OUT_GROUP), x.dtype
    ),
)
_Q_LAYER_NORM = eight_bit.register(
    "layer_norm_quantized(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor? ln_bias, float eps, "
    "str precision) -> (Tensor, Tensor, Tensor)",
    _layer_norm_kernel,
    lambda *args: _normalized(layer_norm._eager(*args[:-1]), args[-1]),
    lambda x, *rest: (x.new_empty(x.shape), *eight_bit.empty_result(x, x.shape[0], x.shape[1], 1, DTYPES[rest[-1]])),
)
_Q_EMBEDDING = eight_bit.register(
    "embedding_layer_norm_quantized(Tensor? input_ids, Tensor? token_type_ids, Tensor? position_ids, Tensor word, "
    "Tensor? token_type, Tensor? position, Tensor weight, Tensor? ln_bias, float eps, str precision) "
    "-> (Tensor, Tensor, Tensor)",
    _embedding_kernel,
    lambda *args: _normalized(embedding._eager(*[*args[:-1], None]), args[-1]),
    lambda input_ids, types, positions, word, *rest: (
        word.new_empty((n_rows := (word if input_ids is None else input_ids).shape[0]), word.shape[1]),
        *eight_bit.empty_result(word, n_rows, word.shape[1], 1, DTYPES[rest[-1]]),
    ),
)
_Q_ATTENTION = eight_bit.register(
    "varlen_attention_quantized(Tensor qkv, Tensor cu_seqlens, Tensor cu_seqlens_cpu, Tensor? row_spans, "
    "Tensor? tiles, int num_heads, float scale, str precision, bool small=False, Tensor? bias=None, "
    "Tensor? columns=None) -> (Tensor, Tensor)",
    _attention_kernel,
    _attention_twin,
    lambda qkv, *rest: eight_bit.empty_result(qkv, qkv.shape[0], qkv.shape[1] // 3, rest[4], DTYPES[rest[6]]),
)
