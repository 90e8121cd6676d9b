"""The fused operations as the reference computes them: short, plain PyTorch, plain loops over packed sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.checkpoint.activations import OTHERS
from fastbert.reference.dropout import Dropout, drop_probabilities, drop_rows

POOLING_MODES = ("cls", "mean", "max", "weighted_mean", "last", "mean_sqrt_len")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var divided by H; (..., H) -> (..., H)."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def bias_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """layer_norm(dropout(x + bias) + residual); x and residual (T, H), the vectors (H,) -> (T, H)."""
    if bias is not None:
        x = x + bias
    x = drop_rows(x, dropout)
    if residual is not None:
        x = x + residual
    return layer_norm(x, weight, ln_bias, eps)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU, any shape. Hendrycks and Gimpel, arXiv:1606.08415.

    "none": x * Phi(x), Phi the normal distribution function, through erfc so that the left tail keeps its digits.
    "tanh": x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
    Raises ValueError for another `approximate`.
    """
    if approximate == "none":
        return x * 0.5 * torch.erfc(-x / math.sqrt(2))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x + bias); x (T, I), bias (I,) -> (T, I)."""
    return gelu(x + bias, approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ weight^T + bias); x (..., K), weight (M, K), bias (M,) -> (..., M).

    `activation` is None, "gelu" (erf), "gelu_tanh", "relu" or one of fastbert.checkpoint.activations.OTHERS; ValueError
    for another.
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if activation is None:
        return y
    if activation == "gelu":
        return gelu(y)
    if activation == "gelu_tanh":
        return gelu(y, "tanh")
    if activation == "relu":
        return torch.relu(y)
    if activation in OTHERS:
        return OTHERS[activation](y)
    raise ValueError(f"activation: got {activation!r}, expected None, 'gelu', 'gelu_tanh' or 'relu'")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each row, (T,), by the logits l = hidden @ weight^T + bias; 0 where the label is ignore_index.

    It is (1 - label_smoothing) (lse - l_y) + label_smoothing mean_j (lse - l_j) + z_loss lse^2, with the logarithm lse
    of sum_j exp(l_j). hidden (T, H), weight (V, H), bias (V,), labels y (T,).
    """
    logits = linear(hidden, weight, bias)
    lse = torch.logsumexp(logits, dim=1)
    labelled = labels != ignore_index
    target = logits.gather(1, torch.where(labelled, labels, 0)[:, None])[:, 0]
    smooth = lse - logits.mean(dim=1)
    losses = (1 - label_smoothing) * (lse - target) + label_smoothing * smooth + z_loss * lse.square()
    return torch.where(labelled, losses, 0)


def embedding_layer_norm(
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids]) -> (..., H).

    The ids have one shape, (T,) or (B, S), or broadcast to it. `inputs_embeds` (..., H), if given, stands in for the
    word rows and `input_ids` is ignored; `token_type_ids` None means type 0 everywhere. The tables are (V, H),
    (positions, H) and (types, H), the last None in a model without segments; weight and bias (H,) are the LayerNorm's.
    """
    x = word[input_ids] if inputs_embeds is None else inputs_embeds
    if token_type is not None:
        x = x + (token_type[0] if token_type_ids is None else token_type[token_type_ids])
    return layer_norm(x + position[position_ids], weight, bias, eps)


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    scale: float | None = None,
    dropout: Dropout | None = None,
    position_bias: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(q k^T * scale + bias)) v, bidirectional, within each packed sequence. (T, 3*H) -> (T, H).

    A row of `qkv` is [q | k | v], each (N, D); `cu_seqlens` (B+1,) integers from 0 to T, equal neighbours for an
    empty sequence; `scale` defaults to 1 / sqrt(D). `position_bias` (N, 2R+1): what is added for a key that stands
    -R to R columns after the query, and R's number for one farther away; `columns` (T,) are the rows' by default.
    """
    hidden = qkv.shape[1] // 3
    if scale is None:
        scale = (hidden // num_heads) ** -0.5
    outputs = [qkv.new_zeros(0, hidden)]
    for start, end in _spans(cu_seqlens):
        q, k, v = (x.unflatten(1, (num_heads, -1)).transpose(0, 1) for x in qkv[start:end].split(hidden, dim=1))
        scores = q @ k.transpose(1, 2) * scale  # (N, n, n)
        if position_bias is not None:
            radius = position_bias.shape[1] // 2
            places = torch.arange(start, end, device=qkv.device) if columns is None else columns[start:end].long()
            apart = (places[None, :] - places[:, None]).clamp(-radius, radius)  # key minus query
            scores = scores + position_bias[:, apart + radius]
        probabilities = torch.softmax(scores, dim=-1)
        rows, places = torch.arange(start, end)[None], torch.arange(end - start)[None]
        probabilities = drop_probabilities(probabilities[None], dropout, rows, places)[0]
        outputs.append((probabilities @ v).transpose(0, 1).flatten(1))  # (n, H)
    return torch.cat(outputs)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False) -> Tensor:
    """One vector for each packed sequence. hidden (T, H), cu_seqlens (B+1,) -> (B, H); zeros for an empty sequence.

    With x_1 .. x_n the rows of a sequence: "cls" x_1, "last" x_n, "max" the greatest of each column, "mean"
    sum(x_i) / n, "mean_sqrt_len" sum(x_i) / sqrt(n), "weighted_mean" sum(i * x_i) / sum(i). `normalize` then divides
    by max(||x||_2, 1e-12). Raises ValueError for another `mode`.
    """
    if mode not in POOLING_MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(POOLING_MODES)}")
    vectors = [hidden.new_zeros(0, hidden.shape[1])]
    for start, end in _spans(cu_seqlens):
        x, n = hidden[start:end], end - start
        if n == 0:
            vector = hidden.new_zeros(hidden.shape[1])
        elif mode == "cls":
            vector = x[0]
        elif mode == "last":
            vector = x[-1]
        elif mode == "max":
            vector = x.max(dim=0).values
        elif mode == "mean":
            vector = x.sum(dim=0) / n
        elif mode == "mean_sqrt_len":
            vector = x.sum(dim=0) / math.sqrt(n)
        else:
            weights = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
            vector = (weights[:, None] * x).sum(dim=0) / weights.sum()
        vectors.append(vector[None])
    pooled = torch.cat(vectors)
    if normalize:
        pooled = pooled / torch.linalg.vector_norm(pooled, dim=1, keepdim=True).clamp(min=1e-12)
    return pooled


def _spans(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    """The (start, end) of each packed sequence."""
    bounds = cu_seqlens.tolist()
    return zip(bounds[:-1], bounds[1:], strict=True)
