"""The heads on an encoder predict tokens and next sentences, and classify by the first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.family import Head
from fastbert.checkpoint.rotary import setting
from fastbert.checks import expect
from fastbert.engine.listeners import is_bare, is_plain
from fastbert.models import hooks
from fastbert.models.modules import call_module, dense, first_rows, is_plain_norm
from fastbert.ops import Policy
from fastbert.ops.packing import PackedBatch


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(activation(dense(x))): before the decoder, and in ModernBERT before the classifier of every head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, bias, norm_bias = (
            config.embedding_width,
            setting(config, "classifier_bias"),
            setting(config, "norm_bias"),
        )
        self.dense = nn.Linear(config.hidden_size, width, bias=bias is not False)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=norm_bias is not False)
        name = config.family.head("MaskedLM").activation or setting(config, "classifier_activation")
        self.activation = ops.ACTIVATIONS[name or config.hidden_act]

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: PackedBatch | None = None) -> Tensor:
        """(T, H) -> (T, E)"""
        if x.dim() == 3:
            return hooks.on_packed(BertPredictionHeadTransform.forward, self, x)
        norm = self.LayerNorm
        x = dense(self.dense, x, policy, self.activation, batch)
        if not is_plain_norm(norm):
            return call_module(norm, x, policy, batch)
        return ops.bias_residual_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps, policy=policy)


class BertLMPredictionHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        bias = setting(config, "decoder_bias")
        expect(bias in (None, True), "decoder_bias", bias, "True")
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.embedding_width, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> Tensor:  # (T, H) -> (T, V)
        if x.dim() == 3:
            return hooks.on_packed(BertLMPredictionHead.forward, self, x)
        return dense(self.decoder, hooks.call(self.transform, batch, policy, x), policy, batch=batch)


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> Tensor:  # (T, H) -> (T, V)
        if x.dim() == 3:
            return hooks.on_packed(BertOnlyMLMHead.forward, self, x)
        return hooks.call(self.predictions, batch, policy, x)


class BertOnlyNSPHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor, policy: Policy = ops.AUTO) -> Tensor:  # (B, H) -> (B, 2)
        return dense(self.seq_relationship, pooled, policy)


class BertPreTrainingHeads(nn.Module):
    """Predicts tokens, and the class of a pair of sentences: whether they follow, or, in ALBERT, their order.

    dropout: of the pooled vector, in a head for the order. n_classes: of pairs.
    """

    def __init__(self, config: BertConfig, dropout: nn.Module | None = None, n_classes: int = 2) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.dropout = dropout
        self.seq_relationship = nn.Linear(config.hidden_size, n_classes)

    def of_pairs(self, pooled: Tensor, policy: Policy) -> Tensor:
        """(B, H) -> (B, n_classes)"""
        return dense(self.seq_relationship, pooled if self.dropout is None else self.dropout(pooled), policy)

    def forward(self, x: Tensor, pooled: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> tuple[Tensor, Tensor]:
        """(T, H) and (B, H) -> (T, V) and (B, n_classes)"""
        if x.dim() == 3:
            return hooks.on_packed(BertOnlyMLMHead.forward, self, x), self.of_pairs(pooled, policy)
        return hooks.call(self.predictions, batch, policy, x), self.of_pairs(pooled, policy)


def is_plain_head(head: Any) -> bool:
    """Tells whether a BertOnlyMLMHead or BertPreTrainingHeads is unchanged: it has no hook and no adapter."""
    if not (is_bare(head, BertOnlyMLMHead) or is_bare(head, BertPreTrainingHeads)):
        return False
    predictions = head.predictions
    if not (is_bare(predictions, BertLMPredictionHead) and is_plain(predictions.decoder)):
        return False
    transform: Any = predictions.transform
    bare = is_bare(transform, BertPredictionHeadTransform)
    return bare and _is_plain_or_without_bias(transform.dense) and is_bare(transform.LayerNorm, nn.LayerNorm)


def _is_plain_or_without_bias(linear: nn.Module) -> bool:
    return is_plain(linear) or (is_bare(linear, nn.Linear) and linear.bias is None)


class ContextPooler(nn.Module):
    """activation(dense(dropout(x))) of each sequence's first token: DeBERTa's pooler, which belongs to its heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(setting(config, "pooler_dropout"))
        self.activation = ops.ACTIVATIONS[setting(config, "pooler_hidden_act")]

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:
        """(T, H) -> (B, H)"""
        if x.dim() == 3:
            return hooks.on_packed(ContextPooler.forward, self, x, per_token=False)
        return dense(self.dense, self.dropout(first_rows(x, batch, policy)), policy, self.activation)


class FirstTokenHead(nn.Module):
    """Classifies a whole sequence by its first token, through the head's own dense layer.

    RoBERTa, DistilBERT and ELECTRA have it instead of BERT's pooler and classifier.
    """

    def __init__(self, config: BertConfig, head: Head, dropout: nn.Module, n_outputs: int) -> None:
        super().__init__()
        assert head.activation is not None
        self.activation, self.dropout_first = head.activation, head.dropout_first
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = dropout
        self.out_proj = nn.Linear(config.hidden_size, n_outputs)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:
        """(T, H) -> (B, n_outputs)"""
        if x.dim() == 3:
            return hooks.on_packed(FirstTokenHead.forward, self, x, per_token=False)
        x = first_rows(x, batch, policy)
        if self.dropout_first:
            x = self.dropout(x)
        if self.activation == "gelu":
            x = dense(self.dense, x, policy, "gelu")
        else:
            x = dense(self.dense, x, policy)
            activate = torch.tanh if self.activation == "tanh" else torch.relu
            x = ops.elementwise(activate, x, policy=policy)
        return dense(self.out_proj, self.dropout(x), policy)
