"""This module lists what families with rotary positions launch, for the offline report.

The sizes are ModernBERT-base's: H = 768, I = 1,152, 12 heads of 64, 64 columns on either side. Nomic and GTE have
other widths of the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastbert_kernels import attention, configs, embedding, few_rows, gated, gated_linear, launch, layer_norm, rotary
from fastbert_kernels.attention_window import Window
from fastbert_kernels.offline.coverage import DTYPES, Case
from fastbert_kernels.work_list import N_COLUMNS, WorkList

HIDDEN, INNER, N_HEADS, WINDOW = 768, 1152, 12, 64
N_ROWS = 64


def rotary_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype: everywhere in bf16, and on two architectures in fp16 and fp32."""
    if dtype not in DTYPES or dtype == "tf32":
        return
    default = None if dtype == "bf16" else frozenset({80, 90})
    some = frozenset({80, 90} if dtype == "bf16" else ())

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[dtype])

    def case(op: str, variant: str, archs: frozenset[int] | None, function: Any, *args: Any, **named: Any) -> Case:
        return Case(op, "base", dtype, variant, archs, partial(function, *args, **named))

    x, grad = tensor(N_ROWS, 2 * INNER), tensor(N_ROWS, INNER)
    for activation in gated.ACTIVATIONS:
        archs = default if activation in ("gelu", "silu") else frozenset[int]()
        yield case("gated", activation, archs, gated.gated_forward, x, activation)
        yield case("gated", f"{activation} backward", archs, gated.gated_backward, grad, x, activation)
        both = grad, x, activation, torch.empty_like(grad)
        yield case("gated", f"{activation} both", archs, gated.gated_backward, *both)

    rows = tensor(N_ROWS, HIDDEN)
    multiply = rows, tensor(2 * INNER, HIDDEN)
    for activation in gated.ACTIVATIONS:
        archs = default if activation in ("gelu", "silu") else frozenset[int]()
        for name, bias in ((activation, None), (f"{activation}, bias", tensor(2 * INNER))):
            arguments = *multiply, bias, activation
            which = archs if bias is None or activation == "gelu" else frozenset[int]()
            yield case("linear", f"gated {name}", which, gated_linear.gated_linear_forward, *arguments)
            by_pointers = frozenset({90, 100} if dtype == "bf16" and name == "gelu" else ())
            yield case("linear", f"gated {name}, by pointers", by_pointers, _by_pointers, *arguments)
    for n_rows in few_rows.BUCKETS if dtype == "bf16" else ():
        few = tensor(n_rows, HIDDEN), multiply[1], None, "gelu"
        call = gated_linear.gated_linear_forward
        yield case("linear", f"gated gelu of {n_rows} rows", frozenset({90}), call, *few, by_rows=True)

    qkv, half = tensor(N_ROWS, 3 * HIDDEN), HIDDEN // N_HEADS // 2
    tables = torch.empty(N_ROWS, half), torch.empty(N_ROWS, half)
    yield case("rotary", "in place", default, rotary.rotary_forward, qkv, *tables, N_HEADS, in_place=True)
    yield case("rotary", "into a copy", some, rotary.rotary_forward, qkv, *tables, N_HEADS)
    yield case("rotary", "back", default, rotary.rotary_backward, qkv, *tables, N_HEADS)

    ids, vector = torch.zeros(N_ROWS, dtype=torch.int64), tensor(HIDDEN)
    notes = embedding.Notes(torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 1)
    embed, words = embedding.embedding_layer_norm_forward, tensor(1000, HIDDEN)
    yield case("embedding", "words, noted", default, embed, ids, None, None, words, None, None, vector, None, 1e-5,
               notes=notes)  # fmt: skip
    types = ids, None, words, tensor(2, HIDDEN), None, vector, vector, 1e-5
    yield case("embedding", "words and segments, noted", some, embed, ids, *types, notes=notes)
    norm = layer_norm.bias_residual_layer_norm_forward
    yield case("layer_norm", "without bias", default, norm, rows, None, None, vector, None, 1e-5)

    tiles = WorkList(torch.zeros((2, N_COLUMNS), dtype=torch.int32), torch.zeros(N_ROWS, dtype=torch.int32))
    attend, ranges = attention.varlen_attention_forward, torch.zeros((N_ROWS, 2), dtype=torch.int32)
    for name, archs, window in (("window", default, Window(WINDOW)), ("window, holes", some, Window(WINDOW, ranges))):
        yield case("attention", name, archs, attend, qkv, tiles, N_HEADS, 0.125, short_list=tiles, window=window)
    small = frozenset({80, 90, 100} if dtype == "bf16" else ())  # where `attention_config` has a larger tile
    yield case("attention", "window, small", small, _in_small_tiles, qkv, tiles)


def _in_small_tiles(qkv: torch.Tensor, tiles: WorkList) -> torch.Tensor:
    """Calls attention within a window in the small tile of the architecture."""
    config = {**configs.small_tile(launch.arch(qkv.device)), "BLOCK_D": HIDDEN // N_HEADS}
    return attention.varlen_attention_forward(qkv, tiles, N_HEADS, 0.125, config=config, window=Window(WINDOW))


def _by_pointers(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Calls the product with a gate by the kernel that takes pointers, whatever the tables say."""
    n_out = weight.shape[0] // 2
    config = configs.linear_config(x.dtype, launch.arch(x.device), (x.shape[1], 2 * n_out), "gated").block_sizes
    out = launch.empty((len(x), n_out), like=x)
    return gated_linear.gated_linear_pointer_forward(x, weight, bias, activation, config, out)
