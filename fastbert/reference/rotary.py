"""Encoders with rotary positions and gated activations as the reference computes them: ModernBERT, Nomic, GTE.

Inputs are padded, (B, S). Parameters go by the names of transformers' models. Angles, their sines and cosines are
float32 in any dtype, as in the published models; everything else is in the dtype that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.reference.ops import layer_norm, linear


@dataclass(frozen=True)
class RotaryLayers:
    """The layers of such an encoder, as numbers.

    activation: of the gated part, as in `reference.linear`. inverse_frequencies: for each layer (D / 2,) float32,
    radians a position. windows: for each layer how many columns attention reaches on either side, or None for all.
    """

    num_heads: int
    activation: str
    eps: float
    inverse_frequencies: tuple[Tensor, ...]
    windows: tuple[int | None, ...]


@dataclass(frozen=True)
class RotaryReference:
    """The result of an encoder. Rows at padding positions are zero everywhere."""

    last_hidden_state: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, S, H): the embeddings, then each layer before any last norm
    attentions: tuple[Tensor, ...] = ()  # L of (B, N, S, S)


def inverse_frequencies(head_size: int, base: float) -> Tensor:
    """The angle that each pair of elements turns by at each position, (D / 2,) float32: base^(-2i / D).

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """
    return 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions: element i and element i + D / 2 turn together by position * frequencies[i].

    x: (B, N, S, D). positions: (B, S) or (1, S). frequencies: (D / 2,) float32.
    """
    angles = positions[:, None, :, None].float() * frequencies.float()  # (B, 1, S, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v over the valid keys that are at most `window` columns away.

    q, k, v: (B, N, S, D). valid: (B, S) bool. -> (B, S, N * D), and the probabilities, (B, N, S, S); rows at padding
    are zero.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    seen = valid[:, None, :, None] & valid[:, None, None, :]
    if window is not None:
        seen = seen & ((columns[:, None] - columns[None, :]).abs() <= window)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~seen, 0)
    return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


class _Parameters:
    """Parameters by name, in one dtype."""

    def __init__(self, params: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> None:
        self.params, self.prefix, self.dtype = params, prefix, dtype

    def get(self, name: str) -> Tensor | None:
        value = self.params.get(self.prefix + name)
        return None if value is None else value.to(self.dtype)

    def weight(self, name: str) -> Tensor:
        return self.params[f"{self.prefix}{name}.weight"].to(self.dtype)

    def dense(self, name: str, x: Tensor, activation: str | None = None) -> Tensor:
        return linear(x, self.weight(name), self.get(f"{name}.bias"), activation)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.weight(name), self.get(f"{name}.bias")
        return layer_norm(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, N, S, D)


def _valid(first: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    return attention_mask != 0


def _columns(valid: Tensor) -> Tensor:
    return torch.arange(valid.shape[1], device=valid.device)[None]


def modernbert(
    params: Mapping[str, Tensor],
    layers: RotaryLayers,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
) -> RotaryReference:
    """The encoder of ModernBERT: layers that normalise their input, rotary positions, windows in most layers, GeGLU.

    Its first layer has no norm before attention. input_ids: (B, S), or inputs_embeds: (B, S, H). attention_mask:
    (B, S), nonzero = valid. position_ids: (B, S) or (1, S), by default the columns; windows go by columns whatever they
    are. Source: Warner et al., "Smarter, Better, Faster, Longer", 2024, arXiv:2412.13663.
    """
    p = _Parameters(params, prefix, dtype)
    first = input_ids if inputs_embeds is None else inputs_embeds
    assert first is not None
    valid = _valid(first, attention_mask)
    padding = ~valid[:, :, None]
    positions = _columns(valid) if position_ids is None else position_ids
    x = p.weight("embeddings.tok_embeddings")[input_ids] if inputs_embeds is None else inputs_embeds.to(dtype)
    x = p.norm("embeddings.norm", x.masked_fill(padding, 0), layers.eps).masked_fill(padding, 0)
    states, attentions = [x], []
    for i, (frequencies, window) in enumerate(zip(layers.inverse_frequencies, layers.windows, strict=True)):
        name = f"layers.{i}"
        normed = p.norm(f"{name}.attn_norm", x, layers.eps) if f"{prefix}{name}.attn_norm.weight" in params else x
        q, k, v = (_heads(part, layers.num_heads) for part in p.dense(f"{name}.attn.Wqkv", normed).chunk(3, dim=-1))
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        context, probabilities = windowed_attention(q, k, v, valid, window)
        attentions.append(probabilities)
        x = x + p.dense(f"{name}.attn.Wo", context)
        activated, gate = p.dense(f"{name}.mlp.Wi", p.norm(f"{name}.mlp_norm", x, layers.eps)).chunk(2, dim=-1)
        activated = linear(activated, torch.eye(activated.shape[-1], dtype=dtype), None, layers.activation)
        x = (x + p.dense(f"{name}.mlp.Wo", activated * gate)).masked_fill(padding, 0)
        states.append(x)
    last = p.norm("final_norm", x, layers.eps).masked_fill(padding, 0)
    return RotaryReference(last, tuple(states), tuple(attentions))


def gated_rotary_bert(
    params: Mapping[str, Tensor],
    layers: RotaryLayers,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
) -> RotaryReference:
    """The encoder of Nomic and of GTE 1.5: BERT with rotary positions and a gated activation.

    It normalises after each residual, as BERT does. What lacks a bias in `params` has none, and segments are added
    where there is a table of them. Inputs as in `modernbert`, and token_type_ids (B, S), 0 by default. Sources:
    Nussbaum et al., "Nomic Embed", 2024, arXiv:2402.01613; Zhang et al., "mGTE", 2024, arXiv:2407.19669.
    """
    p = _Parameters(params, prefix, dtype)
    first = input_ids if inputs_embeds is None else inputs_embeds
    assert first is not None
    valid = _valid(first, attention_mask)
    padding = ~valid[:, :, None]
    positions = _columns(valid) if position_ids is None else position_ids
    x = p.weight("embeddings.word_embeddings")[input_ids] if inputs_embeds is None else inputs_embeds.to(dtype)
    segments = p.get("embeddings.token_type_embeddings.weight")
    if segments is not None:
        x = x + (segments[0] if token_type_ids is None else segments[token_type_ids])
    x = p.norm("embeddings.LayerNorm", x.masked_fill(padding, 0), layers.eps).masked_fill(padding, 0)
    states, attentions = [x], []
    for i, (frequencies, window) in enumerate(zip(layers.inverse_frequencies, layers.windows, strict=True)):
        name = f"layers.{i}"
        q, k, v = (_heads(p.dense(f"{name}.self_attn.{part}_proj", x), layers.num_heads) for part in "qkv")
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        context, probabilities = windowed_attention(q, k, v, valid, window)
        attentions.append(probabilities)
        out = p.dense(f"{name}.self_attn.o_proj", context)
        x = p.norm(f"{name}.post_attention_layernorm", x + out, layers.eps)
        gated = p.dense(f"{name}.mlp.gate_proj", x, layers.activation) * p.dense(f"{name}.mlp.up_proj", x)
        x = p.norm(f"{name}.post_mlp_layernorm", x + p.dense(f"{name}.mlp.down_proj", gated), layers.eps)
        x = x.masked_fill(padding, 0)
        states.append(x)
    return RotaryReference(x, tuple(states), tuple(attentions))
