"""This module defines the interface of a backend for training: forward and backward passes without autograd.

T packed tokens, H hidden, I intermediate, N heads, D head size. C is the data type of products: float32, bfloat16 or
float16. S is the data type of the residual stream: C, or float32 under autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, dtype

from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import Dropout

Weights = tuple[Tensor, ...]


class Attention(NamedTuple):
    """The settings of one attention are a named tuple.

    batch: the packing of T rows in sequences. columns: (T,) int32, as in `PackedBatch`, for a position bias or a
    window. window: the number of columns that a query reaches on either side, None for all; a window excludes a
    position bias.
    """

    batch: PackedBatch
    num_heads: int
    scale: float
    dropout: Dropout | None
    columns: Tensor | None = None
    window: int | None = None


class Rotation(NamedTuple):
    """The rotation angles of queries and keys are stored as cos and sin: (T, D / 2) float32, contiguous."""

    cos: Tensor
    sin: Tensor


class EmbeddingSettings(NamedTuple):
    """The settings of the embeddings are a named tuple, without tables and norm.

    Ids: (T,) int64, or None if there is no such table. padding_idx: the id whose row gets no gradient.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    eps: float
    padding_idx: int | None
    dropout: Dropout | None


class Normalized(NamedTuple):
    """The result of `norm_forward` is a named tuple.

    y: (T, H) in S. low: y in C if it was requested and C is not S, else None. total: (T, H) in C, the sum that was
    normalised. mean, rstd: (T,) float32, of the unrounded sum.
    """

    y: Tensor
    low: Tensor | None
    total: Tensor
    mean: Tensor
    rstd: Tensor


class NormGradients(NamedTuple):
    """The result of `norm_backward` is a named tuple.

    x: (T, H) in C. residual: (T, H) in S, or None. weight, bias, x_bias: (H,) float32. x_bias holds the sums of x over
    its rows: the gradient of a bias that was added to x.
    """

    x: Any
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    x_bias: Tensor


class Kernels(Protocol):
    """This protocol has the passes of one backend. Float32 parameters are rounded to C first, if C is another type."""

    name: str

    def linear(self, x: Tensor, weights: Weights, biases: tuple[Tensor | None, ...]) -> Tensor:
        """Returns x W^T + b, (T, K) -> (T, M). W: the concatenated rows of the weights, (M, K)."""

    def activated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        """Returns activation(pre) and pre = x W^T + b, (T, M) each."""

    def input_gradient(self, grad: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        """Returns grad W + residual, (T, M) -> (T, K), in the residual's dtype, or in grad's dtype without residual."""

    def weight_gradient(self, grad: Tensor, x: Tensor, to: dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Returns grad^T x, (M, K), and with bias the sums of grad over its rows, (M,), both in dtype `to`."""

    def activation_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradient of pre and activation(pre), (T, I) each, and the sums of the gradient over rows.

        The sums are (I,) float32.
        """

    def attention_forward(
        self, qkv: Tensor, settings: Attention, position_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the output, (T, 3 N D) -> (T, N D), and the logarithms of the softmax denominators.

        These are natural logarithms, (N, T) float32. position_bias: (N, 2R + 1), see fastbert.ops.position_bias.
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
        """Returns the gradient of qkv, (T, 3 N D), zeros in padding rows; and of position_bias, in float32 or wider."""

    def rotate(self, qkv: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        """Returns queries and keys rotated by their rows' angles, (T, 3 N D), possibly in place: see ops.rotary."""

    def rotate_back(self, grad: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        """Returns the gradient of the rotation's input, (T, 3 N D), possibly in place of grad, which is contiguous."""

    def gated(self, pre: Tensor, activation: str) -> Tensor:
        """Returns activation(first half) * second half of each row, (T, 2 I) -> (T, I)."""

    def gated_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """Returns the gradient of pre, (T, 2 I), from that of the result of `gated`, (T, I), and that result again."""

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
        """Returns LayerNorm(dropout(x) + residual) * weight + bias."""

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

        out_dropout: a dropout of y itself.
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
        """Returns dropout(LayerNorm(sum of table rows)), without `low`. Ids are int64 and contiguous."""

    def embedding_scatter(self, grad: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, to: dtype) -> Tensor:
        """Returns the sums of grad's rows, (T, E), by id: (n_rows, E) in dtype `to`, with zeros for padding_idx."""

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        """Returns the rows, (T, H), with dropout."""
