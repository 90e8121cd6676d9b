"""This module runs the layers of an 8-bit encoder in plain PyTorch, with all features of a `Block`.

Results are close to those of the C++ kernels. T tokens, H hidden, I intermediate, D head size. A row that multiplies a
weight has one scale, a row of attention one for each head, and a row of an activation one for every 128 columns, as in
`fastbert.ops.quantized`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbert import ops
from fastbert.engine.block import Block, Convolution, Norm
from fastbert.ops import columns_around, gelu, recording
from fastbert.ops.dispatch import Policy
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantize import DTYPES, OUT_GROUP, Quantized

TORCH = Policy("torch", strict=True)
# What layers may have beyond BERT's.
FEATURES = frozenset(
    ("pre_norm", "gate", "rotary", "position_bias", "window", "scale", "distances", "convolution", "query_norm",
     "second_norm")
)  # fmt: skip


def run_layers(
    blocks: list[Block],
    x: Tensor,
    batch: PackedBatch,
    position_ids: Tensor,
    weight_of: Callable[[int, str], tuple[Quantized, Tensor]],
    precision: str,
    keep_states: bool,
) -> list[Tensor]:
    """(T, H) -> the hidden states before the first layer and after each layer, or only the last.

    position_ids: (T,). weight_of(layer, name): a product of `Block.products` in 8 bits, and its bias.
    """
    states = [x]
    for i, block in enumerate(blocks):
        x = _run_layer(i, block, x, batch, position_ids, weight_of, precision)
        states = [*states, x] if keep_states else [x]
    return states


def _run_layer(
    i: int,
    block: Block,
    x: Tensor,
    batch: PackedBatch,
    position_ids: Tensor,
    weight_of: Callable[[int, str], tuple[Quantized, Tensor]],
    precision: str,
) -> Tensor:
    def multiply(name: str, q: Quantized, dtype: torch.dtype = x.dtype) -> Tensor:
        return ops.quantized.linear(q, *weight_of(i, name), dtype, policy=TORCH)

    heads, rotated, beside, entering = block.num_heads, precision == "int8", block.convolution, x
    qkv = multiply("qkv", quantize(_norm(x, block.attention_norm) if block.pre_norm else x, precision, rotated=rotated))
    if block.query_norm is not None:
        qkv = ops.norm_queries_and_keys(qkv, *block.attention_norms(), policy=TORCH)
    if block.rotary is not None:
        angles = ops.rotations(position_ids, block.head_size, block.rotary, block.position_factor)
        qkv = ops.rotary(qkv, *angles, heads, policy=TORCH)
    if block.distances is None:
        context = ops.varlen_attention(
            qkv, batch, heads, scale=block.scale, position_bias=block.position_bias, window=block.window, policy=TORCH
        )
    else:
        assert block.scale is not None
        positions = block.distances.project()
        context = ops.disentangled_attention(qkv, positions, batch, heads, scale=block.scale, policy=TORCH)
    y = multiply("out", quantize(context, precision, block.head_size)) + x
    x = y if block.pre_norm else _norm(y, block.attention_norm)
    if block.second_norm is not None:
        x = _norm(x + entering, block.second_norm)
    normed = _norm(y, block.output_norm) if block.pre_norm else x
    inner = multiply("up", quantize(normed, precision, rotated=rotated), torch.float32)
    if block.gate is None:
        inner = gelu.activate(inner, block.activation)
    else:
        first, second = inner.chunk(2, dim=-1)
        inner = gelu.activate(first, block.activation) * second
    y = multiply("down", quantize(inner, precision, OUT_GROUP)) + x
    y = y if block.pre_norm else _norm(y, block.output_norm)
    if beside is not None:
        y = _norm(y + _convolve(beside, entering, batch), beside.norm)
    return _norm(y, block.last_norm)


def _convolve(beside: Convolution, x: Tensor, batch: PackedBatch) -> Tensor:
    """Computes the convolution of rows, (T, H), not in 8 bits."""
    product = beside.product()
    rows = columns_around.beside(x, batch, beside.weight.shape[-1])
    return ops.bias_gelu(
        ops.linear(rows, product.weight, product.bias, policy=TORCH), None, beside.activation, policy=TORCH
    )


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    return ops.bias_residual_layer_norm(x, None, None, *norm.filled(x), norm.eps, policy=TORCH)


def quantize(x: Tensor, precision: str, group: int | None = None, *, rotated: bool = False) -> Quantized:
    """Works as `ops.quantized.quantize`, and returns stand-ins in a dry run."""
    if not (recording.on and recording.is_dry()):
        return ops.quantized.quantize(x, precision, group, rotated=rotated)
    group = min(group or x.shape[1], x.shape[1])
    shape = x.shape[0], -(-x.shape[1] // group)
    data = recording.stand_in(tuple(x.shape), DTYPES[precision])
    return Quantized(data, recording.stand_in(shape, torch.float32), group)
