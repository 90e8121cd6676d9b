"""This module lists what the offline report compiles beside defaults: linears for few rows, and candidates of tuning.

Those for few rows are of the three models, and the others BERT-base's, on the architecture for which they were counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastbert_kernels import (
    dependent,
    few_rows,
    launch,
    layer_norm,
    linear,
    linear_persistent,
    linear_specialized,
    quantized_linear_specialized,
    split_linear,
)
from fastbert_kernels.offline.coverage import EIGHT_BIT, MODELS, Case

ARCHS = frozenset({90})
LATER_ARCHS = frozenset({90, 100, 120})  # that launch dependently
WARP_SPECIALIZED = ((128, 256, 64, 3), (128, 128, 64, 4))  # the wide one not with a residual, with which it spills


def variant_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype: bf16, fp8 or int8, else none."""
    if dtype == "bf16":
        yield from _linear_cases()
    elif dtype in EIGHT_BIT:
        yield from _quantized_cases(dtype)


def _tile(rows: int, cols: int, depth: int, stages: int, warps: int) -> dict[str, int]:
    names = "BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "num_stages", "num_warps"
    return {**dict(zip(names, (rows, cols, depth, stages, warps), strict=True)), "GROUP_ROWS": 8}


def _linear_cases() -> Iterator[Case]:
    h, i, _ = MODELS["base"]
    case = partial(Case, "linear", "base", "bf16")

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    x, weight, bias, vector = tensor(few_rows.FEW, h), tensor(i, h), tensor(i), tensor(h)
    for model, (width, inner, _) in MODELS.items():
        for n_rows in few_rows.BUCKETS if model != "odd" else ():
            operands = tensor(n_rows, width), tensor(inner, width), tensor(inner), "gelu"
            call = partial(linear.linear_forward, *operands, by_rows=True)
            yield Case("linear", model, "bf16", f"up+gelu of {n_rows} rows", ARCHS, call)
    call = partial(linear.linear_forward, x[:64], weight, bias, "gelu", by_rows=True)
    yield case("up+gelu of 64 rows, dependent", LATER_ARCHS, _dependent(call))
    yield case("up+gelu, dependent", ARCHS, _dependent(partial(linear.linear_forward, x, weight, bias, "gelu")))

    out, sums = tensor(64, i), torch.empty(4, 64, h)
    arguments = tensor(64, i), tensor(h, i), None, "none", None, few_rows.TILES[0], sums
    yield case("down in 4 shares", frozenset({80, 90}), partial(linear.linear_pointer_forward, *arguments, splits=4))
    norm = partial(split_linear.split_layer_norm_forward, sums, vector, x[:64], vector, vector, 1e-12)
    yield Case("layer_norm", "base", "bf16", "of 4 shares", frozenset({80, 90}), norm)
    yield Case("layer_norm", "base", "bf16", "of 4 shares, dependent", ARCHS, _dependent(norm))
    norm = partial(layer_norm.bias_residual_layer_norm_forward, x, vector, x, vector, vector, 1e-12)
    yield Case("layer_norm", "base", "bf16", "bias+residual, dependent", LATER_ARCHS, _dependent(norm))

    apart = {**_tile(128, 128, 64, 2, 8), "FLATTEN": 0, "PROGRAMS": 2}
    call = partial(linear_persistent.linear_persistent_forward, x[:64], weight, bias, "gelu", None, apart, out)
    yield case("up+gelu, 2 programs a multiprocessor", ARCHS, call)
    for sizes in WARP_SPECIALIZED:
        for activation, residual in (("gelu", None), ("none", None), ("none", out)):
            if residual is None or sizes[1] == 128:
                inputs = x[:64], weight, bias, activation, residual, _tile(*sizes, linear_specialized.WARPS), out
                name = f"up+{activation}{'' if residual is None else '+residual'}, warp-specialised"
                yield case(name, ARCHS, partial(linear_specialized.linear_specialized_forward, *inputs))


def _quantized_cases(dtype: str) -> Iterator[Case]:
    h, i, _ = MODELS["base"]
    to = EIGHT_BIT[dtype]
    for name, n_cols, k, group, quantizes in (("qkv", 3 * h, h, h, False), ("up+gelu", i, h, h, True),
                                              ("out", h, h, 64, False), ("down", h, i, 128, False)):  # fmt: skip
        operand, scale = torch.empty((64, k), dtype=to), torch.empty(64, k // group)
        weight, weight_scale = torch.empty((n_cols, k), dtype=to), torch.empty(n_cols)
        out = torch.empty((64, n_cols), dtype=to if quantizes else torch.bfloat16)
        out_scale = torch.empty(64, n_cols // 128) if quantizes else None
        call = partial(
            quantized_linear_specialized.quantized_linear_specialized_forward,
            *(operand, scale, group, weight, weight_scale, None, "gelu" if quantizes else "none"),
            *(_tile(128, 128, min(128, group), 4, linear_specialized.WARPS), out, out_scale, dtype == "fp8"),
        )
        archs = ARCHS if dtype == "fp8" else frozenset[int]()
        yield Case("quantized_linear", "base", dtype, f"{name}, warp-specialised", archs, call)


def _dependent(call: Callable[[], object]) -> Callable[[], object]:
    """Repeats a call with dependent launches."""

    def run() -> object:
        assert launch.recorded is not None
        dependent.use(True)
        try:
            return call()
        finally:
            dependent.use(None)

    return run
