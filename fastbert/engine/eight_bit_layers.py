"""This module runs the layers of an 8-bit encoder with `fastbert.ops.quantized`, in all forms that have kernels.

T tokens, H hidden. Between the products of a layer, tensors have the model's dtype or are quantised by their kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert import ops
from fastbert.engine.block import Block, Convolution, Norm
from fastbert.ops import Policy, columns_around, quantized, quantized_parts
from fastbert.ops.angles import rotations_of
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantized import Quantized

# What layers may have beyond BERT's.
FEATURES = frozenset(
    ("pre_norm", "gate", "rotary", "position_bias", "window", "scale", "distances", "convolution", "query_norm",
     "second_norm")
)  # fmt: skip


# The arguments of bias + residual + LayerNorm: the rows, two of them optional, the norm's vectors, and eps.
_NormArguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class EightBitLayers:
    """This class runs the layers of a batch. weight_of(layer, name): an 8-bit product of the layer, and its bias."""

    blocks: list[Block]
    batch: PackedBatch
    weight_of: Callable[[int, str], tuple[Quantized, Tensor]]
    precision: str
    policy: Policy

    def run(self, x: Tensor, q: Quantized, keep_states: bool) -> list[Tensor]:
        """Returns the hidden states before the first layer and after each layer, or only the last.

        x: (T, H), the input of the first layer. q: the same in 8 bits.
        """
        states = [x]
        for i, block in enumerate(self.blocks):
            if i == 0 and block.pre_norm and block.attention_norm is not None:
                _, q = quantized.bias_residual_layer_norm(
                    x, None, None, *_norm(block.attention_norm), self.precision, policy=self.policy
                )
            run = self._pre_norm if block.pre_norm else self._post_norm
            x, q = run(i, x, q)
            states = [*states, x] if keep_states else [x]
        return states

    def _post_norm(self, i: int, x: Tensor, q: Quantized) -> tuple[Tensor, Quantized]:
        block, policy, before = self.blocks[i], self.policy, x
        y, bias = self._multiply(i, "out", self._attend(i, q, x.dtype), x.dtype)
        attended: _NormArguments = y, bias, x, *block.norms[0].arguments()
        if block.second_norm is not None:
            y = ops.bias_residual_layer_norm(*attended, policy=policy)
            attended = y, None, before, *block.second_norm.arguments()
        x, q = quantized.bias_residual_layer_norm(*attended, self.precision, policy=policy)
        y, bias = self._multiply(i, "down", self._feed(i, q), x.dtype)
        after: _NormArguments = y, bias, x, *block.output_norm.arguments()
        if block.convolution is not None:
            y = ops.bias_residual_layer_norm(*after, policy=policy)
            after = y + self._convolve(block.convolution, before), None, None, *block.convolution.norm.arguments()
        if i + 1 < len(self.blocks):
            return quantized.bias_residual_layer_norm(*after, self.precision, policy=policy)
        return ops.bias_residual_layer_norm(*after, policy=policy), q  # it is not multiplied in 8 bits

    def _pre_norm(self, i: int, x: Tensor, q: Quantized) -> tuple[Tensor, Quantized]:
        block, policy = self.blocks[i], self.policy
        y = self._product(i, "out", self._attend(i, q, x.dtype), x.dtype)
        x, q = quantized_parts.add_layer_norm(y, x, *_norm(block.output_norm), self.precision, policy=policy)
        y = self._product(i, "down", self._feed(i, q), x.dtype)
        if i + 1 == len(self.blocks):
            x = x + y
            last = block.last_norm
            return x if last is None else ops.bias_residual_layer_norm(x, None, None, *_norm(last), policy=policy), q
        norm = self.blocks[i + 1].attention_norm
        if norm is None:
            x = x + y
            return x, quantized_parts.rows(x, self.precision, rotated=self.precision == "int8", policy=policy)
        return quantized_parts.add_layer_norm(y, x, *_norm(norm), self.precision, policy=policy)

    def _convolve(self, beside: Convolution, x: Tensor) -> Tensor:
        """Computes the convolution of rows, (T, H), not in 8 bits."""
        product, rows = beside.product(), columns_around.beside(x, self.batch, beside.weight.shape[-1])
        convolved = ops.linear(rows, product.weight, product.bias, policy=self.policy)
        return ops.bias_gelu(convolved, None, beside.activation, policy=self.policy)

    def _multiply(self, i: int, name: str, q: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns a product, and the bias that the caller must add."""
        weight, bias = self.weight_of(i, name)
        return quantized.linear(q, weight, None, dtype, policy=self.policy), bias

    def _product(self, i: int, name: str, q: Quantized, dtype: torch.dtype) -> Tensor:
        return quantized.linear(q, *self.weight_of(i, name), dtype, policy=self.policy)

    def _attend(self, i: int, q: Quantized, dtype: torch.dtype) -> Quantized:
        """(T, H) -> (T, H), with a scale for each row and head."""
        block, batch, policy, precision = self.blocks[i], self.batch, self.policy, self.precision
        heads = block.num_heads
        qkv = self._product(i, "qkv", q, dtype)
        if block.query_norm is not None:
            qkv = ops.norm_queries_and_keys(qkv, *block.attention_norms(), policy=policy)
        if block.rotary is not None:
            angles = rotations_of(batch).tables(block.head_size, block.rotary, block.position_factor)
            qkv = ops.rotary(qkv, *angles, heads, policy=policy, fresh=True)
        if block.distances is not None:
            assert block.scale is not None
            positions = block.distances.project()
            context = ops.disentangled_attention(qkv, positions, batch, heads, scale=block.scale, policy=policy)
            return quantized_parts.rows(context, precision, block.head_size, policy=policy)
        if block.window is not None:
            return quantized_parts.windowed_attention(qkv, batch, heads, block.window, precision, policy=policy)
        return quantized.varlen_attention(
            qkv, batch, heads, precision, scale=block.scale, position_bias=block.position_bias, policy=policy
        )

    def _feed(self, i: int, q: Quantized) -> Quantized:
        """(T, H) -> (T, I), with a scale for every 128 columns."""
        weight, bias = self.weight_of(i, "up")
        block = self.blocks[i]
        if block.gate is None:
            return quantized.linear_quantized(q, weight, bias, block.activation, policy=self.policy)
        return quantized_parts.gated_linear(q, weight, bias, block.activation, policy=self.policy)


def _norm(norm: Norm) -> tuple[Tensor, Tensor | None, float]:
    assert norm.weight is not None
    return norm.weight, norm.bias, norm.eps
