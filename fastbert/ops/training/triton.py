"""This module holds the training passes by Triton kernels. Products are cuBLAS's, except with GELU in the epilogue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import attention_plan, gelu
from fastbert.ops.columns_around import ranges_of
from fastbert.ops.dispatch import AUTO
from fastbert.ops.gemm import takes_our_gemm
from fastbert.ops.position_bias import for_kernel
from fastbert.ops.training.kernels import (
    Attention,
    EmbeddingSettings,
    Normalized,
    NormGradients,
    Rotation,
    Weights,
)
from fastbert.ops.training.plain import joined, joined_biases
from fastbert_kernels.masks import Dropout


class TritonKernels:
    """A `TritonKernels` runs the passes by Triton kernels, on CUDA devices and, under Triton's interpreter, on CPUs."""

    name = "triton"

    def linear(self, x: Tensor, weights: Weights, biases: tuple[Tensor | None, ...]) -> Tensor:
        return F.linear(x, joined(weights, x.dtype), joined_biases(weights, biases, x.dtype))

    def activated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        from fastbert_kernels.gelu import bias_gelu_forward
        from fastbert_kernels.linear import linear_forward

        (n_cols, k_size), obstacle = weight.shape, gelu.activation_obstacle(activation)
        if takes_our_gemm(x.dtype, activation, k_size, n_cols, False, x.device, self.name, False, obstacle):
            low, low_bias = joined((weight,), x.dtype), joined_biases((weight,), (bias,), x.dtype)
            low = low if low.stride(-1) == 1 else low.contiguous()
            pre = x.new_empty(x.shape[0], n_cols)
            return linear_forward(x, low, low_bias, activation, pre=pre), pre
        pre = self.linear(x, (weight,), (bias,))
        return bias_gelu_forward(pre, None, activation), pre

    def input_gradient(self, grad: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        weight = joined(weights, grad.dtype)
        if residual is None:
            return grad @ weight
        if residual.dtype == grad.dtype:
            return torch.addmm(residual, grad, weight)
        return residual + grad @ weight

    def weight_gradient(self, grad: Tensor, x: Tensor, to: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
        sums = grad.sum(0, dtype=torch.float32).to(to) if bias else None
        if to == grad.dtype or grad.device.type != "cuda":
            return (grad.t() @ x).to(to), sums
        return torch.mm(grad.t(), x, out_dtype=to), sums  # not rounded to 16 bits in between

    def activation_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        from fastbert_kernels.gelu import activation_backward

        return activation_backward(grad, pre, activation)

    def attention_forward(
        self, qkv: Tensor, settings: Attention, position_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention import varlen_attention_forward
        from fastbert_kernels.work_list import WorkList

        batch, num_heads, scale, dropout, columns, _ = settings
        head_size = qkv.shape[1] // (3 * num_heads)
        plan = attention_plan.triton_plan(batch, qkv.dtype, head_size, AUTO)
        tiles = WorkList(plan.tiles, plan.row_spans)
        config = configs.attention_config(qkv.dtype, head_size, launch.arch(qkv.device), plan.small).block_sizes
        lse = torch.empty(num_heads, qkv.shape[0], dtype=torch.float32, device=qkv.device)
        of_scores: Any = {"bias": for_kernel(position_bias, columns), "window": _window(settings)}
        sums: Any = {"dropout": dropout, "lse": lse}
        out = varlen_attention_forward(qkv, tiles, num_heads, scale, config=config, **sums, **of_scores)
        return out, lse

    def attention_backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        settings: Attention,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from fastbert_kernels.attention_backward import varlen_attention_backward

        batch, num_heads, scale, dropout, columns, _ = settings
        bias = for_kernel(position_bias, columns)
        head_size = qkv.shape[1] // (3 * num_heads)
        features = bias is not None, settings.window is not None
        plan = attention_plan.gradient_plan(batch, qkv.dtype, head_size, *features)
        want_bias = position_bias is not None and position_bias.requires_grad
        of_batch = plan, num_heads, scale, dropout
        of_scores: Any = {"bias": bias, "want_bias": want_bias, "window": _window(settings)}
        return varlen_attention_backward(grad, qkv, out, lse, *of_batch, **of_scores)

    def rotate(self, qkv: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        from fastbert_kernels.rotary import rotary_forward

        return rotary_forward(qkv, *rotation, num_heads, in_place=True)

    def rotate_back(self, grad: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
        from fastbert_kernels.rotary import rotary_backward

        return rotary_backward(grad, *rotation, num_heads)

    def gated(self, pre: Tensor, activation: str) -> Tensor:
        from fastbert_kernels.gated import gated_forward

        return gated_forward(pre, activation)

    def gated_backward(self, grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        from fastbert_kernels.gated import gated_backward

        out = torch.empty_like(grad)
        return gated_backward(grad, pre, activation, out), out

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
        from fastbert_kernels.layer_norm import residual_norm_forward

        return Normalized(*residual_norm_forward(x, None, residual, weight, bias, eps, dropout, low))

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
        from fastbert_kernels.layer_norm_backward import residual_norm_backward

        total, mean, rstd = saved
        gradients = residual_norm_backward(
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
        from fastbert_kernels.embedding import embedding_norm_forward

        input_ids, token_type_ids, position_ids, eps, _, dropout = settings
        tables = word, token_type, position, weight, bias
        done = embedding_norm_forward(
            input_ids, token_type_ids, position_ids, *tables, eps, dropout, word.dtype, low=False
        )
        return Normalized(*done)

    def embedding_scatter(
        self, grad: Tensor, ids: Tensor, n_rows: int, padding_idx: int | None, to: torch.dtype
    ) -> Tensor:
        from fastbert_kernels.embedding_backward import embedding_backward, segments_of

        return embedding_backward(grad, segments_of(ids, n_rows), to, padding_idx)

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        from fastbert_kernels.dropout_rows import dropout_forward

        return dropout_forward(x, dropout)


def _window(settings: Attention) -> Any:
    """Returns the kernels' argument for a window, or None."""
    from fastbert_kernels.attention_window import Window

    window = settings.window
    if window is None:
        return None
    return Window(window, ranges_of(settings.batch, window))
