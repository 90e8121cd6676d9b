"""This module lists the launches of training that the offline report compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastbert_kernels import (
    attention,
    attention_backward,
    dropout_rows,
    embedding,
    embedding_backward,
    gelu,
    layer_norm,
    layer_norm_backward,
    linear,
    pooling,
    pooling_backward,
)
from fastbert_kernels.attention_bias import PositionBias
from fastbert_kernels.attention_window import Window
from fastbert_kernels.embedding_backward import Segments
from fastbert_kernels.masks import Dropout
from fastbert_kernels.offline.coverage import DTYPES, HEAD_SIZES, MODELS, Case, pointer_kernel
from fastbert_kernels.work_list import N_COLUMNS, WorkList

N_ROWS = 64
DROPOUT = Dropout(6554, 1, 1)
MAIN, MORE, ALL = range(3)  # How often a case is compiled: see _archs.
Launches = Iterator[tuple[str, str, int, Callable[[], object]]]  # (operation, variant, how often, call)


def training_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype of products. With "under autocast" the stream between layers is float32."""
    if dtype not in DTYPES:
        return
    yield from _attention_cases(dtype)
    if dtype == "tf32":
        return
    of_products = DTYPES[dtype]
    for model in MODELS:
        for op, variant, rank, call in _of_model(model, of_products, of_products):
            yield Case(op, model, dtype, variant, _archs(dtype, model, rank), call)
        if of_products == torch.float32:
            continue
        for op, variant, rank, call in _of_model(model, of_products, torch.float32):
            seldom = rank if rank == MAIN and model == "base" and dtype == "bf16" else ALL
            yield Case(op, model, dtype, f"{variant} under autocast", _archs(dtype, model, seldom), call)


def _attention_cases(dtype: str) -> Iterator[Case]:
    """Lists all three kernels of attention for the head sizes of models and for others."""
    sizes = [(model, h // n_heads, n_heads) for model, (h, _, n_heads) in MODELS.items()]
    for model, head_size, n_heads in [*sizes, *(("extra", head_size, 2) for head_size in HEAD_SIZES)]:
        default = _archs(dtype, model, MAIN)
        if model == "extra":
            default = frozenset({80, 90} if dtype == "bf16" and head_size in (16, 80, 128) else ())
        for variant, dropout, archs in (("", DROPOUT, default), (", no dropout", None, frozenset[int]())):
            call = partial(_attention, n_heads, head_size, DTYPES[dtype], dropout)
            yield Case("attention", model, dtype, f"D{head_size} training{variant}", archs, call)
        if model == "base":  # MPNet's
            archs, tensors = None if dtype == "bf16" else frozenset[int](), (n_heads, head_size, DTYPES[dtype])
            yield Case("attention", model, dtype, "position bias", archs, partial(_biased_attention, *tensors))
            for name, holes in (("", False), (", holes", True)):
                call = partial(_attention, *tensors, DROPOUT, _position_bias(n_heads, DTYPES[dtype], holes))
                yield Case("attention", model, dtype, f"D{head_size} training, position bias{name}", archs, call)
            for name, ranges in (("window", None), ("window, holes", torch.zeros((N_ROWS, 2), dtype=torch.int32))):
                for variant, dropout in (("", DROPOUT), (", no dropout", None)):
                    seldom = archs if not variant or ranges is None else frozenset[int]()
                    call = partial(_attention, *tensors, dropout, window=Window(64, ranges))
                    yield Case("attention", model, dtype, f"D{head_size} training, {name}{variant}", seldom, call)


def _position_bias(n_heads: int, dtype: torch.dtype, holes: bool) -> PositionBias:
    columns = torch.zeros(N_ROWS, dtype=torch.int32) if holes else None
    return PositionBias(torch.empty((n_heads, 257), dtype=dtype), columns)


def _biased_attention(n_heads: int, head_size: int, dtype: torch.dtype) -> None:
    qkv = torch.empty((N_ROWS, 3 * n_heads * head_size), dtype=dtype)
    tiles = WorkList(torch.zeros((2, N_COLUMNS), dtype=torch.int32), torch.zeros(N_ROWS, dtype=torch.int32))
    for holes in (False, True):
        bias = _position_bias(n_heads, dtype, holes)
        attention.varlen_attention_forward(qkv, tiles, n_heads, 0.125, bias=bias)


def _attention(
    n_heads: int,
    head_size: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    bias: PositionBias | None = None,
    window: Window | None = None,
) -> None:
    qkv, lse = torch.empty((N_ROWS, 3 * n_heads * head_size), dtype=dtype), torch.empty((n_heads, N_ROWS))
    tiles = WorkList(torch.zeros((2, N_COLUMNS), dtype=torch.int32), torch.zeros(N_ROWS, dtype=torch.int32))
    of_scores: Any = {"bias": bias, "window": window}
    out = attention.varlen_attention_forward(qkv, tiles, n_heads, 0.125, dropout=dropout, lse=lse, **of_scores)
    plan = attention_backward.Plan(tiles, tiles)
    attention_backward.varlen_attention_backward(out, qkv, out, lse, plan, n_heads, 0.125, dropout, **of_scores)


def _archs(dtype: str, model: str, rank: int) -> frozenset[int] | None:
    """Tells where the default run compiles a case: everywhere (None), on some, or nowhere (empty)."""
    if rank == ALL or dtype == "tf32" or model in ("odd", "large") or (rank == MORE and model != "base"):
        return frozenset()
    if dtype == "bf16":
        return None
    return frozenset({80, 90}) if rank == MAIN and model == "base" else frozenset()


def _of_model(model: str, dtype: torch.dtype, stream: torch.dtype) -> Launches:
    h, i, _ = MODELS[model]
    yield from _residual_norm(h, dtype, stream)
    yield from _embedding(h, dtype, stream)
    yield from _pooling(h, dtype, stream)
    if stream == dtype:
        yield from _activation(h, i, dtype)


def _residual_norm(h: int, dtype: torch.dtype, stream: torch.dtype) -> Launches:
    x, residual = (torch.empty((N_ROWS, h), dtype=d) for d in (dtype, stream))
    vector, of_row = torch.empty(h, dtype=stream), torch.empty(N_ROWS)
    saved = residual, x if dtype != stream else None, x, of_row, of_row, vector
    forward = partial(layer_norm.residual_norm_forward, x, vector, residual, vector, vector, 1e-12)
    backward = partial(layer_norm_backward.residual_norm_backward, *saved)
    yield "layer_norm", "training", MAIN, partial(forward, DROPOUT, True)
    yield "layer_norm", "training, no dropout", ALL, partial(forward, None, True)
    yield "layer_norm", "backward", MAIN, partial(backward, DROPOUT, None, True)
    yield "layer_norm", "backward, no dropout", ALL, partial(backward, None, None, True)
    if stream == dtype:
        yield "layer_norm", "dropout", MORE, partial(dropout_rows.dropout_forward, x, DROPOUT)
    yield "layer_norm", "backward of embedding", MORE, partial(backward, None, DROPOUT, True, want_x=False)


def _embedding(h: int, dtype: torch.dtype, stream: torch.dtype) -> Launches:
    ids, vector = torch.zeros(N_ROWS, dtype=torch.int64), torch.empty(h, dtype=stream)
    word, token_type, position = (torch.empty((n, h), dtype=stream) for n in (N_ROWS, 2, 512))
    for variant, dropout, rank, inputs in (
        ("ids", DROPOUT, MAIN, (ids, ids, ids, word, token_type, position)),
        ("no dropout", None, ALL, (ids, ids, ids, word, token_type, position)),
        ("embeds", DROPOUT, MORE, (None, ids, ids, word, token_type, position)),
        ("without segments", DROPOUT, MORE, (ids, None, ids, word, None, position)),
        ("words alone", DROPOUT, MORE, (ids, None, None, word, None, None)),
        ("without positions", DROPOUT, ALL, (ids, ids, None, word, token_type, None)),
    ):
        arguments: tuple[Any, ...] = *inputs, vector, vector, 1e-12, dropout, dtype, True
        yield "embedding", f"training, {variant}", rank, partial(embedding.embedding_norm_forward, *arguments)
    for n_ids, rank in ((30000, MAIN), (512, MORE)):  # They have tiles of different sizes.
        segments = Segments(ids, torch.zeros(n_ids + 1, dtype=torch.int64), ids.to(torch.int16))
        backward = partial(embedding_backward.embedding_backward, word, segments, stream)
        yield "embedding", f"backward of {n_ids} rows", rank, backward


def _activation(h: int, i: int, dtype: torch.dtype) -> Launches:
    x, weight, bias, pre = (torch.empty(shape, dtype=dtype) for shape in ((N_ROWS, h), (i, h), i, (N_ROWS, i)))
    for activation, rank in (("gelu", MAIN), ("gelu_tanh", MORE), ("relu", MORE)):
        backward = partial(gelu.activation_backward, pre, pre, activation)
        yield "gelu", f"backward of {activation}", rank, backward
    for activation, rank in (("gelu", MAIN), ("gelu_tanh", ALL)):
        forward = partial(linear.linear_forward, x, weight, bias, activation, pre=pre)
        yield "linear", f"up+{activation}+pre", rank, forward
    if dtype != torch.float32:
        by_pointers = partial(pointer_kernel, x, weight, bias, "gelu", pre)
        yield "linear", "up+gelu+pre by pointers", MORE, by_pointers


def _pooling(h: int, dtype: torch.dtype, stream: torch.dtype) -> Launches:
    hidden, grad = torch.empty((N_ROWS, h), dtype=dtype), torch.empty((2, h), dtype=stream)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    for mode in pooling.MODES:
        backward = partial(pooling_backward.pool_backward, grad, hidden, cu_seqlens, mode)
        yield "pooling", f"backward of {mode}", MORE if mode in ("mean", "max") else ALL, partial(backward, False)
        yield "pooling", f"backward of {mode}+norm", MORE if mode == "max" else ALL, partial(backward, True)
