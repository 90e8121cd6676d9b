"""This module holds the training passes in plain PyTorch, for every device and dtype. They check other backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoint.activations import activate
from fastbert.ops import dropout as masks
from fastbert.ops.packing import PackedBatch, to_device
from fastbert.ops.position_bias import gradient, of_rows
from fastbert.ops.rotary import rotate_rows
from fastbert.ops.training.kernels import (
    Attention,
    EmbeddingSettings,
    Normalized,
    NormGradients,
    Rotation,
    Weights,
)
from fastbert_kernels.masks import GROUP, Dropout

WINDOW_BLOCK = 64  # the fewest queries of a block within a window


def joined(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Returns the tensors one above the other, in a dtype."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype)


def joined_biases(weights: Weights, biases: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor | None:
    """Returns the biases one above the other, with zeros for a bias of None; None if all are None."""
    if all(bias is None for bias in biases):
        return None
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return joined(tuple(filled), dtype)


def wide(x: Tensor) -> Tensor:
    """Returns the tensor in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Plain:
    """A `Plain` has the passes in plain PyTorch."""

    name = "torch"

    def linear(self, x: Tensor, weights: Weights, biases: tuple[Tensor | None, ...]) -> Tensor:
        return F.linear(x, joined(weights, x.dtype), joined_biases(weights, biases, x.dtype))

    def activated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        pre = self.linear(x, (weight,), (bias,))
        return activate(pre, activation), pre

    def input_gradient(self, grad: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        out = grad @ joined(weights, grad.dtype)
        return out if residual is None else residual + out

    def weight_gradient(self, grad: Tensor, x: Tensor, to: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
        return (grad.t() @ x).to(to), wide(grad).sum(0).to(to) if bias else None

    def activation_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = wide(pre).detach().requires_grad_()
            activated = activate(leaf, activation)
        (grad_pre,) = torch.autograd.grad(activated, leaf, wide(grad))
        return grad_pre.to(pre.dtype), activated.detach().to(pre.dtype), grad_pre.sum(0)

    def attention_forward(
        self, qkv: Tensor, settings: Attention, position_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        n_rows, head_size = qkv.shape[0], qkv.shape[1] // (3 * settings.num_heads)
        out = qkv.new_zeros(n_rows, settings.num_heads, head_size)
        lse = wide(qkv).new_zeros(settings.num_heads, n_rows)
        for rows in groups(settings.batch):
            q, k, v = _heads(qkv, rows, settings.num_heads)
            for part in _parts(rows, settings):
                scores = part.scores(q, k, settings, position_bias)
                p = torch.softmax(scores, -1) * part.kept(settings, scores.dtype)
                out[part.rows] = (p @ v[:, :, part.keys]).transpose(1, 2).to(qkv.dtype)
                lse[:, part.rows] = torch.logsumexp(scores, -1).transpose(0, 1)
        return out.flatten(1), lse

    def attention_backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        settings: Attention,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        wants_bias = position_bias is not None and position_bias.requires_grad
        grad_bias = torch.zeros_like(wide(position_bias)) if wants_bias else None  # type: ignore[arg-type]
        grad_qkv = torch.zeros_like(qkv, memory_format=torch.contiguous_format)
        for rows in groups(settings.batch):
            q, k, v = _heads(qkv, rows, settings.num_heads)
            d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
            for part in _parts(rows, settings):
                queries, keys = part.queries, part.keys
                d_out, o = (_split(t, part.rows, settings.num_heads) for t in (grad, out))
                kept = part.kept(settings, q.dtype)
                scores = part.scores(q, k, settings, position_bias)
                p = torch.exp(scores - lse[:, part.rows].transpose(0, 1)[..., None])
                d_p = d_out @ v[:, :, keys].transpose(-1, -2) * kept
                d_s = p * (d_p - (d_out * o).sum(-1, keepdim=True))
                if grad_bias is not None:
                    columns = rows - rows[:, :1] if settings.columns is None else settings.columns[rows]
                    grad_bias = grad_bias + gradient(grad_bias, d_s.to(grad_bias.dtype), columns)
                d_s = d_s * settings.scale
                d_q[:, :, queries] = d_s @ k[:, :, keys]
                d_k[:, :, keys] += d_s.transpose(-1, -2) @ q[:, :, queries]
                d_v[:, :, keys] += (p * kept).transpose(-1, -2) @ d_out
            d_qkv = torch.stack([d_q, d_k, d_v])  # (3, sequences, N, length, D)
            grad_qkv[rows] = d_qkv.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)
        return grad_qkv, grad_bias

    def rotate(self, qkv: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        return rotate_rows(qkv, *rotation, num_heads)

    def rotate_back(self, grad: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        return rotate_rows(grad, rotation.cos, -rotation.sin, num_heads)

    def gated(self, pre: Tensor, activation: str) -> Tensor:
        first, second = pre.chunk(2, dim=-1)
        return activate(first, activation) * second

    def gated_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = wide(pre).detach().requires_grad_()
            out = self.gated(leaf, activation)
        (grad_pre,) = torch.autograd.grad(out, leaf, wide(grad))
        return grad_pre.to(pre.dtype), out.detach().to(pre.dtype)

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
        stream = x.dtype if residual is None else residual.dtype
        total = masks.apply(wide(x), dropout)
        total = total if residual is None else total + wide(residual)
        mean = total.mean(-1)
        rstd = torch.rsqrt((total - mean[:, None]).square().mean(-1) + eps)
        y = (total - mean[:, None]) * rstd[:, None] * weight + bias
        rounded = y.to(x.dtype) if low and stream != x.dtype else None
        return Normalized(y.to(stream), rounded, total.to(x.dtype), mean, rstd)

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
        total, mean, rstd = saved
        d_y = masks.apply(wide(grad) if grad_low is None else wide(grad) + wide(grad_low), out_dropout)
        x_hat = (wide(total) - mean[:, None]) * rstd[:, None]
        d_hat = d_y * weight
        projected = d_hat.mean(-1, keepdim=True) + x_hat * (d_hat * x_hat).mean(-1, keepdim=True)
        d_total = (d_hat - projected) * rstd[:, None]
        d_x = masks.apply(d_total, dropout)
        x = d_x.to(total.dtype)
        residual = None
        if want_residual:
            residual = x if dropout is None and grad.dtype == total.dtype else d_total.to(grad.dtype)
        return NormGradients(x, residual, (d_y * x_hat).sum(0), d_y.sum(0), d_x.sum(0))

    def embedding_forward(
        self,
        word: Tensor,
        token_type: Tensor | None,
        position: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        settings: EmbeddingSettings,
    ) -> Normalized:
        x = sum_of_rows(word, token_type, position, settings)
        done = self.norm_forward(x, None, weight, bias, settings.eps, None, False)
        return done._replace(y=masks.apply(done.y, settings.dropout))

    def embedding_scatter(
        self, grad: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, to: torch.dtype
    ) -> Tensor:
        padding = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_dense_backward(wide(grad), ids, n_rows, padding, False).to(to)

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        return masks.apply(x, dropout)


PLAIN = Plain()


def sum_of_rows(
    word: Tensor, token_type: Tensor | None, position: Tensor | None, settings: EmbeddingSettings
) -> Tensor:
    """Returns the sum of the tables' rows, (T, E), in differentiable PyTorch."""
    input_ids, token_type_ids, position_ids, _, padding_idx, _ = settings
    x = word if input_ids is None else F.embedding(input_ids, word, padding_idx)
    if token_type is not None and token_type_ids is not None:
        x = x + F.embedding(token_type_ids, token_type)
    return x if position is None or position_ids is None else x + F.embedding(position_ids, position)


def groups(batch: PackedBatch) -> list[Tensor]:
    """Returns the rows of sequences of equal length together, (sequences, length) each."""

    def make() -> list[Tensor]:
        offsets = batch.cu_seqlens_cpu.long()
        lengths = offsets.diff()
        starts, distinct = offsets[:-1], torch.unique(lengths[lengths > 0]).tolist()
        rows = [starts[lengths == n][:, None] + torch.arange(n, device="cpu") for n in distinct]
        return [to_device(r, batch.device) for r in rows]

    groups: list[Tensor] = batch.plan("rows by length", make)
    return groups


def _split(x: Tensor, rows: Tensor, num_heads: int) -> Tensor:
    """Splits heads, (T, N D) -> (sequences, N, length, D), in float32 at least."""
    return wide(x[rows]).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _heads(qkv: Tensor, rows: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return tuple(_split(part, rows, num_heads) for part in qkv.chunk(3, dim=1))


class _Part(NamedTuple):
    """A `_Part` holds queries of sequences of equal length, and the keys in reach. all_rows: (sequences, length)."""

    all_rows: Tensor
    queries: slice
    keys: slice

    @property
    def rows(self) -> Tensor:
        return self.all_rows[:, self.queries]

    def scores(self, q: Tensor, k: Tensor, settings: Attention, position_bias: Tensor | None) -> Tensor:
        """Returns scores with bias, (sequences, N, queries, keys), and -inf for keys out of a query's reach."""
        scores = q[:, :, self.queries] @ k[:, :, self.keys].transpose(-1, -2) * settings.scale
        if position_bias is not None:
            return scores + of_rows(wide(position_bias), settings.columns, self.all_rows, *self.all_rows.shape)
        if settings.window is None:
            return scores
        columns = self.all_rows if settings.columns is None else settings.columns[self.all_rows]
        far = (columns[:, self.queries, None] - columns[:, None, self.keys]).abs() > settings.window
        return scores.masked_fill(far[:, None], -torch.inf)

    def kept(self, settings: Attention, dtype: torch.dtype) -> Tensor | float:
        """Returns the dropout factors of probabilities, (sequences, N, queries, keys) in their dtype, or 1."""
        dropout = settings.dropout
        if dropout is None:
            return 1.0
        n_keys = self.keys.stop - self.keys.start
        mask = masks.keep(self.rows, n_keys, dropout, settings.num_heads, self.keys.start)
        return mask.to(dtype) * dropout.scale


def _parts(rows: Tensor, settings: Attention) -> Iterator[_Part]:
    """Yields all queries of some sequences at once, or within a window one block of queries after the other."""
    length, window = rows.shape[1], settings.window
    block = length if window is None else max(window, WINDOW_BLOCK)
    for start in range(0, length, block):
        end = min(start + block, length)
        if window is None:
            yield _Part(rows, slice(start, end), slice(0, length))
        else:  # a group of columns with one draw of dropout begins at a multiple of its size
            first = max(start - window, 0) // GROUP * GROUP
            yield _Part(rows, slice(start, end), slice(first, min(end + window, length)))
