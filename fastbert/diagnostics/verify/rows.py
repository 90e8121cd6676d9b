"""This module makes batches of the texts for `verify`, as rows of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Row = tuple[Tensor, Tensor]  # input ids and token type ids of one text, (n,) int64 on the CPU


def chunks(order: Iterable[int], rows: Sequence[Row], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Yields pieces of the order with at most max_rows rows and max_tokens padded tokens, but at least one row."""
    chunk: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, len(rows[i][0]))
        if chunk and (len(chunk) == max_rows or longest * (len(chunk) + 1) > max_tokens):
            yield chunk
            chunk, longest = [], len(rows[i][0])
        chunk.append(i)
    if chunk:
        yield chunk


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns input ids, mask and token type ids, (B, S) on the CPU, right-padded with zeros. S is at least 1."""
    length = max(1, *(len(ids) for ids, _ in rows))
    input_ids, mask, token_type_ids = (
        torch.zeros(len(rows), length, dtype=torch.int64, device="cpu") for _ in range(3)
    )
    for b, (ids, types) in enumerate(rows):
        input_ids[b, : len(ids)], mask[b, : len(ids)], token_type_ids[b, : len(ids)] = ids, 1, types
    return input_ids, mask, token_type_ids
