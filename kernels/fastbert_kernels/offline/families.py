"""This module lists what layers of other forms than BERT's launch beside attention, for the offline report.

The sizes are ModernBERT-base's: H = 768, I = 1,152, 12 heads of 64, 64 columns on either side; Nomic's I is 3,072.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastbert_kernels import (
    attention,
    embedding,
    launch,
    layer_norm,
    quantized_configs,
    quantized_gated_linear,
    quantized_rows,
    sum_norm,
)
from fastbert_kernels.attention_window import Window
from fastbert_kernels.offline.coverage import DTYPES, EIGHT_BIT, Case
from fastbert_kernels.quantized_linear import sums_outside
from fastbert_kernels.work_list import N_COLUMNS, WorkList

HIDDEN, INNERS, N_HEADS, WINDOW = 768, (1152, 3072), 12, 64
N_ROWS = 64


def family_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of a key of DTYPES or EIGHT_BIT: everywhere, but fp16 and fp32 on two architectures."""
    if dtype in EIGHT_BIT:
        yield from _eight_bit_cases(dtype)
    elif dtype != "tf32":
        archs = None if dtype == "bf16" else frozenset({80, 90})
        rows, vector = torch.empty((N_ROWS, HIDDEN), dtype=DTYPES[dtype]), torch.empty(HIDDEN, dtype=DTYPES[dtype])
        for name, bias, keep_sum in (("sum", None, True), ("sum, bias", vector, True), ("sum, last", None, False)):
            call = partial(sum_norm.sum_norm_forward, rows, rows, vector, bias, 1e-5, keep_sum)
            yield Case("layer_norm", "base", dtype, name, archs if bias is None else frozenset(), call)


def _eight_bit_cases(dtype: str) -> Iterator[Case]:
    q_dtype = EIGHT_BIT[dtype]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def eight_bit(n_rows: int, n_cols: int, n_groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty((n_rows, n_cols), dtype=q_dtype), torch.empty((n_rows, n_groups))

    def case(op: str, variant: str, archs: frozenset[int] | None, function: Any, *args: Any, **named: Any) -> Case:
        return Case(op, "base", dtype, variant, archs, partial(function, *args, **named))

    rows, vector, some = tensor(N_ROWS, HIDDEN), tensor(HIDDEN), frozenset({80, 90})
    multiply = quantized_gated_linear.quantized_gated_linear_forward
    for inner in INNERS:
        for activation in quantized_gated_linear.ACTIVATIONS:
            archs = None if (activation, inner) in (("gelu", 1152), ("silu", 3072)) else frozenset[int]()
            weight, scale = eight_bit(2 * inner, HIDDEN)
            for bias in (None, tensor(2 * inner)):
                name = f"gated, {activation}, {inner}{'' if bias is None else ', bias'}"
                which = archs if bias is None else frozenset[int]()
                operands = *eight_bit(N_ROWS, HIDDEN), weight, scale.flatten(), bias, activation
                yield case("quantized_linear", name, which, multiply, *operands)
                # Where the persistent kernel runs, the other one serves tensors without a descriptor.
                fallback = frozenset({90, 100}) if which is None else which
                yield case("quantized_linear", f"{name}, by pointers", fallback, _by_pointers, *operands)
    norm, buffers = sum_norm.sum_norm_forward, eight_bit(N_ROWS, HIDDEN)
    yield case("layer_norm", "sum", None, norm, rows, rows, vector, None, 1e-5, True, buffers)
    plain = layer_norm.bias_residual_layer_norm_forward
    yield case("layer_norm", "without bias", some, plain, rows, None, None, vector, None, 1e-5, buffers)
    quantize = quantized_rows.quantized_rows_forward
    yield case("layer_norm", "rows", None, quantize, rows, q_dtype, dtype == "int8")
    yield case("layer_norm", "heads", some, quantize, tensor(N_ROWS * N_HEADS, HIDDEN // N_HEADS), q_dtype, False)
    ids = torch.zeros(N_ROWS, dtype=torch.int64)
    words = ids, None, None, tensor(1000, HIDDEN), None, None, vector, None, 1e-5, buffers
    yield case("embedding", "words", some, embedding.embedding_layer_norm_forward, *words)
    tiles = WorkList(torch.zeros((2, N_COLUMNS), dtype=torch.int32), torch.zeros(N_ROWS, dtype=torch.int32))
    qkv, of_heads = tensor(N_ROWS, 3 * HIDDEN), eight_bit(N_ROWS, HIDDEN, N_HEADS)
    attend = attention.varlen_attention_forward
    yield case("attention", "window", None, attend, qkv, tiles, N_HEADS, 0.125, of_heads, window=Window(WINDOW))


def _by_pointers(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, *others: Any) -> None:
    """Calls the gated product by the kernel that takes pointers, whatever the architecture."""
    weight_scale, bias, activation = others
    out, arch = torch.empty((len(x), len(weight) // 2), dtype=x.dtype), launch.arch(x.device)
    tile = quantized_configs.quantized_gated_config(x.dtype, arch, (x.shape[1], out.shape[1])).block_sizes
    quantized_gated_linear.quantized_gated_linear_pointer_forward(
        x, x_scale, weight, weight_scale, bias, activation, tile, out, x_scale, sums_outside(x.dtype, arch)
    )
