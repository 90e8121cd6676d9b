"""Buckets: the numbers of rows in which short batches run, so that one CUDA graph serves many of them."""

from __future__ import annotations

import bisect

LARGEST = 16384


def _bucket_sizes() -> tuple[int, ...]:
    sizes, size = [], 0
    while size < LARGEST:
        octave = 1 << (size.bit_length() - 1) if size else 1  # the largest power of two <= size
        size += max(32, octave // 16)
        sizes.append(size)
    return tuple(sizes)


BUCKETS = _bucket_sizes()


def bucket_of(n_tokens: int) -> int | None:
    """Returns the number of rows for a batch of n_tokens: the next of BUCKETS; None above the largest and for 0."""
    if not 0 < n_tokens <= LARGEST:
        return None
    return BUCKETS[bisect.bisect_left(BUCKETS, n_tokens)]
