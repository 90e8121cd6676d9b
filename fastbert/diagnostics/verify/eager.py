"""This module holds BERT in plain PyTorch, with which `verify` compares the model.

It runs padded, op by op, in the dtype of its parameters, as usual code without this library does. B sequences, S the
longest, H hidden, N heads, D head size, L layers, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.checkpoint.activations import activate
from fastbert.checkpoint.config import BertConfig
from fastbert.engine.block import Block, Distances, Linear, Norm
from fastbert.ops.disentangled import rows_of_distances


def eager_bert(
    parameters: Mapping[str, Tensor],
    blocks: Iterable[Block],
    config: BertConfig,
    input_ids: Tensor,
    mask: Tensor,
    token_type_ids: Tensor,
) -> list[Tensor]:
    """Returns L + 1 hidden states, (B, S, H), then the pooled output, (B, 1, H), in the dtype of the parameters.

    Hidden states at padding have no meaning. `reference.bert` in the same dtype is different: it also rounds inside its
    ops, and its error in bf16 is 1.6 times as large.
    """
    table = "embeddings.{}_embeddings.weight".format
    x = F.embedding(input_ids, parameters[table("word")])
    if table("token_type") in parameters:
        x = x + F.embedding(token_type_ids, parameters[table("token_type")])
    if table("position") in parameters:
        positions = reference.default_positions(config, input_ids, input_ids.shape, input_ids.device)
        x = x + F.embedding(positions, parameters[table("position")])
    if "embeddings.embed_proj.weight" in parameters:
        x = F.linear(x, parameters["embeddings.embed_proj.weight"].to(x.dtype))
    x = _norm(parameters, config, "embeddings", x)
    projected = "embeddings_project.weight" in parameters
    states = [_linear(parameters, "embeddings_project", x) if projected else x]
    for block in blocks:
        states.append(eager_layer(block, states[-1], mask))
    if "pooler.dense.weight" in parameters:
        states.append(eager_pooler(parameters, states[-1], mask))
    return states


def _linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"].to(x.dtype), parameters[f"{name}.bias"].to(x.dtype))


def _norm(parameters: Mapping[str, Tensor], config: BertConfig, name: str, x: Tensor) -> Tensor:
    weight, bias = (parameters.get(f"{name}.LayerNorm.{suffix}") for suffix in ("weight", "bias"))
    weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_eps)


def eager_layer(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Returns the output of a layer for x, (B, S, H), in the dtype of x. mask: (B, S), 0 at padding."""

    def linear(part: Linear, x: Tensor) -> Tensor:
        return F.linear(x, part.weight.to(x.dtype), None if part.bias is None else part.bias.to(x.dtype))

    def norm(part: Norm | None, x: Tensor) -> Tensor:
        if part is None:
            return x
        weight, bias = part.filled(x)
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), part.eps)

    normed, read = norm(block.attention_norm, x) if block.pre_norm else x, x
    norms = block.query_norm, block.key_norm, None
    q, k, v = (
        norm(of_part, linear(part, normed)).unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
        for part, of_part in zip((block.query, block.key, block.value), norms, strict=True)
    )  # (B, N, S, D)
    columns = torch.arange(x.shape[1], device=x.device)
    if block.rotary is not None:
        q, k = (_turned(part, columns, block.rotary, block.position_factor) for part in (q, k))
    padding = (mask == 0)[:, None, None, :]  # (B, 1, 1, S)
    scale = q.shape[-1] ** -0.5 if block.scale is None else block.scale
    scores = q @ k.transpose(-1, -2) * scale
    if block.distances is not None:
        scores = scores + _terms_of_distances(block.distances, q, k) * scale
    if block.position_bias is not None:
        scores = scores + _bias_of_columns(block.position_bias, x.shape[1]).to(x.dtype)
    if block.window is not None:
        padding = padding | ((columns - columns[:, None]).abs() > block.window)
    scores = scores.masked_fill(padding, torch.finfo(x.dtype).min)
    context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # (B, S, H)
    x = linear(block.out, context) + x
    normed = norm(block.output_norm if block.pre_norm else block.attention_norm, x)
    if block.second_norm is not None:
        normed = norm(block.second_norm, normed + read)
    inner = activate(linear(block.up, normed), block.activation)  # (B, S, I)
    if block.gate is not None:
        inner = inner * linear(block.gate, normed)
    inner = linear(block.down, inner)
    if block.convolution is not None:
        return _beside(block, norm(block.output_norm, inner + normed), read, mask)
    return norm(block.last_norm, inner + x) if block.pre_norm else norm(block.output_norm, inner + normed)


def _terms_of_distances(distances: Distances, q: Tensor, k: Tensor) -> Tensor:
    """Returns the terms that disentangled attention adds to q k^T, (B, N, S, S). q, k: (B, N, S, D)."""
    buckets = torch.tensor(rows_of_distances(*distances.buckets), device=q.device)
    radius, columns = len(buckets) // 2, torch.arange(q.shape[2], device=q.device)
    rows = buckets[(columns[:, None] - columns).clamp(-radius, radius) + radius]  # (S, S): the query's column first
    table, norm = distances.table.to(q.dtype), distances.norm
    if norm is not None:
        weight, bias = norm.filled(table)
        table = F.layer_norm(table, table.shape[-1:], weight.to(q.dtype), bias.to(q.dtype), norm.eps)
    terms: Any = 0
    for x, linear in ((q, distances.key), (k, distances.query)):
        if linear is None:
            continue
        other = F.linear(table, linear.weight.to(q.dtype), None if linear.bias is None else linear.bias.to(q.dtype))
        each = x @ other.unflatten(-1, (q.shape[1], -1)).permute(1, 2, 0)  # (B, N, S, 2R)
        term = each.gather(-1, (rows if x is q else rows.T).expand(*each.shape[:3], -1))
        terms = terms + (term if x is q else term.transpose(-1, -2))
    return terms


def _beside(block: Block, y: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Adds the convolution of the layer's input x to its output y, (B, S, H) each."""
    beside = block.convolution
    assert beside is not None
    weight, bias, x = beside.weight.to(x.dtype), beside.bias.to(x.dtype), x * (mask != 0)[..., None].to(x.dtype)
    half, groups = weight.shape[2] // 2, beside.groups
    x = F.conv1d(x.transpose(1, 2), weight, bias, padding=half, groups=groups).transpose(1, 2)
    scale, shift = beside.norm.filled(y)
    x = y + activate(x, beside.activation)
    return F.layer_norm(x, y.shape[-1:], scale.to(y.dtype), shift.to(y.dtype), beside.norm.eps)


def _turned(x: Tensor, positions: Tensor, base: float, factor: float) -> Tensor:
    """Applies rotary positions as transformers does: angles in float32, their cosines and sines in x's dtype."""
    size = x.shape[-1]
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size
    angles = positions[:, None].float() / factor / base**exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _bias_of_columns(table: Tensor, length: int) -> Tensor:
    """Returns the bias for each query and key: (N, 2R + 1) -> (N, S, S). Distances beyond R have the number of R."""
    radius, columns = table.shape[1] // 2, torch.arange(length, device=table.device)
    return table[:, (columns - columns[:, None]).clamp(-radius, radius) + radius]


def eager_pooler(parameters: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """Returns the pooled output: (B, S, H) -> (B, 1, H)."""
    first = x[:, :1] * mask[:, :1, None].to(x.dtype)  # zeros in a row without tokens
    return torch.tanh(_linear(parameters, "pooler.dense", first))
