"""MPNet on packed tokens. Shapes: T tokens, B sequences, S longest, H hidden, N heads, D head size, R farthest column.

This file has the differences from BERT. The scores of attention have a bias by the distance of two tokens, which all
layers share. One module has the four linears of attention. The parts that are the same as in BERT are called from
bert.py. Names of modules and parameters are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.engine import Block, Linear, Norm, Options
from fastbert.engine.listeners import is_bare, listened
from fastbert.models import attention_weights, fused, hooks
from fastbert.models.bert import BertAddNorm, BertIntermediate, BertPooler
from fastbert.models.embeddings import BertEmbeddings
from fastbert.models.encoder import EncoderModel
from fastbert.models.layers import LayerStack
from fastbert.models.modules import add_and_norm, call_module, dense, is_plain, is_plain_norm
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.ops import Policy, tracing
from fastbert.ops.derived import Derived
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, OUTPUT, site_of

N_BUCKETS, MAX_DISTANCE = 32, 128  # as in transformers' code; no setting changes it


class MPNetSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v within each sequence, and the linear after it."""

    projections = "q", "k", "v"

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.num_heads, self.dropout_site = config.num_attention_heads, site_of(layer, ATTENTION)
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.o = nn.Linear(config.hidden_size, config.hidden_size)
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

    def train(self, mode: bool = True) -> MPNetSelfAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> MPNetSelfAttention:
        replica: MPNetSelfAttention = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def attend(self, x: Tensor, batch: Any, policy: Policy, position_bias: Tensor | None) -> Tensor:
        """(T, H) -> (T, H), before the last linear. position_bias: (N, 2R + 1)."""
        qkv = fused.project(self, x, policy, batch)  # (T, 3H)
        if batch.has_plan(attention_weights.PLAN):
            return attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p, position_bias)
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        return ops.varlen_attention(
            qkv, batch, self.num_heads, position_bias=position_bias, dropout=dropout, policy=policy
        )

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, position_bias: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            packed = hooks.on_packed(MPNetSelfAttention.forward, self, x, position_bias=position_bias)
            return hooks.AttentionOutput(packed)
        return dense(self.o, self.attend(x, batch, policy, position_bias), policy, batch=batch)


class MPNetAttention(nn.Module):
    """LayerNorm(dropout(attn(x)) + x)."""

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.dropout_site = site_of(layer, ATTENTION_OUTPUT)
        self.attn = MPNetSelfAttention(config, layer)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of elements in the present mode."""
        return self.dropout.p if self.training else 0.0

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, position_bias: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            packed = hooks.on_packed(MPNetAttention.forward, self, x, position_bias=position_bias)
            return hooks.AttentionOutput(packed)
        attn, norm = self.attn, self.LayerNorm
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        after = x, norm.weight, norm.bias, norm.eps
        if is_plain(attn.o) and is_plain_norm(norm, self.dropout) and not listened(attn):
            context = attn.attend(x, batch, policy, position_bias)
            return ops.linear_residual_layer_norm(
                context, attn.o.weight, attn.o.bias, *after, dropout=dropout, policy=policy, keep=not self.training
            )
        y = hooks.call(attn, batch, policy, x, position_bias=position_bias)
        if is_plain_norm(norm, self.dropout):
            return ops.bias_residual_layer_norm(y, None, *after, dropout=dropout, policy=policy)
        return add_and_norm(norm, self.dropout, y, x, policy, batch)


class MPNetLayer(nn.Module):
    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention = MPNetAttention(config, layer)
        self.intermediate = BertIntermediate(config)
        self.output = BertAddNorm(config.intermediate_size, config, config.hidden_dropout_prob, site_of(layer, OUTPUT))

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, position_bias: Tensor | None = None
    ) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(MPNetLayer.forward, self, x, position_bias=position_bias)
        x = hooks.call(self.attention, batch, policy, x, position_bias=position_bias)
        return hooks.call(self.output, batch, policy, hooks.call(self.intermediate, batch, policy, x), x)

    def block(self, position_bias: Tensor) -> Block:
        """Returns the layer as data, for engines; its modules must be plain."""
        attention, up, output = self.attention, self.intermediate, self.output
        attn = attention.attn
        return Block(
            query=Linear.of(attn.q),
            key=Linear.of(attn.k),
            value=Linear.of(attn.v),
            fuse_qkv=lambda: Linear(*attn.fused_qkv()),
            num_heads=attn.num_heads,
            out=Linear.of(attn.o),
            attention_norm=Norm.of(attention.LayerNorm),
            up=Linear.of(up.dense),
            activation=up.activation,
            down=Linear.of(output.dense),
            output_norm=Norm.of(output.LayerNorm),
            dropouts=(attn.dropout_p, attention.dropout_p, output.dropout_p),
            position_bias=position_bias,
        )


def relative_position_bucket(distance: int) -> int:
    """Returns the row of `relative_attention_bias` for a key at `distance` columns after the query.

    Half of the 32 rows are for keys before the query, and half for those after it. The first 8 of a half are for one
    distance each. The others grow with its logarithm up to 128. Source: Raffel et al., "T5", 2019, arXiv:1910.10683.
    """
    half = N_BUCKETS // 2
    exact, start, n = half // 2, half if distance > 0 else 0, abs(distance)
    if n < exact:
        return start + n
    log = math.log(n / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    return start + min(exact + int(log), half - 1)


_BUCKETS = tuple(map(relative_position_bucket, range(-MAX_DISTANCE, MAX_DISTANCE + 1)))  # from -R to R
_buckets_on: dict[torch.device, Tensor] = {}  # the same by device


def _bucket_ids(device: torch.device) -> Tensor:
    """Returns (2R + 1,) int64: the bucket of each distance."""
    kept = _buckets_on.get(device)
    if kept is not None:
        return kept
    if torch.compiler.is_compiling() or tracing.observed() is not None or device.type == "meta":
        return torch.tensor(_BUCKETS, device=device)
    with torch.inference_mode(False):  # otherwise autograd could not keep it
        _buckets_on[device] = buckets = torch.tensor(_BUCKETS, device=device)
    return buckets


class MPNetEncoder(LayerStack):
    bias_columns = 2 * MAX_DISTANCE + 1

    def __init__(self, config: BertConfig) -> None:
        super().__init__(MPNetLayer(config, i) for i in range(config.num_hidden_layers))
        n_buckets = getattr(config, "relative_attention_num_buckets", N_BUCKETS)
        if not isinstance(n_buckets, int) or n_buckets < N_BUCKETS:
            raise ValueError(f"relative_attention_num_buckets: got {n_buckets!r}, expected {N_BUCKETS} or more")
        self.relative_attention_bias = nn.Embedding(n_buckets, config.num_attention_heads)
        self.derived = Derived()

    def position_bias(self, policy: Policy = ops.AUTO) -> Tensor:
        """Returns (N, 2R + 1): the bias on the score of a key at -R to R columns after the query, or farther."""
        table = self.relative_attention_bias
        if is_bare(table, nn.Embedding):
            return self._derived_bias()[0]
        buckets = _bucket_ids(next(self.parameters()).device)
        return call_module(table, buckets, policy, None).t().contiguous()

    def _derived_bias(self) -> tuple[Tensor, ...]:
        weight = self.relative_attention_bias.weight

        def make() -> tuple[Tensor, ...]:
            return (weight.index_select(0, _bucket_ids(weight.device)).t().contiguous(),)

        return make() if self.training else self.derived.get("position_bias", [weight], make)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the address of the current bias; () if it is not kept."""
        if not is_bare(self.relative_attention_bias, nn.Embedding):
            return ()
        return self.derived.addresses("position_bias", self._derived_bias())

    def renew(self, training: bool) -> None:
        """Marks the bias to be made again at its next use, or, for training, drops it."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> MPNetEncoder:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> MPNetEncoder:
        replica: MPNetEncoder = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(MPNetEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        return self.states(x, batch, policy, keep_states, self.position_bias(policy), call=_call_layer)


def _call_layer(layer: Any, batch: Any, policy: Policy, x: Tensor, position_bias: Tensor) -> Tensor:
    """Runs a layer. Gradient checkpointing takes its tensors by position."""
    output: Tensor = hooks.call(layer, batch, policy, x, position_bias=position_bias)
    return output


class MPNetModel(EncoderModel):
    """The MPNet encoder maps token ids to one vector a token, and to the pooled vector of the first token, <s>.

    settings: the fields of `Options` by name. Raises ValueError for a config of another family.

    Source: Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", 2020, arXiv:2004.09297.
    """

    own_modules = frozenset(
        (BertEmbeddings, MPNetEncoder, MPNetLayer, MPNetAttention, MPNetSelfAttention, BertIntermediate, BertAddNorm,
         nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
    )  # fmt: skip
    counts_distances = True
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("MPNetLayer", "BertEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = BertEmbeddings(config)
        self.embeddings_project = None
        self.encoder = MPNetEncoder(config)
        self.pooler: BertPooler | None = BertPooler(config) if add_pooling_layer else None
        self.init_weights()

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        position_bias = self.encoder.position_bias(self.policy)
        layers: Any = self.encoder.layer
        for layer in layers:
            yield layer.block(position_bias)
