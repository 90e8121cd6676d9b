"""This module writes what a CUDA graph reads of a batch, in one call of C++."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from fastbert_kernels.cpu import library


def fill_words(
    words: torch.Tensor, bucket: int, lengths: int, number: int, n_tokens: int, ids: tuple[int, int, int]
) -> None:
    """Fills words, (n_words,) int64 on the host, as `fastbert.engine.static_memory.Layout` says.

    bucket: the T' rows of its ids. lengths: the address of (n_words - 2 T',) int64, what follows from the batch's
    lengths. number: of the batch. ids: the addresses of input_ids, token_type_ids and position_ids, (n_tokens,) int64
    each; 0 for token types that are zeros, and for positions that follow from the lengths.
    """
    fill = _function(library.load()[0])
    fill(words.data_ptr(), words.shape[0], bucket, lengths, number, n_tokens, *ids)


@functools.lru_cache(8)
def _function(loaded: Any) -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    # It keeps the GIL, which takes longer to get back than most batches take to write.
    prototype = ctypes.PYFUNCTYPE(None, pointer, size, size, pointer, size, size, pointer, pointer, pointer)
    return prototype(library.address_of(loaded.fastbert_fill_words))
