"""DeBERTa-v2 and -v3 as the reference computes them, on padded (B, S) inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.reference.ops import layer_norm, linear


@dataclass(frozen=True)
class DebertaSettings:
    """The settings of an encoder, under the names of its config.json.

    position_buckets: buckets on either side, or -1 for none. max_relative_positions: the distance at which they end.
    pos_att_type: "c2p", "p2c" or both. share_att_key: whether positions go through the projections of the tokens.
    norm_rel_ebd: whether the table of distances is normalised. position_biased_input: whether a table of positions is
    added to the embeddings. conv_kernel_size: of the convolution beside the first layer, 0 for none.
    relative_attention: whether scores have the terms of pos_att_type; else they are divided as if they had.
    """

    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    activation: str
    position_buckets: int
    max_relative_positions: int
    pos_att_type: tuple[str, ...]
    share_att_key: bool
    norm_rel_ebd: bool
    position_biased_input: bool
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    relative_attention: bool = True


@dataclass(frozen=True)
class DebertaReference:
    """The result of `deberta`. Rows at padding positions are zero everywhere."""

    last_hidden_state: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, S, H): the embeddings, then each layer
    attentions: tuple[Tensor, ...]  # L of (B, N, S, S)


def bucket(distance: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of a distance in columns, with its sign: exact up to n_buckets / 2, then logarithmic.

    distance: integers, any shape -> int64. Logarithms are float32, as in the published model.
    """
    middle = n_buckets // 2
    size = distance.abs().clamp(min=middle - 1)
    size = torch.where(distance.abs() < middle, torch.full_like(size, middle - 1), size)
    scale = torch.log(torch.tensor((max_distance - 1) / middle))
    far = torch.ceil(torch.log(size / middle) / scale * (middle - 1)) + middle
    return torch.where(size <= middle, distance.to(far.dtype), far * distance.sign()).long()


def disentangled_scores(
    q: Tensor,
    k: Tensor,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    buckets: Tensor,
    terms: int | None = None,
) -> Tensor:
    """The scores of disentangled attention, (B, N, S, S), scaled.

    s_ij = (q_i k_j + q_i pk[b_ij] + k_j pq[b_ij]) / sqrt(D * terms), b_ij the bucket of the query's column minus the
    key's, from 0. q, k: (B, N, S, D). position_keys, position_queries: (N, 2R, D), or None for a term that is not
    there. buckets: (S, S) int64. terms: how many there are, by default with q_i k_j those that are given.
    Source: He et al., "DeBERTa", 2020, arXiv:2006.03654, equation 4.
    """
    terms = terms or 1 + (position_keys is not None) + (position_queries is not None)
    scores = q @ k.transpose(-1, -2)
    if position_keys is not None:  # content to position
        by_bucket = q @ position_keys.transpose(-1, -2)  # (B, N, S, 2R)
        scores = scores + by_bucket.gather(-1, buckets.expand(*scores.shape))
    if position_queries is not None:  # position to content
        by_bucket = k @ position_queries.transpose(-1, -2)
        scores = scores + by_bucket.gather(-1, buckets.T.expand(*scores.shape)).transpose(-1, -2)
    return scores / math.sqrt(q.shape[-1] * terms)


def deberta(
    params: Mapping[str, Tensor],
    settings: DebertaSettings,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
) -> DebertaReference:
    """The encoder of DeBERTa-v2 and -v3. Parameters go by transformers' names, each behind `prefix`.

    input_ids: (B, S), or inputs_embeds: (B, S, E). attention_mask: (B, S), nonzero = valid. token_type_ids: (B, S), for
    models that have segments. position_ids: (B, S), for models that add positions to the embeddings; distances in
    attention go by columns whatever they are. Sources: He et al., arXiv:2006.03654 and arXiv:2111.09543.
    """

    def has(name: str) -> bool:
        return prefix + name in params

    def p(name: str) -> Tensor:
        return params[prefix + name].to(dtype)

    def dense(name: str, x: Tensor, activation: str | None = None) -> Tensor:
        return linear(x, p(f"{name}.weight"), p(f"{name}.bias") if has(f"{name}.bias") else None, activation)

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, p(f"{name}.weight"), p(f"{name}.bias"), settings.layer_norm_eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (settings.num_attention_heads, -1)).transpose(-3, -2)

    first = input_ids if inputs_embeds is None else inputs_embeds
    assert first is not None
    n_columns = first.shape[1]
    valid = torch.ones(first.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask != 0
    valid = valid.to(first.device)
    padding = ~valid[:, :, None]
    columns = torch.arange(n_columns, device=first.device)

    x = p("embeddings.word_embeddings.weight")[input_ids] if inputs_embeds is None else inputs_embeds.to(dtype)
    if settings.position_biased_input:
        x = x + p("embeddings.position_embeddings.weight")[columns[None] if position_ids is None else position_ids]
    if has("embeddings.token_type_embeddings.weight"):
        segments = p("embeddings.token_type_embeddings.weight")
        x = x + (segments[0] if token_type_ids is None else segments[token_type_ids])
    if has("embeddings.embed_proj.weight"):
        x = dense("embeddings.embed_proj", x)
    x = norm("embeddings.LayerNorm", x).masked_fill(padding, 0)

    distance = columns[:, None] - columns[None, :]
    reach = settings.max_relative_positions
    if settings.position_buckets > 0:
        distance = bucket(distance, settings.position_buckets, settings.max_relative_positions)
        reach = settings.position_buckets
    buckets = (distance + reach).clamp(0, 2 * reach - 1)
    table = p("encoder.rel_embeddings.weight")[: 2 * reach] if settings.relative_attention else None
    table = norm("encoder.LayerNorm", table) if settings.norm_rel_ebd and table is not None else table

    seen = valid[:, None, :, None] & valid[:, None, None, :]
    states, attentions = [x], []
    for i in range(settings.num_hidden_layers):
        own = f"encoder.layer.{i}.attention.self"
        q, k, v = (heads(dense(f"{own}.{part}_proj", x)) for part in ("query", "key", "value"))
        names = ("key_proj", "query_proj") if settings.share_att_key else ("pos_key_proj", "pos_query_proj")
        position_keys, position_queries = (
            heads(dense(f"{own}.{name}", table)) if term in settings.pos_att_type and table is not None else None
            for name, term in zip(names, ("c2p", "p2c"), strict=True)
        )
        terms = 1 + len(settings.pos_att_type)
        scores = disentangled_scores(q, k, position_keys, position_queries, buckets, terms)
        scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(~seen, 0)
        attentions.append(probabilities)
        context = (probabilities @ v).transpose(1, 2).flatten(2)
        out = f"encoder.layer.{i}.attention.output"
        y = norm(f"{out}.LayerNorm", dense(f"{out}.dense", context) + x)
        inner = dense(f"encoder.layer.{i}.intermediate.dense", y, settings.activation)
        out = f"encoder.layer.{i}.output"
        y = norm(f"{out}.LayerNorm", dense(f"{out}.dense", inner) + y).masked_fill(padding, 0)
        if i == 0 and settings.conv_kernel_size > 0:
            y = _beside_convolution(x, y, settings, p, norm, padding)
        x = y
        states.append(x)
    return DebertaReference(x, tuple(states), tuple(attentions))


def _beside_convolution(
    x: Tensor,
    y: Tensor,
    settings: DebertaSettings,
    p: Callable[[str], Tensor],
    norm: Callable[[str, Tensor], Tensor],
    padding: Tensor,
) -> Tensor:
    """norm(y + activation(convolution of x over columns)), zero at padding: the layer beside the first one."""
    if x.shape[1] == 0:  # PyTorch convolves no row of length 0
        return y
    convolved = torch.nn.functional.conv1d(
        x.transpose(1, 2),
        p("encoder.conv.conv.weight"),
        p("encoder.conv.conv.bias"),
        padding=(settings.conv_kernel_size - 1) // 2,
        groups=settings.conv_groups,
    ).transpose(1, 2)
    convolved = convolved.masked_fill(padding, 0)
    convolved = torch.tanh(convolved) if settings.conv_act == "tanh" else _activated(convolved, settings.conv_act)
    return norm("encoder.conv.LayerNorm", y + convolved).masked_fill(padding, 0)


def _activated(x: Tensor, activation: str) -> Tensor:
    return linear(x, torch.eye(x.shape[-1], dtype=x.dtype), None, activation)
