"""DeBERTa-v2 and -v3 on packed tokens. Shapes: T tokens, H hidden, N heads, D head size, R rows of a side's distances.

This file has the differences between DeBERTa and BERT. The scores of attention have terms for the distance in columns
between query and key. They use projections of a table that all layers share. Few models add positions to the
embeddings, and there is no pooler. In v2's large models there is a convolution beside the first layer. The parts that
are the same as in BERT are called from bert.py. Names of modules and parameters are those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.deberta import DebertaSettings, deberta_settings
from fastbert.engine import Block, Convolution, Distances, Linear, Norm, Options
from fastbert.engine.listeners import is_bare
from fastbert.models import attention_weights, fused, hooks
from fastbert.models.bert import BertAddNorm, BertIntermediate
from fastbert.models.convolution import DebertaConvolution
from fastbert.models.deberta_embeddings import DebertaEmbeddings
from fastbert.models.encoder import EncoderModel
from fastbert.models.layers import LayerStack
from fastbert.models.modules import dense, is_plain
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.rotary import normalise
from fastbert.ops import Policy
from fastbert.ops.derived import Derived
from fastbert.ops.disentangled import Positions
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, OUTPUT, site_of


class DisentangledSelfAttention(nn.Module):
    """softmax(scale * (q k^T + terms of distances)) v within each sequence."""

    projections = "query_proj", "key_proj", "value_proj"

    def __init__(self, config: BertConfig, settings: DebertaSettings, layer: int = 0) -> None:
        super().__init__()
        size = config.hidden_size
        self.dropout_site = site_of(layer, ATTENTION)
        self.num_heads, self.scale = config.num_attention_heads, (config.head_size * settings.n_scores) ** -0.5
        self.buckets, self.table_rows = settings.buckets, 2 * settings.reach
        self.query_proj = nn.Linear(size, size)
        self.key_proj = nn.Linear(size, size)
        self.value_proj = nn.Linear(size, size)
        self.position_keys = self.position_queries = ""  # the linears that project distances
        if "c2p" in settings.terms:
            self.position_keys = "key_proj" if settings.shared else "pos_key_proj"
        if "p2c" in settings.terms:
            self.position_queries = "query_proj" if settings.shared else "pos_query_proj"
        for name in (self.position_keys, self.position_queries):
            if name.startswith("pos_"):
                self.add_module(name, nn.Linear(size, size))
        if settings.relative:
            self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.derived = Derived()

    def fused_qkv(self) -> tuple[Tensor, Tensor]:
        """Returns the three projections as one weight (3H, H) and bias (3H,), kept until a parameter changes."""
        both: tuple[Tensor, Tensor] = fused.weights(self)
        return both

    def positions(self, table: Tensor, policy: Policy = ops.AUTO) -> Positions:
        """Returns the projections of the encoder's table (2R, H); outside of training they are kept until a weight
        changes.
        """
        linears: list[Any] = [
            self.get_submodule(name) if name else None for name in (self.position_keys, self.position_queries)
        ]
        present = [linear for linear in linears if linear is not None]

        def make() -> tuple[Tensor, ...]:
            rows = self.pos_dropout(table)[: self.table_rows]
            return tuple(dense(linear, rows, policy) for linear in present)

        if self.training or not all(map(is_plain, present)):
            made = make()
        else:
            parameters = [table, *(p for linear in present for p in (linear.weight, linear.bias))]
            made = self.derived.get("positions", parameters, make)
        tensors = iter(made)
        keys, queries = (None if linear is None else next(tensors) for linear in linears)
        return Positions(keys, queries, self.buckets)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the current fused weight and bias; () if they are not kept."""
        return fused.addresses(self)

    def position_addresses(self, table: Tensor) -> tuple[int, ...]:
        """Returns the addresses of the current projections of distances; () if they are not kept."""
        keys, queries, _ = self.positions(table)
        return self.derived.addresses("positions", tuple(t for t in (keys, queries) if t is not None))

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of attention in the present mode."""
        return self.dropout.p if self.training else 0.0

    def renew(self, training: bool) -> None:
        """Marks the derived tensors to be made again at their next use, or, for training, drops them."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> DisentangledSelfAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> DisentangledSelfAttention:
        replica: DisentangledSelfAttention = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, table: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(DisentangledSelfAttention.forward, self, x, table=table))
        qkv = fused.project(self, x, policy, batch)  # (T, 3H)
        positions = None
        if table is not None and (self.position_keys or self.position_queries):
            positions = self.positions(table, policy)
        if batch.has_plan(attention_weights.PLAN):
            return attention_weights.attend(
                qkv, batch, self.num_heads, self.dropout_p, scale=self.scale, positions=positions
            )
        dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
        if positions is None:
            return ops.varlen_attention(qkv, batch, self.num_heads, scale=self.scale, dropout=dropout, policy=policy)
        return ops.disentangled_attention(
            qkv, positions, batch, self.num_heads, scale=self.scale, dropout=dropout, policy=policy
        )


class DebertaAttention(nn.Module):
    def __init__(self, config: BertConfig, settings: DebertaSettings, layer: int = 0) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config, settings, layer)
        site = site_of(layer, ATTENTION_OUTPUT)
        self.output = BertAddNorm(config.hidden_size, config, config.hidden_dropout_prob, site)

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, table: Tensor | None = None
    ) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.AttentionOutput(hooks.on_packed(DebertaAttention.forward, self, x, table=table))
        return hooks.call(self.output, batch, policy, hooks.call(self.self, batch, policy, x, table=table), x)


class DebertaLayer(nn.Module):
    def __init__(self, config: BertConfig, settings: DebertaSettings, layer: int = 0) -> None:
        super().__init__()
        self.attention = DebertaAttention(config, settings, layer)
        self.intermediate = BertIntermediate(config)
        self.output = BertAddNorm(config.intermediate_size, config, config.hidden_dropout_prob, site_of(layer, OUTPUT))

    def forward(
        self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, table: Tensor | None = None
    ) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(DebertaLayer.forward, self, x, table=table)
        x = hooks.call(self.attention, batch, policy, x, table=table)
        return hooks.call(self.output, batch, policy, hooks.call(self.intermediate, batch, policy, x), x)

    def block(self, distances: Any = None, convolution: Convolution | None = None) -> Block:
        """Returns the layer as data, for engines; its modules must be plain.

        distances: returns the distances of the layer for its attention. convolution: the one beside the layer.
        """
        attention, add, up, output = self.attention.self, self.attention.output, self.intermediate, self.output
        return Block(
            query=Linear.of(attention.query_proj),
            key=Linear.of(attention.key_proj),
            value=Linear.of(attention.value_proj),
            fuse_qkv=lambda: Linear(*attention.fused_qkv()),
            num_heads=attention.num_heads,
            out=Linear.of(add.dense),
            attention_norm=Norm.of(add.LayerNorm),
            up=Linear.of(up.dense),
            activation=up.activation,
            down=Linear.of(output.dense),
            output_norm=Norm.of(output.LayerNorm),
            dropouts=(attention.dropout_p, add.dropout_p, output.dropout_p),
            scale=attention.scale,
            distances=None if distances is None else distances(attention),
            convolution=convolution,
        )


class DebertaEncoder(LayerStack):
    """The encoder has the layers, the table of distances that they share, and the convolution beside the first one."""

    has_table = True

    def __init__(self, config: BertConfig, settings: DebertaSettings) -> None:
        super().__init__(DebertaLayer(config, settings, i) for i in range(config.num_hidden_layers))
        size, eps = config.hidden_size, config.layer_norm_eps
        self.rel_embeddings = nn.Embedding(2 * settings.reach, size) if settings.relative else None
        self.LayerNorm = nn.LayerNorm(size, eps=eps) if settings.normalised else None
        self.conv = DebertaConvolution(config, settings) if settings.conv_size else None
        self.has_terms = bool(settings.terms)
        self.derived = Derived()

    def table(self, policy: Policy = ops.AUTO) -> Tensor | None:
        """Returns the rows of distances, (2R, H), normalised if the model does so; None without terms of distances."""
        embeddings, norm = self.rel_embeddings, self.LayerNorm
        if embeddings is None or not self.has_terms:
            return None
        weight: Tensor = embeddings.weight
        if norm is None:
            return weight
        if self.training or not is_bare(norm, nn.LayerNorm):
            return normalise(norm, weight, policy, None)
        return self.derived.get(
            "table", [weight, norm.weight, norm.bias], lambda: (normalise(norm, weight, policy, None),)
        )[0]

    def distances(self, attention: DisentangledSelfAttention, policy: Policy = ops.AUTO) -> Distances:
        """Returns the distances in the attention of a layer, as data; the policy is for the projection of the table."""
        linears: Any = [
            attention.get_submodule(name) if name else None
            for name in (attention.position_keys, attention.position_queries)
        ]
        key, query = (None if linear is None else Linear.of(linear) for linear in linears)
        table, norm = self.rel_embeddings, None if self.LayerNorm is None else Norm.of(self.LayerNorm)
        assert table is not None

        def project() -> Positions:
            rows = self.table(policy)
            assert rows is not None
            return attention.positions(rows, policy)

        return Distances(table.weight, norm, key, query, attention.buckets, project)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the current table and of the layers' projections of it."""
        table = self.table()
        if table is None:
            return ()
        layers: Any = self.layer
        own = () if self.LayerNorm is None else self.derived.addresses("table", (table,))
        return own + tuple(place for layer in layers for place in layer.attention.self.position_addresses(table))

    def renew(self, training: bool) -> None:
        """Marks the table to be made again at its next use, or, for training, drops it."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> DebertaEncoder:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> DebertaEncoder:
        replica: DebertaEncoder = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(DebertaEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        table = self.table(policy)
        return self.states(x, batch, policy, keep_states, *([] if table is None else [table]), call=self._call_layer)

    def _call_layer(self, layer: Any, batch: Any, policy: Policy, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Runs a layer, with the convolution beside the first one. Gradient checkpointing takes its tensors by
        position.
        """
        y: Tensor = hooks.call(layer, batch, policy, x, table=table)
        if self.conv is not None and layer is self.layer[0]:
            y = hooks.call(self.conv, batch, policy, x, y)
        return y


class DebertaModel(EncoderModel):
    """The encoder of DeBERTa-v2 and -v3 maps token ids to one vector a token.

    add_pooling_layer has no effect: DeBERTa has no pooler. settings: the fields of `Options` by name. Raises ValueError
    for settings that fastbert does not compute (fastbert.checkpoint.deberta).

    Sources: He et al., "DeBERTa", 2020, arXiv:2006.03654, and "DeBERTaV3", 2021, arXiv:2111.09543.
    """

    own_modules = frozenset(
        (DebertaEmbeddings, DebertaEncoder, DebertaLayer, DebertaAttention, DisentangledSelfAttention,
         DebertaConvolution, BertIntermediate, BertAddNorm, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm,
         nn.Dropout, nn.Conv1d)
    )  # fmt: skip
    counts_distances = True
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("DebertaLayer", "DebertaEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = False, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        own = deberta_settings(config)
        self.embeddings = DebertaEmbeddings(config, own)
        self.embeddings_project = None
        self.encoder = DebertaEncoder(config, own)
        self.pooler = None
        self.init_weights()

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        encoder = self.encoder
        distances = partial(encoder.distances, policy=self.policy) if encoder.has_terms else None
        for i, layer in enumerate(encoder.layer):
            beside = encoder.conv.data() if i == 0 and encoder.conv is not None else None
            yield layer.block(distances, beside)
