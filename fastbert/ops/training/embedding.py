"""This module holds the embeddings as one node of autograd: the sum of the tables' rows, LayerNorm and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dropout as masks
from fastbert.ops.training.kernels import EmbeddingSettings, Kernels
from fastbert.ops.training.once import again, batched, once
from fastbert.ops.training.plain import PLAIN, sum_of_rows


def embedding(
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    settings: EmbeddingSettings,
    kernels: Kernels,
) -> Tensor:
    """Embeds (T,) ids -> (T, E) in the tables' dtype. Without input_ids, word is (T, E) and is read row by row."""
    y: Tensor = _Embedding.apply(word, token_type, position, weight, ln_bias, settings, kernels)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        word: Tensor,
        token_type: Tensor | None,
        position: Tensor | None,
        weight: Tensor,
        ln_bias: Tensor,
        settings: EmbeddingSettings,
        kernels: Kernels,
    ) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            done = kernels.embedding_forward(word, token_type, position, weight, ln_bias, settings)
        ctx.settings, ctx.kernels = settings, kernels
        # As with PyTorch's embeddings, tables may be written to before the backward pass, which needs only their
        # shapes.
        ctx.tables = word if settings.input_ids is not None or settings.dropout is None else None, token_type, position
        ctx.save_for_backward(weight, ln_bias, done.total, done.mean, done.rstd)
        return done.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, ln_bias, *saved = ctx.saved_tensors
        settings, differentiable = ctx.settings, torch.is_grad_enabled()
        if batched(grad) or (differentiable and settings.dropout is None):
            inputs = *ctx.tables, weight, ln_bias, None, None
            return again(_plain(settings), grad, inputs, ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            done = ctx.kernels.norm_backward(grad.contiguous(), None, saved, weight, None, settings.dropout, False)
            tables = _table_gradients(ctx, done.x)
        grads = *tables, done.weight.to(weight.dtype), done.bias.to(ln_bias.dtype), None, None
        return once(grads) if differentiable else grads


def _table_gradients(ctx: Any, rows: Tensor) -> list[Tensor | None]:
    """Returns the three tables' gradients from rows, the sum's gradients; for word rows itself if it is no table."""
    settings, kernels = ctx.settings, ctx.kernels
    ids_of_tables = settings.input_ids, settings.token_type_ids, settings.position_ids
    paddings = settings.padding_idx, None, None
    grads: list[Tensor | None] = []
    each = zip(ctx.tables, ids_of_tables, paddings, ctx.needs_input_grad[:3], strict=True)
    for place, (table, ids, padding_idx, needed) in enumerate(each):
        if not needed:
            grads.append(None)
        elif ids is None:
            grads.append(rows if place == 0 else None)
        else:
            grads.append(kernels.embedding_scatter(rows, ids, table.shape[0], padding_idx, table.dtype))
    return grads


def _plain(settings: EmbeddingSettings) -> Any:
    """Returns the embeddings in plain PyTorch, as a function of the inputs of their autograd node."""

    def function(
        word: Tensor, token_type: Tensor | None, position: Tensor | None, weight: Tensor, ln_bias: Tensor, *_: Any
    ) -> Tensor:
        x = sum_of_rows(word, token_type, position, settings)
        y = PLAIN.norm_forward(x, None, weight, ln_bias, settings.eps, None, False).y
        return masks.apply(y, settings.dropout)

    return function
