"""The encoder of Nomic and GTE on packed tokens is BERT with rotary positions and a gated activation.

T tokens, H hidden, I intermediate. Layers normalise after each residual, as BERT's do. The hub has its own code for
these models. Tables read its files (fastbert.checkpoint.families), and its code is never run. Modules inside a layer
have transformers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.rotary import RotaryLayer, gated_rotary_layer
from fastbert.engine import Block, EmbeddingTables, Linear, Norm, Options, PackedInputs
from fastbert.models import attention_weights, fused, hooks
from fastbert.models.bert import BertPooler
from fastbert.models.encoder import EncoderModel
from fastbert.models.layers import LayerStack
from fastbert.models.modules import add_and_norm, call_dropout, is_plain_norm
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.rotary import embed, embeds_in_kernel, project
from fastbert.ops import Policy
from fastbert.ops.angles import rotations_of
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, INNER, OUTPUT, site_of


class GatedRotaryEmbeddings(nn.Module):
    """LayerNorm(word + token type): there are no positions, and in some checkpoints no token types."""

    position_embeddings = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size, n_types = config.hidden_size, config.type_vocab_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(n_types, size) if n_types else None
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def n_token_types(self) -> int:
        """Returns the number of segments; it is one without a table."""
        table: Any = self._modules.get("token_type_embeddings")
        return 1 if table is None else table.num_embeddings

    def forward(
        self,
        input_ids: Tensor | None,  # (T,)
        token_type_ids: Tensor | None = None,  # (T,)
        position_ids: Tensor | None = None,  # (T,), which the layers read
        inputs_embeds: Tensor | None = None,  # (T, H)
        batch: PackedBatch | None = None,
        policy: Policy = ops.AUTO,
    ) -> Tensor:  # (T, H)
        ids = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if ids is not None and ids.dim() == 2:
            padded = input_ids, token_type_ids, position_ids, inputs_embeds
            return hooks.on_packed(GatedRotaryEmbeddings.forward, self, *padded)
        return embed(self, input_ids, token_type_ids, inputs_embeds, policy, batch)

    def tables(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, policy: Policy = ops.AUTO
    ) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and the tables, as `BertEmbeddings.tables` does; there are no positions."""
        words: Any = self.word_embeddings.weight if inputs_embeds is None else inputs_embeds
        types = self.token_type_embeddings
        return input_ids, EmbeddingTables(words, None if types is None else types.weight, None, Norm.of(self.LayerNorm))

    def runs_in_kernel(self, policy: Policy) -> bool:
        """Tells whether the Triton kernel computes them from ids; it can note ids outside of their table."""
        return embeds_in_kernel(self, policy)


class GatedRotaryAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v of rotated queries and keys within each sequence, and a linear after it."""

    projections = "q_proj", "k_proj", "v_proj"
    without_bias = True

    def __init__(self, config: BertConfig, rotary: RotaryLayer, layer: int = 0) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.family.text_bias
        self.dropout_site = site_of(layer, ATTENTION)
        self.num_heads, self.head_size, self.rotary = config.num_attention_heads, config.head_size, rotary
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.derived = Derived()

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of attention in the present mode."""
        return self.dropout.p if self.training else 0.0

    def fused_qkv(self) -> Any:
        """Returns the three projections as one weight (3H, H) and bias, kept until one of the parameters changes."""
        return fused.weights(self)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the current fused tensors; () if they are not kept."""
        return fused.addresses(self)

    def renew(self, training: bool) -> None:
        """Marks the fused tensors to be made again at their next use, or, for training, drops them."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> GatedRotaryAttention:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> GatedRotaryAttention:
        return fused.replica(super()._replicate_for_data_parallel())

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(GatedRotaryAttention.forward, self, x))
        qkv = fused.project(self, x, policy, batch)  # (T, 3H)
        cos_and_sin = rotations_of(batch).of(self.rotary, self.head_size)
        qkv = ops.rotary(qkv, *cos_and_sin, self.num_heads, policy=policy, fresh=True)
        if batch.has_plan(attention_weights.PLAN):
            context = attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p)
        else:
            dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_site)
            context = ops.varlen_attention(qkv, batch, self.num_heads, dropout=dropout, policy=policy)
        return project(self.o_proj, context, policy, batch)


class GatedRotaryMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x))."""

    projections = "gate_proj", "up_proj"
    without_bias = True

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        self.dropout_site = site_of(layer, INNER)
        size, inner, bias = config.hidden_size, config.intermediate_size, config.family.text_bias
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if bias else 0.0)  # Nomic has none
        self.activation = ops.ACTIVATIONS[config.hidden_act]
        self.derived = Derived()

    def fused_qkv(self) -> Any:
        """Returns gate_proj and up_proj as one weight (2I, H) and bias, under the name that `fused` uses."""
        return fused.weights(self)

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the current fused tensors; () if they are not kept."""
        return fused.addresses(self)

    def renew(self, training: bool) -> None:
        """Marks the fused tensors to be made again at their next use, or, for training, drops them."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> GatedRotaryMLP:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> GatedRotaryMLP:
        return fused.replica(super()._replicate_for_data_parallel())

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(GatedRotaryMLP.forward, self, x)
        inner = fused.project_and_gate(self, x, self.activation, policy, batch)  # (T, I)
        return project(self.down_proj, call_dropout(self.dropout, inner, batch, self.dropout_site), policy, batch)


class GatedRotaryLayer(nn.Module):
    without_bias = True

    def __init__(self, config: BertConfig, rotary: RotaryLayer, layer: int = 0) -> None:
        super().__init__()
        self.dropout_sites = site_of(layer, ATTENTION_OUTPUT), site_of(layer, OUTPUT)
        self.self_attn = GatedRotaryAttention(config, rotary, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.mlp = GatedRotaryMLP(config, layer)
        self.post_mlp_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(GatedRotaryLayer.forward, self, x)
        (first, last), calls = self.dropout_sites, (policy, batch)
        y = hooks.call(self.self_attn, batch, policy, x)
        x = _joined(self.post_attention_layernorm, self.post_attention_dropout, first, y, x, *calls)
        y = hooks.call(self.mlp, batch, policy, x)
        return _joined(self.post_mlp_layernorm, self.post_mlp_dropout, last, y, x, *calls)

    def block(self) -> Block:
        """Returns the layer as data, for engines; its modules must be plain."""
        attn, mlp = self.self_attn, self.mlp
        drops = self.post_attention_dropout, self.post_mlp_dropout
        return Block(
            query=Linear.of(attn.q_proj),
            key=Linear.of(attn.k_proj),
            value=Linear.of(attn.v_proj),
            fuse_qkv=lambda: Linear(*attn.fused_qkv()),
            num_heads=attn.num_heads,
            out=Linear.of(attn.o_proj),
            attention_norm=Norm.of(self.post_attention_layernorm),
            up=Linear.of(mlp.gate_proj),  # the part with the activation
            gate=Linear.of(mlp.up_proj),
            fuse_up=lambda: Linear(*mlp.fused_qkv()),
            activation=mlp.activation,
            down=Linear.of(mlp.down_proj),
            output_norm=Norm.of(self.post_mlp_layernorm),
            dropouts=(attn.dropout_p, *(drop.p if drop.training else 0.0 for drop in drops)),  # type: ignore[arg-type]
            inner_dropout=mlp.dropout.p if mlp.dropout.training else 0.0,
            rotary=attn.rotary.base,
            position_factor=attn.rotary.factor,
        )


def _joined(norm: Any, dropout: Any, site: int, y: Tensor, x: Tensor, policy: Policy, batch: Any) -> Tensor:
    """norm(dropout(y) + x). site: the one of the dropout's masks."""
    if not is_plain_norm(norm, dropout):
        return add_and_norm(norm, dropout, y, x, policy, batch)
    mask = ops.dropout_of(dropout.p if dropout.training else 0.0, batch, site)
    return ops.bias_residual_layer_norm(y, None, x, norm.weight, norm.bias, norm.eps, dropout=mask, policy=policy)


class GatedRotaryEncoder(LayerStack):
    def __init__(self, config: BertConfig) -> None:
        rotary = gated_rotary_layer(config)
        super().__init__(GatedRotaryLayer(config, rotary, layer) for layer in range(config.num_hidden_layers))

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(GatedRotaryEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        return self.states(x, batch, policy, keep_states)


class GatedRotaryModel(EncoderModel):
    """The encoder of Nomic and of GTE 1.5 maps token ids to one vector a token.

    add_pooling_layer: whether there is a pooler, as under a head for sequences. settings: the fields of `Options` by
    name. Raises ValueError for angles that fastbert does not compute (fastbert.checkpoint.rotary).

    Sources: Nussbaum et al., "Nomic Embed", 2024, arXiv:2402.01613; Zhang et al., "mGTE", 2024, arXiv:2407.19669.
    """

    own_modules = frozenset(
        (GatedRotaryEmbeddings, GatedRotaryEncoder, GatedRotaryLayer, GatedRotaryAttention, GatedRotaryMLP,
         nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
    )  # fmt: skip
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("GatedRotaryLayer", "GatedRotaryEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = False, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = GatedRotaryEmbeddings(config)
        self.embeddings_project = None
        self.encoder = GatedRotaryEncoder(config)
        self.pooler: BertPooler | None = BertPooler(config) if add_pooling_layer else None
        self.init_weights()

    def embed(self, inputs: PackedInputs, batch: PackedBatch) -> Tensor:
        rotations_of(batch).renew(inputs.position_ids)
        return super().embed(inputs, batch)

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        layers: Any = self.encoder.layer
        for layer in layers:
            yield layer.block()
