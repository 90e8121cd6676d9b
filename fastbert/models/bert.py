"""BERT on packed tokens. Shapes: T tokens, B sequences, S longest, H hidden, I intermediate, N heads, D head size.

This file describes BERT. The engine, behind `EncoderModel`, decides how a batch runs. Modules and parameters have the
names of transformers, so that weights, PEFT targets and optimizer groups work unchanged. A module with a padded input,
(B, S, H), was called by a hook or by a user: it packs its input first (`fastbert.models.hooks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.engine import Block, Linear, Norm, Options
from fastbert.models import attention_weights, fused, hooks
from fastbert.models.embeddings import BertEmbeddings
from fastbert.models.encoder import EncoderModel
from fastbert.models.layers import LayerStack
from fastbert.models.modules import add_and_norm, call_module, dense, first_rows, is_plain, is_plain_norm
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.ops import Policy
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, OUTPUT, site_of


class BertSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v within each sequence."""

    projections = "query", "key", "value"

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.num_heads, self.dropout_site = config.num_attention_heads, site_of(layer, ATTENTION)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
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

    def train(self, mode: bool = True) -> BertSelfAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> BertSelfAttention:
        replica: BertSelfAttention = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(BertSelfAttention.forward, self, x))
        qkv = fused.project(self, x, policy, batch)  # (T, 3H)
        if batch.has_plan(attention_weights.PLAN):
            return attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p)
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        return ops.varlen_attention(qkv, batch, self.num_heads, dropout=dropout, policy=policy)


class BertAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): transformers' BertSelfOutput and BertOutput."""

    def __init__(self, in_features: int, config: BertConfig, p: float, dropout_site: int) -> None:
        super().__init__()
        self.dropout_site = dropout_site
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(p)

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of elements in the present mode."""
        return self.dropout.p if self.training else 0.0

    def forward(
        self, x: Tensor, residual: Tensor, policy: Policy = ops.AUTO, batch: Any = None
    ) -> Tensor:  # (T, K), (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(BertAddNorm.forward, self, x, residual)
        norm = self.LayerNorm
        if not is_plain_norm(norm, self.dropout):
            return add_and_norm(norm, self.dropout, dense(self.dense, x, policy, batch=batch), residual, policy, batch)
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        after = residual, norm.weight, norm.bias, norm.eps
        if is_plain(self.dense):
            weight, bias = self.dense.weight, self.dense.bias
            return ops.linear_residual_layer_norm(
                x, weight, bias, *after, dropout=dropout, policy=policy, keep=not self.training
            )
        x = call_module(self.dense, x, policy, batch)
        return ops.bias_residual_layer_norm(x, None, *after, dropout=dropout, policy=policy)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer)
        p = config.hidden_dropout_prob if config.family.attention_output_dropout else 0.0
        self.output = BertAddNorm(config.hidden_size, config, p, site_of(layer, ATTENTION_OUTPUT))

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(BertAttention.forward, self, x))
        return hooks.call(self.output, batch, policy, hooks.call(self.self, batch, policy, x), x)


class BertIntermediate(nn.Module):
    """activation(dense(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ops.ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: PackedBatch | None = None) -> Tensor:
        """(T, H) -> (T, I)"""
        if x.dim() == 3:
            return hooks.on_packed(BertIntermediate.forward, self, x)
        return dense(self.dense, x, policy, self.activation, batch)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer)
        self.intermediate = BertIntermediate(config)
        p = config.hidden_dropout_prob if config.family.output_dropout else 0.0
        self.output = BertAddNorm(config.intermediate_size, config, p, site_of(layer, OUTPUT))

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(BertLayer.forward, self, x)
        x = hooks.call(self.attention, batch, policy, x)
        return hooks.call(self.output, batch, policy, hooks.call(self.intermediate, batch, policy, x), x)

    def block(self) -> Block:
        """Returns the layer as data, for engines; its modules must be plain."""
        attention, add, up, output = self.attention.self, self.attention.output, self.intermediate, self.output
        return Block(
            query=Linear.of(attention.query),
            key=Linear.of(attention.key),
            value=Linear.of(attention.value),
            fuse_qkv=lambda: Linear(*attention.fused_qkv()),
            num_heads=attention.num_heads,
            out=Linear.of(add.dense),
            attention_norm=Norm.of(add.LayerNorm),
            up=Linear.of(up.dense),
            activation=up.activation,
            down=Linear.of(output.dense),
            output_norm=Norm.of(output.LayerNorm),
            dropouts=(attention.dropout_p, add.dropout_p, output.dropout_p),
        )


class BertEncoder(LayerStack):
    def __init__(self, config: BertConfig) -> None:
        order = config.layer_order if config.family.shared_layers else None
        n_sets = config.num_hidden_layers if order is None else max(order) + 1
        super().__init__((BertLayer(config, i) for i in range(n_sets)), order)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(BertEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        return self.states(x, batch, policy, keep_states)


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:
        """(T, H) -> (B, H): tanh of a linear layer on each sequence's first token; zeros without tokens."""
        if x.dim() == 3:
            return hooks.on_packed(BertPooler.forward, self, x, per_token=False)
        x = dense(self.dense, first_rows(x, batch, policy), policy)
        return ops.elementwise(torch.tanh, x, policy=policy)


class BertModel(EncoderModel):
    """A `BertModel` is the BERT encoder: it maps token ids to one vector a token, and a pooled [CLS] vector.

    It is also the encoder of other families (config.model_type, fastbert.checkpoint.families) with BERT's layers. They
    have the same modules and names, a pooler if the family has one, and the positions of the family. For a family
    with other layers, such as MPNet, BertModel(config) makes an object of its class. settings: the fields of `Options`
    by name.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018, arXiv:1810.04805.
    """

    own_modules = frozenset(
        (BertEmbeddings, BertEncoder, BertLayer, BertAttention, BertSelfAttention, BertIntermediate, BertAddNorm,
         nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
    )  # fmt: skip
    _class_arguments = ("add_pooling_layer",)

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = BertEmbeddings(config)
        width, hidden_size = config.embedding_width, config.hidden_size
        is_projected = width != hidden_size or config.family.always_projected
        self.embeddings_project = nn.Linear(width, hidden_size) if is_projected else None
        self.encoder = BertEncoder(config)
        has_pooler = add_pooling_layer and config.family.pooler
        self.pooler: BertPooler | None = BertPooler(config) if has_pooler else None
        self.init_weights()

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        for layer in self.encoder.in_order:
            yield layer.block()
