"""Jina's BERT, version 2, on packed tokens. T tokens, H hidden, I intermediate, N heads, R the farthest column.

This file has the differences from BERT. There are no positions. Instead, the scores of attention have a bias that falls
with the distance of two tokens, by a slope of each head (ALiBi). The feed-forward part has a gate. The hub has its own
code for these models. A table reads its files (fastbert.checkpoint.families), and its code is never run. Modules have
its names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.rotary import setting
from fastbert.checks import expect
from fastbert.engine import Block, Linear, Norm, Options
from fastbert.models import attention_weights, fused, hooks
from fastbert.models.bert import BertAddNorm, BertPooler
from fastbert.models.encoder import EncoderModel
from fastbert.models.gated_rotary_bert import GatedRotaryEmbeddings
from fastbert.models.layers import LayerStack
from fastbert.models.modules import call_dropout, call_module, is_plain, is_plain_norm
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.rotary import project, project_and_gate
from fastbert.ops import Policy, recording, tracing
from fastbert.ops.derived import Derived
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, INNER, site_of

ACTIVATIONS = {"geglu": "gelu", "reglu": "relu"}  # of the gate, by feed_forward_type


class JinaBertSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D) - slope * distance) v within each sequence."""

    projections = "query", "key", "value"

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.dropout_site = config.num_attention_heads, site_of(layer, ATTENTION)
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.derived = Derived()

    def fused_qkv(self) -> tuple[Tensor, Tensor]:
        """Returns the three projections as one weight (3H, H) and bias (3H,), kept until a parameter changes."""
        return fused.weights(self)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the current fused weight and bias; () if they are not kept."""
        return fused.addresses(self)

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of attention in the present mode."""
        return self.dropout.p if self.training else 0.0

    def renew(self, training: bool) -> None:
        """Marks the fused weight to be made again at its next use, or, for training, drops it."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> JinaBertSelfAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> JinaBertSelfAttention:
        replica: JinaBertSelfAttention = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(JinaBertSelfAttention.forward, self, x, alibi=alibi))
        qkv = fused.project(self, x, policy, batch)  # (T, 3H)
        if batch.has_plan(attention_weights.PLAN):
            return attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p, alibi)
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        return ops.varlen_attention(qkv, batch, self.num_heads, position_bias=alibi, dropout=dropout, policy=policy)


class JinaBertAttention(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.self = JinaBertSelfAttention(config, layer)
        site = site_of(layer, ATTENTION_OUTPUT)
        self.output = BertAddNorm(config.hidden_size, config, config.hidden_dropout_prob, site)

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(JinaBertAttention.forward, self, x, alibi=alibi))
        return hooks.call(self.output, batch, policy, hooks.call(self.self, batch, policy, x, alibi=alibi), x)


class JinaBertGLUMLP(nn.Module):
    """layernorm(wo(activation(first half of gated_layers(x)) * second half) + x)."""

    without_bias = True

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.dropout_site = site_of(layer, INNER)
        kind = setting(config, "feed_forward_type")
        expect(kind in ACTIVATIONS, "feed_forward_type", kind, f"one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[kind]
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(JinaBertGLUMLP.forward, self, x)
        inner = project_and_gate(self.gated_layers, x, self.activation, policy, batch)  # (T, I)
        inner, norm = call_dropout(self.dropout, inner, batch, self.dropout_site), self.layernorm
        if not is_plain_norm(norm):
            return call_module(norm, project(self.wo, inner, policy, batch) + x, policy, batch)
        after = x, norm.weight, norm.bias, norm.eps
        if is_plain(self.wo):
            weight, bias = self.wo.weight, self.wo.bias
            return ops.linear_residual_layer_norm(inner, weight, bias, *after, policy=policy, keep=not self.training)
        return ops.bias_residual_layer_norm(project(self.wo, inner, policy, batch), None, *after, policy=policy)


class JinaBertLayer(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention = JinaBertAttention(config, layer)
        self.mlp = JinaBertGLUMLP(config, layer)

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(JinaBertLayer.forward, self, x, alibi=alibi)
        return hooks.call(self.mlp, batch, policy, hooks.call(self.attention, batch, policy, x, alibi=alibi))

    def block(self, alibi: Tensor) -> Block:
        """Returns the layer as data, for engines; its modules must be plain."""
        attention, add, mlp = self.attention.self, self.attention.output, self.mlp
        up, gate = mlp.gated_layers.weight.chunk(2)
        return Block(
            query=Linear.of(attention.query),
            key=Linear.of(attention.key),
            value=Linear.of(attention.value),
            fuse_qkv=lambda: Linear(*attention.fused_qkv()),
            num_heads=attention.num_heads,
            out=Linear.of(add.dense),
            attention_norm=Norm.of(add.LayerNorm),
            up=Linear(up, None),  # the part with the activation
            gate=Linear(gate, None),
            fuse_up=lambda: Linear.of(mlp.gated_layers),
            activation=mlp.activation,
            down=Linear.of(mlp.wo),
            output_norm=Norm.of(mlp.layernorm),
            dropouts=(attention.dropout_p, add.dropout_p, 0.0),
            position_bias=alibi,
            inner_dropout=mlp.dropout.p if mlp.dropout.training else 0.0,
        )


def slopes(num_heads: int) -> list[float]:
    """Returns the slope of each head: the decrease of scores for each column between query and key.

    They are 2^(-8 i / n) for i from 1 to n, the number of heads. If n is no power of two, the next lower power counts,
    and the further heads have every other slope of twice as many. Source: Press et al., "Train Short, Test Long", 2022,
    arXiv:2108.12409.
    """
    n = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    return first + [2.0 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)][: num_heads - n]


_tables: dict[Any, Tensor] = {}  # by heads, farthest column, dtype and device


def alibi_table(num_heads: int, radius: int, like: Tensor) -> Tensor:
    """Returns (N, 2R + 1), float32 at least: the bias on the score of a key at -R to R columns after the query.

    It is made once a device, so that all layers and models of a shape share it: 786 KB for 12 heads and 8,192 columns.
    """
    dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
    key = num_heads, radius, dtype, device
    table = _tables.get(key)
    if table is not None:
        return table
    passing = torch.compiler.is_compiling() or tracing.observed() is not None or device.type == "meta"
    with torch.inference_mode(False):
        distance = torch.arange(-radius, radius + 1, device=device).abs().to(dtype)
        table = torch.tensor(slopes(num_heads), dtype=dtype, device=device)[:, None] * -distance
    if not passing:
        _tables[key] = table
    return table


class JinaBertEncoder(LayerStack):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(JinaBertLayer(config, i) for i in range(config.num_hidden_layers))
        self.num_heads, self.radius = config.num_attention_heads, config.max_position_embeddings - 1

    def alibi(self, like: Tensor) -> Tensor:
        """Returns the bias of all layers, (N, 2R + 1), on the device of a tensor and at least as exact."""
        if recording.on and recording.is_dry():
            return recording.stand_in((self.num_heads, 2 * self.radius + 1), torch.float32)
        return alibi_table(self.num_heads, self.radius, like)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(JinaBertEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        return self.states(x, batch, policy, keep_states, self.alibi(x), call=call_layer)


def call_layer(layer: Any, batch: Any, policy: Policy, x: Tensor, alibi: Tensor) -> Tensor:
    """Runs a layer. Gradient checkpointing takes its tensors by position."""
    output: Tensor = hooks.call(layer, batch, policy, x, alibi=alibi)
    return output


class JinaBertModel(EncoderModel):
    """The encoder of jina-embeddings-v2 and jina-reranker-v1 maps token ids to one vector a token.

    settings: the fields of `Options` by name. Raises ValueError for a config of another family, and for a
    feed_forward_type other than "geglu" or "reglu".

    Source: Günther et al., "Jina Embeddings 2", 2023, arXiv:2310.19923.
    """

    own_modules = frozenset(
        (GatedRotaryEmbeddings, JinaBertEncoder, JinaBertLayer, JinaBertAttention, JinaBertSelfAttention,
         JinaBertGLUMLP, BertAddNorm, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
    )  # fmt: skip
    counts_distances = True
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("JinaBertLayer", "GatedRotaryEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = GatedRotaryEmbeddings(config)
        self.embeddings_project = None
        self.encoder = JinaBertEncoder(config)
        self.pooler: BertPooler | None = BertPooler(config) if add_pooling_layer else None
        self.init_weights()

    def table_sizes(self) -> tuple[int, int, int]:
        """Returns the rows of the tables of words and token types, and the number of columns of the bias."""
        n_words, n_types, _ = super().table_sizes()
        return n_words, n_types, self.encoder.radius + 1

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        alibi = self.encoder.alibi(self.embeddings.word_embeddings.weight)
        layers: Any = self.encoder.layer
        for layer in layers:
            yield layer.block(alibi)
