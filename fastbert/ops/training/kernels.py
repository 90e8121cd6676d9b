"""This module has the interface of a backend for training: forward and backward passes without autograd.

T packed tokens, H hidden, I intermediate, N heads, D head size. C is the dtype of products, float32, bfloat16 or
float16. S is the dtype of hidden states between layers: C, or float32 under autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, dtype

from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import Dropout

Weights = tuple[Tensor, ...]


class Attention(NamedTuple):
    """An `Attention` holds the settings of one attention. batch: the sequences of the T rows.

    columns: (T,) int32, as in `PackedBatch`, for a position bias or a window. window: columns on either side that a
    query reaches, None for all; it excludes a position bias.
    """

    batch: PackedBatch
    num_heads: int
    scale: float
    dropout: Dropout | None
    columns: Tensor | None = None
    window: int | None = None


class Rotation(NamedTuple):
    """A `Rotation` holds the angles of queries and keys. cos, sin: (T, D / 2) float32, contiguous."""

    cos: Tensor
    sin: Tensor


class EmbeddingSettings(NamedTuple):
    """An `EmbeddingSettings` holds the embeddings' settings. Ids: (T,) int64, or None if there is no such table.

    padding_idx: the id whose row of word gets no gradient.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    eps: float
    padding_idx: int | None
    dropout: Dropout | None


class Normalized(NamedTuple):
    """A `Normalized` is the result of `norm_forward`.

    y: (T, H) in S. low: y in C if it was requested and C is not S, else None. total: (T, H) in C, the sum before the
    norm. mean, rstd: (T,) float32, of the unrounded sum.
    """

    y: Tensor
    low: Tensor | None
    total: Tensor
    mean: Tensor
    rstd: Tensor


class NormGradients(NamedTuple):
    """A `NormGradients` is the result of `norm_backward`.

    x: (T, H) in C. residual: (T, H) in S, or None. weight, bias, x_bias: (H,) float32.

    x_bias holds the sums of x over its rows: the gradient of a bias that was added to x.
    """

    x: Any
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    x_bias: Tensor


class Kernels(Protocol):
    """A `Kernels` has the passes of one backend. Parameters may be float32 if C is not; they are rounded to C first."""

    name: str

    def linear(self, x: Tensor, weights: Weights, biases: tuple[Tensor | None, ...]) -> Tensor:
        """Computes x W^T + b, (T, K) -> (T, M). W: the weights one above the other, (M, K)."""

    def activated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        """Computes activation(pre) and pre = x W^T + b, (T, M) each."""

    def input_gradient(self, grad: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        """Computes grad W + residual, (T, M) -> (T, K), in the residual's dtype, or grad's without one."""

    def weight_gradient(self, grad: Tensor, x: Tensor, to: dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Computes grad^T x, (M, K), and, if bias, the sums of grad over its rows, (M,), in dtype `to`."""

    def activation_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pre's gradient and activation(pre), (T, I) each, and the gradient's sums over rows, (I,) float32."""

    def attention_forward(
        self, qkv: Tensor, settings: Attention, position_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes (T, 3 N D) -> (T, N D), and the natural logarithm of the sums of exponentials, (N, T) float32.

        position_bias: (N, 2R + 1), see fastbert.ops.position_bias.
        """

    def attention_backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        settings: Attention,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns gradients: qkv's, (T, 3 N D), zeros in rows of no sequence; position_bias's, float32 at least."""

    def rotate(self, qkv: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        """Rotates queries and keys by their rows' angles, (T, 3 N D), perhaps in qkv's memory: see ops.rotary."""

    def rotate_back(self, grad: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        """Returns the gradient of `rotate`'s input, (T, 3 N D), perhaps in the memory of grad, which is contiguous."""

    def gated(self, pre: Tensor, activation: str) -> Tensor:
        """Computes activation(first half) * second half of each row, (T, 2 I) -> (T, I)."""

    def gated_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """Returns the gradient of pre, (T, 2 I), from grad, (T, I), and the result of `gated` again."""

    def norm_forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout: Dropout | None,
        low: bool,
    ) -> Normalized:
        """Computes LayerNorm(dropout(x) + residual) * weight + bias."""

    def norm_backward(
        self,
        grad: Tensor,
        grad_low: Tensor | None,
        saved: Any,
        weight: Tensor,
        dropout: Dropout | None,
        out_dropout: Dropout | None,
        want_residual: bool,
    ) -> NormGradients:
        """Returns the gradients from those of y and of low, which are added. saved: (total, mean, rstd).

        out_dropout: the dropout of y itself.
        """

    def embedding_forward(
        self,
        word: Tensor,
        token_type: Tensor | None,
        position: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        settings: EmbeddingSettings,
    ) -> Normalized:
        """Computes dropout(LayerNorm(sum of the tables' rows)), without `low`. Ids are int64 and contiguous."""

    def embedding_scatter(self, grad: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, to: dtype) -> Tensor:
        """Adds up the rows of grad, (T, E), by id: (n_rows, E) in dtype `to`, zeros for padding_idx."""

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        """Applies dropout to rows, (T, H)."""
