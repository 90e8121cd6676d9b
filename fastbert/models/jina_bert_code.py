"""Jina's BERT for code, on packed tokens. T tokens, H hidden, I intermediate, N heads.

This file has the differences from Jina's other models of version 2 (jina_bert_v2.py); both share the bias on scores.
Queries and keys are normalised. The layer's input is added twice before its feed-forward part. The gate is the first
half of its rows. The hub's own code is never run. Modules have its names.
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
from fastbert.models.jina_bert_v2 import ACTIVATIONS, alibi_table, call_layer
from fastbert.models.layers import LayerStack
from fastbert.models.modules import call_dropout, call_module, is_plain_norm
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.rotary import project
from fastbert.ops import Policy, recording
from fastbert.ops.derived import Derived
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, INNER, site_of


class JinaCodeSelfAttention(nn.Module):
    """softmax(norm(q) norm(k)^T / sqrt(D) - slope * distance) v within each sequence."""

    projections = "query", "key", "value"

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads, self.dropout_site = config.num_attention_heads, site_of(layer, ATTENTION)
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.layer_norm_q, self.layer_norm_k = nn.LayerNorm(size, eps=eps), nn.LayerNorm(size, eps=eps)
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

    def train(self, mode: bool = True) -> JinaCodeSelfAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> JinaCodeSelfAttention:
        replica: JinaCodeSelfAttention = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(JinaCodeSelfAttention.forward, self, x, alibi=alibi))
        qkv = self.normed(fused.project(self, x, policy, batch), policy, batch)  # (T, 3H)
        if batch.has_plan(attention_weights.PLAN):
            return attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p, alibi)
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        return ops.varlen_attention(qkv, batch, self.num_heads, position_bias=alibi, dropout=dropout, policy=policy)

    def normed(self, qkv: Tensor, policy: Policy, batch: Any) -> Tensor:
        """(T, 3H) -> (T, 3H): normalises queries and keys, all heads of a row together."""
        norms = self.layer_norm_q, self.layer_norm_k
        if all(map(is_plain_norm, norms)):
            first, second = ((norm.weight, norm.bias, norm.eps) for norm in norms)
            return ops.norm_queries_and_keys(qkv, first, second, policy=policy)
        q, k, v = qkv.chunk(3, 1)
        q, k = (call_module(norm, part, policy, batch) for norm, part in zip(norms, (q, k), strict=True))
        return torch.cat([q, k, v], 1)


class JinaCodeAttention(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.self = JinaCodeSelfAttention(config, layer)
        site = site_of(layer, ATTENTION_OUTPUT)
        self.output = BertAddNorm(config.hidden_size, config, config.hidden_dropout_prob, site)

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(JinaCodeAttention.forward, self, x, alibi=alibi))
        return hooks.call(self.output, batch, policy, hooks.call(self.self, batch, policy, x, alibi=alibi), x)


class JinaCodeMLP(nn.Module):
    """down_layer(first half of up_gated_layer(x) * activation(second half))."""

    projections = ("up_gated_layer",)
    without_bias = True

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.dropout_site = site_of(layer, INNER)
        kind = setting(config, "feed_forward_type")
        expect(kind in ACTIVATIONS, "feed_forward_type", kind, f"one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[kind]
        self.up_gated_layer = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.down_layer = nn.Linear(config.intermediate_size, config.hidden_size)
        self.derived = Derived()

    def fused_qkv(self) -> tuple[Tensor, None]:
        """Returns up_gated_layer with the activated half first, (2I, H), as kernels read it, by its name in `fused`."""
        weight = self.up_gated_layer.weight

        def make() -> tuple[Tensor, ...]:
            return (_halves_swapped(weight, 0),)

        return (make() if self.training else self.derived.get("up", [weight], make))[0], None

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the address of the current weight of `fused_qkv`; () if it is not kept."""
        return fused.addresses(self)

    def renew(self, training: bool) -> None:
        """Marks the weight of `fused_qkv` to be made again at its next use, or, for training, drops it."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> JinaCodeMLP:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> JinaCodeMLP:
        replica: JinaCodeMLP = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(JinaCodeMLP.forward, self, x)
        if fused.fusible(self):
            inner = fused.project_and_gate(self, x, self.activation, policy, batch)  # (T, I)
        else:
            rows = _halves_swapped(fused.project(self, x, policy, batch), 1)  # (T, 2I)
            inner = ops.gated(rows, self.activation, policy=policy)
        return project(self.down_layer, call_dropout(self.dropout, inner, batch, self.dropout_site), policy, batch)


def _halves_swapped(x: Tensor, axis: int) -> Tensor:
    first, second = x.chunk(2, axis)
    return torch.cat([second, first], axis)


class JinaCodeLayer(nn.Module):
    """y = layer_norm_1(attention(x) + x), then layer_norm_2(mlp(y) + y). Attention itself adds x, and has a norm."""

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention = JinaCodeAttention(config, layer)
        self.layer_norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = JinaCodeMLP(config, layer)

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, alibi: Tensor | None = None
    ) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(JinaCodeLayer.forward, self, x, alibi=alibi)
        attended = hooks.call(self.attention, batch, policy, x, alibi=alibi)
        x = _joined(self.layer_norm_1, attended, x, policy, batch)
        mlp, norm = self.mlp, self.layer_norm_2
        return _joined(norm, hooks.call(mlp, batch, policy, x), x, policy, batch)

    def block(self, alibi: Tensor) -> Block:
        """Returns the layer as data, for engines; its modules must be plain."""
        attention, add, mlp = self.attention.self, self.attention.output, self.mlp
        gate, up = mlp.up_gated_layer.weight.chunk(2)
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
            fuse_up=lambda: Linear(*mlp.fused_qkv()),
            activation=mlp.activation,
            down=Linear.of(mlp.down_layer),
            output_norm=Norm.of(self.layer_norm_2),
            dropouts=(attention.dropout_p, add.dropout_p, 0.0),
            position_bias=alibi,
            inner_dropout=mlp.dropout.p if mlp.dropout.training else 0.0,
            query_norm=Norm.of(attention.layer_norm_q),
            key_norm=Norm.of(attention.layer_norm_k),
            second_norm=Norm.of(self.layer_norm_1),
        )


def _joined(norm: Any, y: Tensor, x: Tensor, policy: Policy, batch: Any) -> Tensor:
    """norm(y + x)."""
    if not is_plain_norm(norm):
        return call_module(norm, y + x, policy, batch)
    return ops.bias_residual_layer_norm(y, None, x, norm.weight, norm.bias, norm.eps, policy=policy)


class JinaCodeEncoder(LayerStack):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(JinaCodeLayer(config, i) for i in range(config.num_hidden_layers))
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
            padded = hooks.on_packed(JinaCodeEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        return self.states(x, batch, policy, keep_states, self.alibi(x), call=call_layer)


class JinaCodeModel(EncoderModel):
    """The encoder of jina-embeddings-v2-base-code maps token ids to one vector a token.

    settings: the fields of `Options` by name. Raises ValueError for a config of another family, and for a
    feed_forward_type other than "geglu" or "reglu".

    Source: Günther et al., "Jina Embeddings 2", 2023, arXiv:2310.19923, and the model's published code.
    """

    own_modules = frozenset(
        (GatedRotaryEmbeddings, JinaCodeEncoder, JinaCodeLayer, JinaCodeAttention, JinaCodeSelfAttention, JinaCodeMLP,
         BertAddNorm, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
    )  # fmt: skip
    counts_distances = True
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("JinaCodeLayer", "GatedRotaryEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = GatedRotaryEmbeddings(config)
        self.embeddings_project = None
        self.encoder = JinaCodeEncoder(config)
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
