"""This module estimates the tokens, floating-point operations and bytes of a batch, without and with padding.

The estimates use only shapes. FLOPs: a multiplication and an addition count as two. A product of (T, K) and (K, M) has
2 T K M, attention over sequences of n_i tokens has 4 sum(n_i^2) H, and an activation, a norm or a pooling has a
constant for each number (`PER_NUMBER`). Bytes: inputs, weights and outputs count once, as with perfect caches and the
whole batch in one run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.diagnostics.explain import above
from fastbert.diagnostics.explain.report import MODULE, SORTED, BatchReport, OpReport
from fastbert.models.encoder import EncoderModel
from fastbert.text.tokenizer import Tokenizer

# FLOPs for each number that is written, or, in pooling, read.
PER_NUMBER = {
    "embedding": 10,
    "layer_norm": 8,
    "layernorm": 8,
    "bias_gelu": 10,
    "gated": 11,
    "rotary": 3,
    "pooling": 1,
    "normalize": 3,
}
PRODUCTS = ("linear", "quantized_linear", "dense")
INT64, FLOAT32 = 8, 4

_MATRIX = re.compile(r"\(([TB]), (\d+)\)(?: (int8|fp8))?")
_WINDOW = re.compile(r"within (\d+) columns")
_DISTANCES = re.compile(r"terms of (\d+) x (\d+) distances")
_LAYERS = re.compile(r"encoder\.layer\.(\d+)(?:-(\d+))?\.")
_SHORT = re.compile(r"of texts of up to (\d+) tokens")


def lengths_of(batch: Any, model: nn.Module, tokenizer: Tokenizer | None) -> tuple[list[int], int, int]:
    """Counts the tokens of each sequence, the columns of a padded batch (0 if not padded), and the truncated texts.

    batch: the argument of `explain`. Raises TypeError or ValueError if it is not a batch.
    """
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(t, Tensor) and t.ndim >= 2 for t in batch):
        batch = {"input_ids": batch[0], "attention_mask": batch[1]}
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, (Tensor, np.ndarray)):
            mask = torch.as_tensor(mask).reshape(-1, mask.shape[-1])
            return (mask != 0).sum(-1).tolist(), mask.shape[-1], 0
        if mask is not None:
            return [sum(1 for valid in row if valid) for row in mask], max(map(len, mask), default=0), 0
        ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
        batch = embeds[..., 0] if ids is None and embeds is not None else ids
    if hasattr(batch, "cu_seqlens"):
        return batch.cu_seqlens.diff().tolist(), 0, 0
    if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim >= 2:
        n, width = int(np.prod(batch.shape[:-1])), int(batch.shape[-1])
        return [width] * n, width, 0
    items = [batch] if isinstance(batch, str) else _listed(batch)
    if items and all(isinstance(item, str) for item in items):
        return _of_texts(items, model, tokenizer)
    if items and all(isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) == 1 for item in items):
        return [len(item) for item in items], 0, 0
    if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in items):
        raise TypeError(
            "batch: expected texts, lists of token ids, lengths, or a dict with input_ids or attention_mask"
        )
    return [int(n) for n in items], 0, 0


def _listed(batch: Any) -> list[Any]:
    if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim == 1:
        return batch.tolist()
    if (
        isinstance(batch, (bytes, Mapping))
        or not isinstance(batch, Iterable)
        or isinstance(batch, (Tensor, np.ndarray))
    ):
        raise TypeError(f"batch: got {type(batch).__name__}, expected texts, token ids, lengths, or a dict of tensors")
    return list(batch)


def _of_texts(texts: list[str], model: nn.Module, tokenizer: Tokenizer | None) -> tuple[list[int], int, int]:
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: needed for texts; pass tokenizer=, or lengths, or token ids")
    positions = next(m for m in model.modules() if isinstance(m, EncoderModel)).longest_text
    limit = min(positions, tokenizer.model_max_length or positions)
    packed = tokenizer.encode_packed(texts, max_length=limit, warn=False)
    return packed.cu_seqlens.diff().tolist(), 0, packed.n_truncated


def with_costs(
    rows: Sequence[OpReport], batch: Any, model: nn.Module, bert: EncoderModel, itemsize: int, here: bool,
    tokenizer: Tokenizer | None,
) -> tuple[tuple[OpReport, ...], BatchReport]:  # fmt: skip
    """Returns the operations with their costs, and the report on the batch.

    itemsize: the bytes of a number in the dtype of the report. here: whether the report is for the model's own device,
    dtype and backend, so that rows are rounded up as in a real run.
    """
    lengths, columns, n_truncated = lengths_of(batch, model, tokenizer)
    longest = max(lengths, default=0)
    padded = [columns or longest] * len(lengths)
    n_rows = above.rows_computed(lengths, model, bert) if here else sum(lengths)
    costs, total = _costs(rows, lengths, n_rows, itemsize)
    _, with_padding = _costs(rows, padded, sum(padded), itemsize)
    by_length = sorted(lengths, reverse=True)
    report = BatchReport(
        n_sequences=len(lengths),
        n_tokens=sum(lengths),
        longest=longest,
        rows=n_rows,
        padded_tokens=sum(padded),
        padded_sorted=sum(by_length[i] * len(by_length[i : i + SORTED]) for i in range(0, len(by_length), SORTED)),
        flops=total[0],
        bytes_moved=total[1],
        padded_flops=with_padding[0],
        padded_bytes=with_padding[1],
        n_truncated=n_truncated,
    )
    return costs, report


def _costs(
    rows: Sequence[OpReport], lengths: Sequence[int], n_rows: int, itemsize: int
) -> tuple[tuple[OpReport, ...], tuple[int, int]]:
    short = {row.module: int(match[1]) for row in rows if (match := _SHORT.search(row.shapes))}
    out = []
    for row in rows:
        own = _SHORT.search(row.shapes)
        limit = short.get(row.module)
        part = [n for n in lengths if limit is None or (n <= limit) == (own is not None)]
        flops, moved = cost(row, part, n_rows, len(lengths), itemsize)
        out.append(dataclasses.replace(row, flops=flops, bytes_moved=moved))
    return tuple(out), (sum(row.flops or 0 for row in out), sum(row.bytes_moved or 0 for row in out))


def cost(
    row: OpReport, lengths: Sequence[int], n_rows: int, n_sequences: int, itemsize: int
) -> tuple[int | None, int | None]:
    """Returns FLOPs and bytes of an operation in all layers of its row, or None if its shapes are unknown.

    lengths: the lengths of the sequences in attention. n_rows: the number of packed rows that are computed.
    """
    layers = _LAYERS.search(row.module)
    times = int(layers[2] or layers[1]) - int(layers[1]) + 1 if layers else 1
    matrices = [(kind, int(width), quantised) for kind, width, quantised in _MATRIX.findall(row.shapes)]
    if not matrices:
        return None, None
    size = FLOAT32 if row.module.startswith("tail.") else itemsize
    count = {"T": n_rows, "B": n_sequences}

    def numbers(matrix: tuple[str, int, str]) -> int:
        return count[matrix[0]] * matrix[1]

    def moved(matrix: tuple[str, int, str]) -> int:
        return numbers(matrix) * (1 if matrix[2] else size)

    before, after = (matrices[:1], matrices[1:]) if row.op != "embedding" else ([], matrices)
    total_bytes = sum(map(moved, before + after))
    if row.op in PRODUCTS:
        k, m = before[0][1], after[0][1] * (2 if ", gated" in row.shapes else 1)
        flops = 2 * count[before[0][0]] * k * m
        total_bytes += k * m * (1 if row.op == "quantized_linear" else size)
        total_bytes += numbers(after[0]) * size * ("+ residual" in row.shapes)
    elif row.op == "attention":
        tokens, width = sum(lengths), after[0][1]
        within = _WINDOW.search(row.shapes)
        reach = 2 * int(within[1]) + 1 if within else max(lengths, default=0)
        flops = 4 * sum(n * min(n, reach) for n in lengths) * width
        if distances := _DISTANCES.search(row.shapes):  # products with the rows of distances for each text
            n_terms, n_rows_of_table = map(int, distances.groups())
            flops += 2 * n_terms * sum(n * min(2 * n - 1, n_rows_of_table) for n in lengths) * width
        total_bytes = tokens * (before[0][1] + width) * size
    elif row.op == "embedding" and row.backend == MODULE:  # only one table
        flops = numbers(after[0])
        total_bytes += n_rows * INT64 + numbers(after[0]) * size
    elif row.op == "embedding":
        # Ids, segments and positions; for each token a row of the word table; at least one row of each other table.
        flops = PER_NUMBER["embedding"] * numbers(after[0])
        total_bytes += 3 * n_rows * INT64 + numbers(after[0]) * size
    elif row.op == "pooling":
        flops = PER_NUMBER["pooling"] * numbers(before[0])
        total_bytes += numbers(after[0]) * (FLOAT32 - size) if "float32" in row.shapes else 0
    else:
        flops = PER_NUMBER.get(row.op, 1) * numbers(after[0])
        total_bytes += numbers(after[0]) * size * ("+ residual" in row.shapes)
    return times * flops, times * total_bytes
