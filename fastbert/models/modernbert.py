"""ModernBERT on packed tokens. Shapes: T tokens, B sequences, S longest, H hidden, I intermediate, N heads, D head.

This file has the differences from BERT. Layers normalise their input, and the last state is normalised once more.
Positions rotate queries and keys, with two bases. Most layers attend within a window. The feed-forward part has a gate.
By default no linear and no norm has a bias. Modules inside a layer have transformers' names. The modules around the
layers have BERT's names (fastbert.checkpoint.families).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.rotary import RotaryLayer, modernbert_layers, setting
from fastbert.engine import Block, EmbeddingTables, Linear, Norm, Options, PackedInputs
from fastbert.engine.listeners import is_bare
from fastbert.models import attention_weights, hooks
from fastbert.models.encoder import EncoderModel
from fastbert.models.layers import LayerStack
from fastbert.models.modules import call_dropout
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.rotary import embed, embeds_in_kernel, normalise, project, project_and_gate
from fastbert.ops import Policy
from fastbert.ops.angles import rotations_of
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import ATTENTION, ATTENTION_OUTPUT, INNER, site_of


def _norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=setting(config, "norm_bias"))


class ModernBertEmbeddings(nn.Module):
    """LayerNorm(word): there are no positions and no segments."""

    without_bias = True
    position_embeddings = None
    token_type_embeddings = None
    n_token_types = 1

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.LayerNorm = _norm(config)
        self.dropout = nn.Dropout(setting(config, "embedding_dropout"))

    def forward(
        self,
        input_ids: Tensor | None,  # (T,)
        token_type_ids: Tensor | None = None,  # there are none
        position_ids: Tensor | None = None,  # (T,), which the layers read
        inputs_embeds: Tensor | None = None,  # (T, H)
        batch: PackedBatch | None = None,
        policy: Policy = ops.AUTO,
    ) -> Tensor:  # (T, H)
        ids = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if ids is not None and ids.dim() == 2:
            return hooks.on_packed(
                ModernBertEmbeddings.forward, self, input_ids, token_type_ids, position_ids, inputs_embeds
            )
        return embed(self, input_ids, None, inputs_embeds, policy, batch)

    def tables(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, policy: Policy = ops.AUTO
    ) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and the tables, as `BertEmbeddings.tables` does; there are no positions."""
        words: Any = self.word_embeddings.weight if inputs_embeds is None else inputs_embeds
        return input_ids, EmbeddingTables(words, None, None, Norm.of(self.LayerNorm))

    def runs_in_kernel(self, policy: Policy) -> bool:
        """Tells whether the Triton kernel computes them from ids; it can note ids outside of their table."""
        return embeds_in_kernel(self, policy)


class ModernBertAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v of rotated queries and keys, within a window in most layers, and a linear after it."""

    without_bias = True  # whether linears and norms may lack biases

    def __init__(self, config: BertConfig, rotary: RotaryLayer, layer: int = 0) -> None:
        super().__init__()
        size, bias = config.hidden_size, setting(config, "attention_bias")
        self.dropout_sites = site_of(layer, ATTENTION), site_of(layer, ATTENTION_OUTPUT)
        self.num_heads, self.head_size, self.rotary = config.num_attention_heads, config.head_size, rotary
        self.Wqkv = nn.Linear(size, 3 * size, bias=bias)
        self.Wo = nn.Linear(size, size, bias=bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.out_drop = nn.Dropout(config.attention_probs_dropout_prob)

    @property
    def dropout_p(self) -> float:
        """Returns the dropout probability of attention in the present mode."""
        return self.dropout.p if self.training else 0.0

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # the form of transformers
            return hooks.AttentionOutput(hooks.on_packed(ModernBertAttention.forward, self, x))
        window, cos_and_sin = self.rotary.window, rotations_of(batch).of(self.rotary, self.head_size)
        qkv = project(self.Wqkv, x, policy, batch)  # (T, 3H)
        fresh = is_bare(self.Wqkv, nn.Linear)  # else an observer may have kept the output
        qkv = ops.rotary(qkv, *cos_and_sin, self.num_heads, policy=policy, fresh=fresh)
        if batch.has_plan(attention_weights.PLAN):
            context = attention_weights.attend(qkv, batch, self.num_heads, self.dropout_p, window=window)
        else:
            dropout = ops.dropout_of(self.dropout_p, batch, self.dropout_sites[0])
            context = ops.varlen_attention(qkv, batch, self.num_heads, window=window, dropout=dropout, policy=policy)
        return call_dropout(self.out_drop, project(self.Wo, context, policy, batch), batch, self.dropout_sites[1])


class ModernBertMLP(nn.Module):
    """Wo(activation(first half of Wi(x)) * second half)."""

    without_bias = True

    def __init__(self, config: BertConfig, layer: int = 0) -> None:
        super().__init__()
        bias, self.dropout_site = setting(config, "mlp_bias"), site_of(layer, INNER)
        self.Wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.Wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.drop = nn.Dropout(setting(config, "mlp_dropout"))
        self.activation = ops.ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(ModernBertMLP.forward, self, x)
        x = project_and_gate(self.Wi, x, self.activation, policy, batch)  # (T, I)
        return project(self.Wo, call_dropout(self.drop, x, batch, self.dropout_site), policy, batch)


class ModernBertEncoderLayer(nn.Module):
    without_bias = True

    def __init__(self, config: BertConfig, rotary: RotaryLayer, layer: int = 0) -> None:
        super().__init__()
        self.attn_norm = _norm(config) if layer else nn.Identity()
        self.attn = ModernBertAttention(config, rotary, layer)
        self.mlp_norm = _norm(config)
        self.mlp = ModernBertMLP(config, layer)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(ModernBertEncoderLayer.forward, self, x)
        x = x + hooks.call(self.attn, batch, policy, normalise(self.attn_norm, x, policy, batch))
        return x + hooks.call(self.mlp, batch, policy, normalise(self.mlp_norm, x, policy, batch))

    def block(self, last_norm: nn.LayerNorm | None = None) -> Block:
        """Returns the layer as data, for engines; its modules must be plain. last_norm: that after the last layer."""
        attn, mlp, norm = self.attn, self.mlp, self.attn_norm
        query, key, value = _parts(attn.Wqkv, 3)
        up, gate = _parts(mlp.Wi, 2)
        out_p, p = (drop.p if drop.training else 0.0 for drop in (attn.out_drop, mlp.drop))
        return Block(
            query=query,
            key=key,
            value=value,
            fuse_qkv=lambda: Linear.of(attn.Wqkv),
            num_heads=attn.num_heads,
            out=Linear.of(attn.Wo),
            attention_norm=Norm.of(norm) if isinstance(norm, nn.LayerNorm) else None,
            up=up,
            gate=gate,
            fuse_up=lambda: Linear.of(mlp.Wi),
            activation=mlp.activation,
            down=Linear.of(mlp.Wo),
            output_norm=Norm.of(self.mlp_norm),
            dropouts=(attn.dropout_p, out_p, 0.0),
            inner_dropout=p,
            pre_norm=True,
            rotary=attn.rotary.base,
            position_factor=attn.rotary.factor,
            window=attn.rotary.window,
            last_norm=None if last_norm is None else Norm.of(last_norm),
        )


def _parts(linear: nn.Linear, n_parts: int) -> tuple[Linear, ...]:
    """Returns the parts of a linear that holds several linears, as views of its rows."""
    weights = linear.weight.chunk(n_parts)
    biases: Any = [None] * n_parts if linear.bias is None else linear.bias.chunk(n_parts)
    return tuple(map(Linear, weights, biases))


class ModernBertEncoder(LayerStack):
    """The encoder has the layers, and the norm of the last layer's output."""

    without_bias = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(
            ModernBertEncoderLayer(config, rotary, i) for i, rotary in enumerate(modernbert_layers(config))
        )
        self.final_norm = _norm(config)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the states before the first layer and after each, L + 1 times (T, H), the last one normalised.

        keep_states: False returns only the last. (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(ModernBertEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        states = self.states(x, batch, policy, keep_states)
        return [*states[:-1], normalise(self.final_norm, states[-1], policy, batch)]


class ModernBertModel(EncoderModel):
    """The ModernBERT encoder maps token ids to one vector a token.

    add_pooling_layer has no effect: ModernBERT has no pooler. settings: the fields of `Options` by name. Raises
    ValueError for layers or angles that fastbert does not compute (fastbert.checkpoint.rotary).

    Source: Warner et al., "Smarter, Better, Faster, Longer", 2024, arXiv:2412.13663.
    """

    own_modules = frozenset(
        (ModernBertEmbeddings, ModernBertEncoder, ModernBertEncoderLayer, ModernBertAttention, ModernBertMLP,
         nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)
    )  # fmt: skip
    counts_distances = True
    _class_arguments = ("add_pooling_layer",)
    _no_split_modules = ("ModernBertEncoderLayer", "ModernBertEmbeddings")

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, options: Options | None = None, **settings: Any
    ) -> None:
        super().__init__(config, options, **settings)
        self.embeddings = ModernBertEmbeddings(config)
        self.embeddings_project = None
        self.encoder = ModernBertEncoder(config)
        self.pooler = None
        self.init_weights()

    def embed(self, inputs: PackedInputs, batch: PackedBatch) -> Tensor:
        rotations_of(batch).renew(inputs.position_ids)
        return super().embed(inputs, batch)

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data; its modules must be plain."""
        *layers, last = self.encoder.layer
        yield from (layer.block() for layer in layers)
        yield last.block(self.encoder.final_norm)
