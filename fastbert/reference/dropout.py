"""Masks of dropout as the reference draws them: Philox4x32 with seven rounds, in NumPy, one call for each element.

The masks are those that `fastbert_kernels.masks` describes, written a second time from that description. Element
(row, column) of head `head` at the place `site` of a model takes a number of 16 bits from

    philox4x32(counter = (column / 8, row, head, site), key = (seed mod 2^32, seed / 2^32))

which has eight of them, the low half of each word first: the element takes number column mod 8. It is kept where the
number is at least round(p * 2^16), and then divided by 1 - round(p * 2^16) / 2^16.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What is dropped: in layer i, the site is 4 i plus one of the first three.
PROBABILITIES, ATTENTION_OUTPUT, OUTPUT = 0, 1, 2
EMBEDDINGS = 2**31 - 1


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """The four words of each counter. counter and result: (..., 4) uint32; key: two words of 32 bits."""
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    k0, k1 = (np.uint32(word) for word in key)
    for _ in range(rounds):
        first = c0.astype(np.uint64) * np.uint64(0xD2511F53)
        second = c2.astype(np.uint64) * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = _high(second) ^ c1 ^ k0, _low(second), _high(first) ^ c3 ^ k1, _low(first)
        # Words wrap around at 2^32.
        k0, k1 = (np.uint32((int(k) + step) % 2**32) for k, step in ((k0, 0x9E3779B9), (k1, 0xBB67AE85)))
    return np.stack([c0, c1, c2, c3], axis=-1)


def _high(product: np.ndarray) -> np.ndarray:
    return (product >> np.uint64(32)).astype(np.uint32)


def _low(product: np.ndarray) -> np.ndarray:
    return (product & np.uint64(0xFFFFFFFF)).astype(np.uint32)


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability p of one site of a model, in a batch with this seed, from 0 to 2^63."""

    p: float
    seed: int
    site: int

    def numbers(self, row: np.ndarray, column: np.ndarray, head: np.ndarray | int = 0) -> np.ndarray:
        """The number of each element, below 2^16; rows, columns and heads broadcast to the shape of the result."""
        row, column, head = np.broadcast_arrays(row, column, head)
        counter = np.stack([column // 8, row, head, np.full(row.shape, self.site)], axis=-1).astype(np.uint32)
        words = philox4x32(counter, (self.seed % 2**32, self.seed // 2**32))
        element = column % 8
        word = np.take_along_axis(words, element[..., None] // 2, axis=-1)[..., 0]
        return np.where(element % 2 == 0, word & np.uint32(0xFFFF), word >> np.uint32(16))

    def factors(self, row: Tensor, column: Tensor, head: Tensor | int = 0) -> Tensor:
        """What each element is multiplied by, 0 or 1 / (1 - p), in float64 on the CPU."""
        threshold = round(self.p * 2**16)
        heads = head.numpy() if isinstance(head, Tensor) else head
        keep = self.numbers(row.numpy(), column.numpy(), heads) >= threshold
        scale = 0.0 if threshold == 2**16 else 1 / (1 - threshold / 2**16)
        return torch.from_numpy(keep * scale)


def drop_rows(x: Tensor, dropout: Dropout | None, row: Tensor | None = None) -> Tensor:
    """Dropout of features, (..., H). row: the packed row of each, (...,), by default those of (T, H)."""
    if dropout is None:
        return x
    row = torch.arange(x.shape[0]) if row is None else row.cpu()
    return x * dropout.factors(row[..., None], torch.arange(x.shape[-1])).to(x)


def drop_probabilities(x: Tensor, dropout: Dropout | None, row: Tensor, place: Tensor) -> Tensor:
    """Dropout of the probabilities of attention, (B, N, S, S): query, key.

    row: the packed row of each query, (B, S). place: that of each key within its sequence, (B, S).
    """
    if dropout is None:
        return x
    row, place, head = row.cpu()[:, None, :, None], place.cpu()[:, None, None, :], torch.arange(x.shape[1])
    return x * dropout.factors(row, place, head[None, :, None, None]).to(x)
