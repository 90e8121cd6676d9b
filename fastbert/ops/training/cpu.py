"""This module holds the training passes by the C++ kernels for CPUs, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops.packed_linear import LEAST_ROWS
from fastbert.ops.training.kernels import (
    Attention,
    EmbeddingSettings,
    Normalized,
    NormGradients,
    Rotation,
    Weights,
)
from fastbert.ops.training.plain import PLAIN, joined_biases
from fastbert_kernels import cpu
from fastbert_kernels.masks import Dropout


class CpuKernels:
    """A `CpuKernels` runs the passes by C++ kernels. Rows are contiguous. Each product packs its weights again."""

    name = "cpu"

    def linear(self, x: Tensor, weights: Weights, biases: tuple[Tensor | None, ...]) -> Tensor:
        if len(x) < LEAST_ROWS:
            return PLAIN.linear(x, weights, biases)
        bias = joined_biases(weights, biases, x.dtype)
        return cpu.linear_forward(x, cpu.pack_weights(_values(weights), x.dtype), _n_rows(weights), bias)

    def activated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        if len(x) < LEAST_ROWS:
            return PLAIN.activated_linear(x, weight, bias, activation)
        pre = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="cpu")
        bias = joined_biases((weight,), (bias,), x.dtype)
        packed = cpu.pack_weights(_values((weight,)), x.dtype)
        return cpu.linear_forward(x, packed, weight.shape[0], bias, activation, pre=pre), pre

    def input_gradient(self, grad: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        if len(grad) < LEAST_ROWS:
            return PLAIN.input_gradient(grad, weights, residual)
        packed, size = cpu.pack_weights(_values(weights), grad.dtype, transposed=True), weights[0].shape[1]
        if residual is None or residual.dtype == grad.dtype:
            return cpu.linear_forward(grad, packed, size, None, residual=residual)
        return residual + cpu.linear_forward(grad, packed, size, None)

    def weight_gradient(self, grad: Tensor, x: Tensor, to: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
        weight, sums = cpu.weight_gradient(grad, x, to, bias)
        return weight, None if sums is None else sums.to(to)

    def activation_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        return cpu.activation_backward(grad, pre, activation)

    def attention_forward(
        self, qkv: Tensor, settings: Attention, position_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, num_heads, scale, dropout, _, _ = settings
        of_scores = _bias_and_window(settings, position_bias)
        return cpu.attention_training_forward(qkv, batch.cu_seqlens_cpu, num_heads, scale, dropout, *of_scores)

    def attention_backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        settings: Attention,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, num_heads, scale, dropout, _, _ = settings
        of_scores = _bias_and_window(settings, position_bias)
        return cpu.attention_backward(grad, qkv, out, lse, batch.cu_seqlens_cpu, num_heads, scale, dropout, *of_scores)

    def rotate(self, qkv: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        return cpu.rotary_forward(qkv, *rotation, num_heads)

    def rotate_back(self, grad: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        return cpu.rotary_backward(grad, *rotation, num_heads)

    def gated(self, pre: Tensor, activation: str) -> Tensor:
        return cpu.gated_forward(pre, activation)

    def gated_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        return cpu.gated_backward(grad, pre, activation)

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
        return Normalized(*cpu.residual_norm_forward(x, None, residual, weight, bias, eps, dropout, low))

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
        gradients = cpu.residual_norm_backward(
            grad, grad_low, total, mean, rstd, weight, dropout, out_dropout, want_residual
        )
        return NormGradients(*gradients)

    def embedding_forward(
        self,
        word: Tensor,
        token_type: Tensor | None,
        position: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        settings: EmbeddingSettings,
    ) -> Normalized:
        input_ids, token_type_ids, position_ids, eps, _, dropout = settings
        assert position is not None and position_ids is not None, "the C++ kernel reads a table of positions"
        done = cpu.embedding_norm_forward(
            input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, eps, dropout, word.dtype
        )
        return Normalized(*done)

    def embedding_scatter(
        self, grad: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, to: torch.dtype
    ) -> Tensor:
        return cpu.embedding_scatter(grad, ids, n_rows, padding_idx, to)

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        return cpu.dropout_forward(x, dropout)


def _bias_and_window(settings: Attention, position_bias: Tensor | None) -> tuple[cpu.PositionBias | None, int]:
    """Returns the kernels' arguments for a position bias, or for a window, whose bias removes far keys."""
    window, columns = settings.window, settings.columns
    if window is not None:
        return cpu.PositionBias(cpu.window_bias(settings.num_heads, window), columns), window
    return None if position_bias is None else cpu.PositionBias.of(position_bias, columns), -1


def _values(weights: Weights) -> list[Tensor]:
    return [w.detach() for w in weights]


def _n_rows(weights: Weights) -> int:
    return sum(w.shape[0] for w in weights)
