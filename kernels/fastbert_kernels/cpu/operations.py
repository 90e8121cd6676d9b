"""This module runs single operations by the C++ kernels: attention, pooling, linears and checks of memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastbert_kernels.cpu import library

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


class PositionBias(NamedTuple):
    """A `PositionBias` is added to attention's scores, by the number of columns that the key is after the query.

    table: (N, 2R + 1) float32, contiguous, for the distances from -R to R. Farther keys have the number of the
    farthest. columns: (T,) int32, contiguous, or None if the tokens of each sequence are neighbours.
    """

    table: torch.Tensor
    columns: torch.Tensor | None

    @classmethod
    def of(cls, table: torch.Tensor, columns: torch.Tensor | None) -> PositionBias:
        """Makes a bias from a table in any dtype."""
        return cls(table.detach().float().contiguous(), columns)


def bias_arguments(bias: PositionBias | None) -> tuple[int | None, int, int | None]:
    """Returns a kernel's arguments for a position bias, or for none."""
    if bias is None:
        return None, 0, None
    return bias.table.data_ptr(), bias.table.shape[1] // 2, library.address(bias.columns)


def varlen_attention_forward(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    num_heads: int,
    scale: float,
    bias: PositionBias | None = None,
    window: int = -1,
) -> torch.Tensor:
    """Computes softmax(scale * q k^T + bias) v within each sequence, and 0 in rows beyond the last sequence.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous, D a multiple of 16. cu_seqlens_cpu: (B + 1,)
    int32. window: the number of tokens that a query sees on either side; beyond it the bias leaves nothing; -1 for all.
    Returns (T, N * D). Raises ValueError for offsets outside of the rows.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = library.empty((n_tokens, hidden_size), like=qkv)
    offsets = cu_seqlens_cpu.contiguous()
    status = library.function("attention", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size, *bias_arguments(bias), window,
    )  # fmt: skip
    library.check(status, n_tokens)
    return out


def ids_outside(ids: torch.Tensor, size: int) -> bool:
    """Tells whether one of the ids, int64 and contiguous, is below 0 or not below size."""
    return bool(library.load()[0].fastbert_ids_outside(ids.data_ptr(), ids.numel(), size))


def digest(addresses: int, n_words: int, word_size: int) -> int:
    """Computes a number that differs if one of n_words words differs.

    addresses: of an array with the words' addresses, uint64. word_size: bytes of a word, 1, 2, 4 or 8.
    """
    number: int = library.load()[0].fastbert_digest(addresses, n_words, word_size)
    return number


def pool_forward(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str = "mean", normalize: bool = False
) -> torch.Tensor:
    """Computes the mean of each sequence's rows, or with mode "mean_sqrt_len" their sum over the root of their number.

    hidden: (T, H), float32 or bfloat16, rows contiguous. cu_seqlens: (B + 1,) int32 on the CPU, from 0 to at most T.
    normalize: whether results are scaled to length 1. Returns (B, H) float32. Raises ValueError for other offsets.
    """
    offsets, (n_rows, size), n_seqs = cu_seqlens.contiguous(), hidden.shape, cu_seqlens.shape[0] - 1
    out = torch.empty(n_seqs, size, dtype=torch.float32, device="cpu")
    status = library.function("pool", hidden.dtype)(
        hidden.data_ptr(), hidden.stride(0), n_rows, offsets.data_ptr(), n_seqs, size,
        mode == "mean_sqrt_len", normalize, out.data_ptr(),
    )  # fmt: skip
    library.check(status, n_rows)
    return out


def linear_forward(
    x: torch.Tensor,
    packed: torch.Tensor,
    n_columns: int,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes activation(x @ weight^T + bias) + residual, all of one dtype that `multiplies`, rows contiguous.

    x: (T, K), K even in bfloat16. packed: a weight (M = n_columns, K) from packing.py. bias: (M,). residual: (T, M).
    activation: a key of ACTIVATIONS. pre: None, or (T, M) for x @ weight^T + bias. Returns (T, M).
    """
    out = library.empty((x.shape[0], n_columns), like=x)
    library.function("linear", x.dtype)(
        x.data_ptr(), x.stride(0), packed.data_ptr(), library.address(bias), *_rows(residual), *_rows(pre),
        out.data_ptr(), n_columns, x.shape[0], x.shape[1], n_columns, ACTIVATIONS[activation],
    )  # fmt: skip
    return out


def _rows(x: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))
