"""BertModel on packed tokens. Shapes: T tokens, B sequences, S longest, H hidden, I intermediate, N heads, D head size.

Module and parameter names are those of transformers, so that weights, PEFT targets and optimiser groups carry over.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert import ops, reference
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.families import AFTER_PADDING
from fastbert.engine import cpu_encoder, graphs, hooks, quantized
from fastbert.models.forward_arguments import takes_theirs
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.pretrained import PreTrainedModel, first_parameter, listed
from fastbert.ops import Policy, attention, dispatch, packing, recording, silent_writes, tracing
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch
from fastbert.ops.tracing import untraced

logger = logging.getLogger("fastbert")


ATTENTIONS = "attentions"  # the plan of a batch whose attention weights are kept


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's parameters may be used without calling it: it is no adapter, and has no hook or patch."""
    return type(module) is kind and not hooks.listened(module)


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is a bare nn.Linear with a bias, and its weight no tensor of another kind."""
    if not is_bare(linear, nn.Linear) or linear.bias is None:
        return False
    return type(linear.weight) in tracing.PLAIN or torch.compiler.is_compiling()


def is_plain_norm(norm: nn.Module, dropout: nn.Module | None = None) -> TypeGuard[nn.LayerNorm]:
    """Whether both are bare, and the LayerNorm has a weight and a bias."""
    bare = is_bare(norm, nn.LayerNorm) and (dropout is None or is_bare(dropout, nn.Dropout))
    return bare and norm.weight is not None and norm.bias is not None


def scale_and_shift(norm: nn.LayerNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm, (H,) each: ones and zeros, as `like`, where it has none."""
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if weight is not None and bias is not None:
        return weight, bias
    shape = tuple(norm.normalized_shape)
    return like.new_ones(shape) if weight is None else weight, like.new_zeros(shape) if bias is None else bias


def dense(
    module: nn.Module, x: Any, policy: Policy, activation: str = "none", batch: PackedBatch | None = None
) -> Tensor:
    """activation(module(x)), fused where the module is a plain linear. (T, K) -> (T, M)

    batch: how the rows lie, for a module that is called with padded ones; None for rows of sequences, (B, K).
    """
    if is_plain(module):
        return ops.linear(x, module.weight, module.bias, activation, policy=policy, keep=not module.training)
    x = as_it_is(module, x, policy, batch)
    return x if activation == "none" else ops.bias_gelu(x, None, activation, policy=policy)


def as_it_is(module: nn.Module, x: Any, policy: Policy, batch: PackedBatch | None) -> Tensor:
    """module(x), for more than a plain linear or embedding, of whose bits nothing is known. batch: see `dense`."""
    if policy.batch_invariant:
        name = type(module).__name__
        dispatch.refuse("", f"a {name} that is an adapter or has hooks, or no bias, cannot promise it")
    if recording.on and (output := recording.call(module, x)) is not None:
        return output
    return hooks.leaf(module, x, batch)


def dropped(dropout: nn.Module, x: Tensor, batch: PackedBatch | None = None) -> Tensor:
    """dropout(x), and what somebody put in its place. batch: see `dense`."""
    return dropout(x) if is_bare(dropout, nn.Dropout) else hooks.leaf(dropout, x, batch)


def added_and_normed(
    norm: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor | None, policy: Policy, batch: PackedBatch | None
) -> Tensor:
    """norm(dropout(x) + residual), by the modules themselves."""
    x = dropped(dropout, x, batch)
    return as_it_is(norm, x if residual is None else x + residual, policy, batch)


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.embedding_width  # E, which is H but where the family projects
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if config.family.token_types else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,  # (T,)
        token_type_ids: Tensor | None,  # (T,)
        position_ids: Tensor,  # (T,)
        inputs_embeds: Tensor | None = None,  # (T, E)
        batch: PackedBatch | None = None,
        policy: Policy = ops.AUTO,
    ) -> Tensor:  # (T, E)
        if position_ids.dim() == 2:
            ids = input_ids, token_type_ids, position_ids, inputs_embeds
            return hooks.on_packed(BertEmbeddings.forward, self, *ids)
        if not self.is_plain():
            return self._by_modules(input_ids, token_type_ids, position_ids, inputs_embeds, batch, policy)
        input_ids, words, *rest = self.operands(input_ids, inputs_embeds, policy, batch)
        return ops.embedding_layer_norm(
            input_ids,
            None if self.token_type_embeddings is None else token_type_ids,
            position_ids,
            words,
            *rest,
            inputs_embeds=words if input_ids is None else None,
            padding_idx=None if input_ids is None else self.word_embeddings.padding_idx,
            dropout_p=self.dropout.p if self.training else 0.0,
            policy=policy,
        )

    def is_plain(self) -> bool:
        """Whether all that is called here, the words apart, may be computed without a call."""
        tables = self.position_embeddings, self.token_type_embeddings
        bare = all(table is None or is_bare(table, nn.Embedding) for table in tables)
        return bare and is_plain_norm(self.LayerNorm, self.dropout)

    def _by_modules(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None,
        batch: PackedBatch | None,
        policy: Policy,
    ) -> Tensor:
        x = as_it_is(self.word_embeddings, input_ids, policy, batch) if inputs_embeds is None else inputs_embeds
        if self.token_type_embeddings is not None and token_type_ids is not None:
            x = x + as_it_is(self.token_type_embeddings, token_type_ids, policy, batch)
        x = x + as_it_is(self.position_embeddings, position_ids, policy, batch)
        return dropped(self.dropout, as_it_is(self.LayerNorm, x, policy, batch), batch)

    def check_ids(self, input_ids: Tensor, token_type_ids: Tensor) -> None:
        """Raises IndexError where one of them is beyond its table."""
        n_words = self.word_embeddings.num_embeddings
        ops.check_ids(input_ids=(input_ids, n_words), token_type_ids=(token_type_ids, self.n_token_types))

    @property
    def n_token_types(self) -> int:
        """How many segments there are; one, without a table, in a model that knows none."""
        table = self.token_type_embeddings
        return 1 if table is None else table.num_embeddings

    def operands(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, policy: Policy, batch: PackedBatch | None = None
    ) -> tuple[Any, ...]:
        """Ids, and the words' table (V, E), or no ids and the words themselves (T, E); the other parameters; eps."""
        words: Any = self.word_embeddings
        if input_ids is not None and not is_bare(words, nn.Embedding):
            input_ids, inputs_embeds = None, as_it_is(words, input_ids, policy, batch)
        return (
            input_ids,
            words.weight if inputs_embeds is None else inputs_embeds,
            None if self.token_type_embeddings is None else self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            *scale_and_shift(self.LayerNorm, self.position_embeddings.weight),
            self.LayerNorm.eps,
        )


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.derived = Derived()

    def fused_qkv(self) -> tuple[Tensor, Tensor]:
        """The three projections as one weight (3H, H) and bias (3H,), kept until one of the six parameters changes.

        The bias of a linear without one is zeros. In training mode nothing is kept. train() and eval() make it anew:
        fastbert.ops.silent_writes says what else does.
        """
        linears = (self.query, self.key, self.value)
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        parameters = weights + [bias for bias in biases if bias is not None]
        if any(p.dtype != parameters[0].dtype for p in parameters):
            raise RuntimeError(f"query, key, value: expected one dtype, got {[p.dtype for p in parameters]}")
        present = tuple(bias is not None for bias in biases)

        def make() -> tuple[Tensor, Tensor]:
            filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
            return torch.cat(weights), torch.cat(filled)

        if self.training:
            return make()
        fused: Any = self.derived.get("qkv", parameters, make, present)
        return fused

    def derived_addresses(self) -> tuple[int, ...]:
        """Where the fused weight and bias are, up to date; nowhere if they are made on every call, or not at all."""
        if not (is_plain(self.query) and is_plain(self.key) and is_plain(self.value)):
            return ()
        return self.derived.addresses("qkv", self.fused_qkv())

    def train(self, mode: bool = True) -> BertSelfAttention:
        ops.forget_packed(self.derived.tensors())  # packed from what is about to be written anew
        if mode:
            self.derived.clear()
        else:
            self.derived.look_again()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> BertSelfAttention:
        replica: Any = super()._replicate_for_data_parallel()
        replica.derived = Derived()  # its parameters are others
        return replica

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # as transformers' returns it
            return hooks.AttentionOutput(hooks.on_packed(BertSelfAttention.forward, self, x))
        if is_plain(self.query) and is_plain(self.key) and is_plain(self.value):
            qkv = ops.linear(x, *self.fused_qkv(), policy=policy, keep=not self.training)  # (T, 3H)
        else:
            qkv = torch.cat([as_it_is(part, x, policy, batch) for part in (self.query, self.key, self.value)], -1)
        dropout_p = self.dropout.p if self.training else 0.0
        if batch.has_plan(ATTENTIONS):
            return self._keeping_weights(qkv, batch, dropout_p)
        return ops.varlen_attention(qkv, batch, self.num_heads, dropout_p=dropout_p, policy=policy)

    def _keeping_weights(self, qkv: Tensor, batch: PackedBatch, dropout_p: float) -> Tensor:
        """Attention in plain PyTorch, whose weights (B, N, S, S) join the batch's; zeros at rows of padding."""
        view = hooks.padded_view(batch)
        q, k, v = packing.pad(qkv, view).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, S, D)
        token = packing.pad(torch.ones_like(qkv[:, 0], dtype=torch.bool), view)  # (B, S)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~token[:, None, None], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1) * token[:, None, :, None]
        batch.plan(ATTENTIONS, list).append(weights)
        kept = nn.functional.dropout(weights, dropout_p)
        return packing.pack((kept @ v).transpose(1, 2).flatten(2), view)


class BertAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): transformers' BertSelfOutput and BertOutput."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, x: Tensor, residual: Tensor, policy: Policy = ops.AUTO, batch: PackedBatch | None = None
    ) -> Tensor:  # (T, K), (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(BertAddNorm.forward, self, x, residual)
        norm = self.LayerNorm
        if not is_plain_norm(norm, self.dropout):
            x = dense(self.dense, x, policy, batch=batch)
            return added_and_normed(norm, self.dropout, x, residual, policy, batch)
        dropout_p = self.dropout.p if self.training else 0.0
        after = residual, norm.weight, norm.bias, norm.eps
        if is_plain(self.dense):
            weight, bias = self.dense.weight, self.dense.bias
            return ops.linear_residual_layer_norm(
                x, weight, bias, *after, dropout_p=dropout_p, policy=policy, keep=not self.training
            )
        x = as_it_is(self.dense, x, policy, batch)
        return ops.bias_residual_layer_norm(x, None, *after, dropout_p=dropout_p, policy=policy)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertAddNorm(config.hidden_size, config)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Any:  # (T, H) -> (T, H)
        if x.dim() == 3:  # as transformers' returns it
            return hooks.AttentionOutput(hooks.on_packed(BertAttention.forward, self, x))
        return hooks.call(self.output, batch, policy, hooks.call(self.self, batch, policy, x), x)


class BertIntermediate(nn.Module):
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
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertAddNorm(config.intermediate_size, config)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:  # (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(BertLayer.forward, self, x)
        x = hooks.call(self.attention, batch, policy, x)
        return hooks.call(self.output, batch, policy, hooks.call(self.intermediate, batch, policy, x), x)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.checkpointing: dict[str, Any] = {}  # arguments of torch.utils.checkpoint.checkpoint

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO, keep_states: bool = True) -> Any:
        """(T, H) -> the hidden states before the first layer and after each, L + 1 times (T, H), or the last alone.

        (B, S, H) -> an output with last_hidden_state and hidden_states.
        """
        if x.dim() == 3:
            padded = hooks.on_packed(BertEncoder.forward, self, x, keep_states=keep_states)
            return BaseModelOutputWithPooling(padded[-1], hidden_states=tuple(padded) if keep_states else None)
        states = [x]
        for layer in self.layer:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(hooks.call, layer, batch, policy, x, **self.checkpointing)
            else:
                x = hooks.call(layer, batch, policy, x)
            states = [*states, x] if keep_states else [x]
        return states


# The modules of an encoder as it is made. Their forwards launch the same kernels every time, and their parameters stand
# for them.
ENCODER_MODULES = frozenset(
    (BertEmbeddings, BertEncoder, BertLayer, BertAttention, BertSelfAttention, BertIntermediate, BertAddNorm,
     nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout)
)  # fmt: skip


def first_rows(x: Tensor, batch: PackedBatch, policy: Policy) -> Tensor:
    """(T, H) -> (B, H): each sequence's first token, zeros where there is none."""
    if batch.valid is not None:
        return packing.first_rows(x, batch)
    return ops.pool(x, batch.cu_seqlens, "cls", policy=policy)


# The types that an entry of a module's parameters may have, for code that takes their addresses.
_KINDS = frozenset((*tracing.PLAIN, type(None)))


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:
        """(T, H) -> (B, H): tanh of a linear of each sequence's first token, which is zeros where there is none."""
        if x.dim() == 3:
            return hooks.on_packed(BertPooler.forward, self, x, per_token=False)
        x = dense(self.dense, first_rows(x, batch, policy), policy)
        return ops.elementwise(torch.tanh, x, policy=policy)


@dataclass
class Encoded:
    """What the encoder computed, packed: what heads read."""

    batch: PackedBatch
    last_hidden_state: Tensor  # (T, H)
    hidden_states: list[Tensor] | None  # L + 1 times (T, H)
    attentions: tuple[Tensor, ...] | None  # L times (B, N, S, S)
    pooled: Tensor | None = None  # (B, H), where somebody has pooled already

    def rest(self) -> dict[str, Any]:
        """The fields that the outputs of all models share, padded."""
        states = self.hidden_states
        padded = None if states is None else tuple(packing.pad(state, self.batch) for state in states)
        return {"hidden_states": padded, "attentions": self.attentions}


def encode_by_call(
    bert: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
) -> Encoded:
    """BertModel.encode by a call of the module, so that its hooks see, and may change, its output."""
    output = bert(
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions=output_attentions,
        output_hidden_states=output_hidden_states, return_dict=True,
    )  # fmt: skip
    last = output[0]
    if attention_mask is None:
        batch = packing.without_padding(last.shape[0], last.shape[1], last.device)
    else:
        batch = packing.unpad(attention_mask.expand(last.shape[:2]))
    states = output.hidden_states
    rows = None if states is None else [packing.pack(state, batch) for state in states]
    return Encoded(batch, packing.pack(last, batch), rows, output.attentions, output.pooler_output)


class BertModel(PreTrainedModel):
    """The BERT encoder: token ids in, one vector a token out, and the pooled [CLS] vector.

    Also that of its family, as config.model_type says (fastbert.checkpoint.families): the modules and their names are
    BERT's, the pooler is there where the family has one, and default positions are the family's.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018, arXiv:1810.04805.
    """

    _class_arguments = ("add_pooling_layer",)

    def __init__(
        self,
        config: BertConfig,
        add_pooling_layer: bool = True,
        *,
        backend: str = "auto",
        strict: bool = False,
        batch_invariant: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__(config, backend=backend, strict=strict, batch_invariant=batch_invariant, precision=precision)
        self.quantized_weights = quantized.QuantizedWeights()
        self.embeddings = BertEmbeddings(config)
        width, hidden_size = config.embedding_width, config.hidden_size
        self.embeddings_project = nn.Linear(width, hidden_size) if width != hidden_size else None
        self.encoder = BertEncoder(config)
        has_pooler = add_pooling_layer and config.family.pooler
        self.pooler: BertPooler | None = BertPooler(config) if has_pooler else None
        # The padding id, where positions count from it by default.
        self._counted_from = config.pad_token_id if config.family.positions == AFTER_PADDING else None
        self.graphs = graphs.Graphs()
        self.cpu_encoder = cpu_encoder.CpuEncoder()
        self._watch: graphs.Watch | None = None
        self._addresses: tuple[Any, Any] = (None, None)
        self._n_silent_writes = 0
        self.init_weights()

    def _report_missing(self, missing: list[str], src: str) -> list[str]:
        pooler = [name for name in missing if name.startswith("pooler.")]
        if pooler:
            theirs = listed([self.config.family.to_theirs(name) for name in pooler])
            logger.warning("%s: the checkpoint lacks %s: pooler_output will be None", src, theirs)
            self.pooler = None
        return super()._report_missing([name for name in missing if name not in pooler], src)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """input_ids: (B, S) int, or inputs_embeds: (B, S, H); the others (B, S); attention_mask nonzero at tokens.

        position_ids: the column index by default; in RoBERTa's family the padding id + 1 and up, counted over the ids
        that are not the padding id, as in transformers, or without ids over the columns. ELECTRA's inputs_embeds are
        as wide as its embedding_size. Token types are 0 in a model without segments.

        Returns last_hidden_state (B, S, H), zeros at padding positions, and pooler_output (B, H), from the first token
        that the mask leaves in each row. hidden_states and attentions on request; attentions take the slow reference
        path. Raises IndexError for ids outside the vocabulary or the position table, ValueError for shapes.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        output = BaseModelOutputWithPooling(
            last_hidden_state=packing.pad(encoded.last_hidden_state, encoded.batch),
            pooler_output=self.pool(encoded),
            **encoded.rest(),
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(T,) ids of B sequences one after the other -> (T, H).

        cu_seqlens: (B + 1,) int32, starts at 0, ends at T. position_ids count from 0 in each sequence by default, in
        RoBERTa's family from the padding id + 1, over the ids that are not the padding id.
        """
        self._check_tensors(input_ids=input_ids)
        if input_ids.dim() != 1:
            raise ValueError(f"input_ids: expected shape (T,), got {tuple(input_ids.shape)}")
        batch = packing.from_cu_seqlens(cu_seqlens, input_ids.shape[0], self.device)
        return self.encode_packed(batch, input_ids, token_type_ids, position_ids)[-1]

    def pool(self, encoded: Encoded) -> Tensor | None:
        """(B, H), or None without a pooler."""
        if self.pooler is None or encoded.pooled is not None:
            return encoded.pooled
        return hooks.call(self.pooler, encoded.batch, self.policy, encoded.last_hidden_state)

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        batch: PackedBatch | None = None,
    ) -> Encoded:
        """forward without the padding at the end: for heads, which work on packed tokens too.

        batch: the packing of the attention_mask, where the caller has it already.
        """
        self._check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        settings = self.config.extra
        keep_states = bool(
            settings.get("output_hidden_states") if output_hidden_states is None else output_hidden_states
        )
        keep_attentions = bool(settings.get("output_attentions") if output_attentions is None else output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        if given.dim() != (2 if inputs_embeds is None else 3):
            expected = "(B, S)" if inputs_embeds is None else "(B, S, H)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(given.shape)}")
        shape = tuple(given.shape[:2])
        for other, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if tensor is not None and all(
                tracing.differ(tuple(tensor.shape), expected) for expected in (shape, (1, shape[1]))
            ):
                hint = " (masks of pairs of tokens are not supported)" if tensor.dim() > 2 else ""
                raise ValueError(f"{other}: expected shape {shape} as {name}, got {tuple(tensor.shape)}{hint}")
        if attention_mask is not None and tracing.differ(attention_mask.shape[0], shape[0]):
            attention_mask = attention_mask.expand(shape)
        if token_type_ids is not None and tracing.differ(token_type_ids.shape[0], shape[0]):
            token_type_ids = token_type_ids.expand(shape)
        if position_ids is not None:
            came = tuple(position_ids.shape)
            if tracing.differ(came, shape) and tracing.differ(came, (1, shape[1])):
                raise ValueError(f"position_ids: expected shape {shape}, got {tuple(position_ids.shape)}")
            position_ids = position_ids.expand(shape)
        self._check_embeds(inputs_embeds)
        if position_ids is None and self._counted_from is not None:
            if input_ids is not None:
                position_ids = packing.positions_after_padding(input_ids, self._counted_from)  # also ids at padding
            else:
                position_ids = (torch.arange(shape[1], device=given.device) + self._counted_from + 1).expand(shape)

        transformed = tracing.transformed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if transformed is not None:
            batch = packing.in_place(given, attention_mask)
        elif batch is None and attention_mask is not None:
            batch = packing.unpad(attention_mask)
        elif batch is None:
            batch = packing.without_padding(shape[0], shape[1], given.device)
        ids, types, positions, embeds = (
            None if t is None else packing.pack(t, batch)
            for t in (input_ids, token_type_ids, position_ids, inputs_embeds)
        )
        if keep_attentions:
            if transformed is None:
                self._check_ids(batch, ids, types, positions)
            self._accept_reference()
            if not self._is_altered():
                return self._encode_by_reference(
                    batch, keep_states, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
                )
            weights = batch.plan(ATTENTIONS, list)
        if transformed is not None:
            tracing.note(type(self).__name__, transformed)
            if self.precision is not None:
                quantized.choose(self, transformed)
            states = self._encode_in_place(batch, ids, types, positions, embeds, keep_states)
        else:
            states = self.encode_packed(batch, ids, types, positions, embeds, keep_states=keep_states)
        return Encoded(batch, states[-1], states if keep_states else None, tuple(weights) if keep_attentions else None)

    def encode_packed(
        self,
        batch: PackedBatch,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        keep_states: bool = False,
        check: bool = True,
    ) -> list[Tensor]:
        """Packed (T,) ids or (T, H) embeddings -> the last hidden state (T, H) as a list, or all L + 1 (keep_states).

        check=False skips the looks at the ids' values and at the weights, which on a GPU wait for it, for callers who
        have checked and called `follow_weights`.
        """
        ids = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        self._check_tensors(**ids, inputs_embeds=inputs_embeds)
        n_tokens = batch.n_tokens
        for name, tensor in ids.items():
            if tensor is not None and tensor.shape != (n_tokens,):
                raise ValueError(f"{name}: expected shape ({n_tokens},), got {tuple(tensor.shape)}")
        self._check_embeds(inputs_embeds)
        if position_ids is None and self._counted_from is not None:
            if input_ids is None:
                position_ids = batch.position_ids + self._counted_from + 1
            else:
                position_ids = packing.positions_after_padding(input_ids, self._counted_from, batch)
        if check:
            self._check_ids(batch, input_ids, token_type_ids, position_ids)
            self.follow_weights()
        if position_ids is None:
            position_ids = batch.position_ids
        in_bucket = not torch.compiler.is_compiling() and graphs.bucket_of(n_tokens) is not None
        if input_ids is not None and in_bucket and self.graph_obstacle() is None:
            return self._encode_bucket(batch, (input_ids, token_type_ids, position_ids), keep_states)
        if self.embeddings.token_type_embeddings is None:
            token_type_ids = None
        elif token_type_ids is None:
            token_type_ids = torch.zeros_like(batch.position_ids)
        # Of int64 alone, as in the rows of a bucket: kernels are compiled for the dtype of the ids.
        words = None if input_ids is None else input_ids.long()
        types, positions = None if token_type_ids is None else token_type_ids.long(), position_ids.long()
        if self.precision is not None and self.device.type == "cpu" and quantized.choose(self) == "cpu":
            return self._encode_in_int8(batch, words, types, positions, inputs_embeds, keep_states)
        if words is not None and not keep_states and self.cpu_encoder_obstacle(n_tokens) is None:
            last = self._encode_in_one_call(batch, words, types, positions)
            if last is not None:
                return [last]
        inputs = words, types, positions, inputs_embeds
        n_tokens = batch.n_tokens
        padded = self._packs_weights() and not self.policy.batch_invariant  # for oneDNN, which that mode does not take
        n_rows = ops.packed_linear.rows_for(n_tokens, self.dtype) if padded else n_tokens
        words, segments, positions, embeds = (packing.in_more_rows(t, n_rows) for t in inputs)
        if n_rows > n_tokens:
            batch = dataclasses.replace(batch, position_ids=positions, _plans={})
        states = self._encode(words, segments, positions, batch, embeds, keep_states)
        return states if n_rows == n_tokens else [state[:n_tokens] for state in states]

    def _encode_in_place(
        self,
        batch: PackedBatch,
        words: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
        inputs_embeds: Tensor | None,
        keep_states: bool,
    ) -> list[Tensor]:
        """encode_packed of a `varlen.in_place` batch, on its B * S rows, whose values nobody may look at."""
        positions = batch.position_ids if positions is None else positions
        types = torch.zeros_like(batch.position_ids) if types is None else types
        words = None if words is None else words.long()
        segments = None if self.embeddings.token_type_embeddings is None else types.long()
        return self._encode(words, segments, positions.long(), batch, inputs_embeds, keep_states)

    @untraced
    def _encode_in_int8(
        self,
        batch: PackedBatch,
        words: Tensor | None,
        segments: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
        keep_states: bool,
    ) -> list[Tensor]:
        """By the C++ kernels for CPUs, where `quantized.choose` says so."""
        quantized._refuse_gradients(self, inputs_embeds)
        if words is None:
            given: Any = self.embeddings(None, segments, positions, inputs_embeds, batch, self.policy)
        else:
            given = words, segments, positions
        weights = self._int8_weights()
        return self.cpu_encoder.run_int8(weights, batch, given, self.dtype, keep_states)

    def _int8_weights(self) -> Any:
        """The 8-bit weights of the C++ kernels, made anew where a parameter has changed; None where they cannot be."""
        return self._cpu_weights(True)

    def _cpu_weights(self, int8: bool) -> Any:
        """The weights as the C++ kernels read them, made anew where a parameter has changed; None where they cannot be.

        The embeddings are among them but where the family projects, and 8-bit weights are wanted or not.
        """
        watch = self._watch
        assert watch is not None
        state = watch.state()
        n_silent_writes = watch.silent_writes(state)

        def renewed() -> Any:
            watch.derived()  # which is a change, too
            return int8, state, n_silent_writes, watch.changes()

        def make() -> Any:
            embeddings = self.embeddings if int8 or self.embeddings_project is None else None
            attend = BertSelfAttention.fused_qkv
            return cpu_encoder.gather(embeddings, self.encoder.layer, self.config, attend, int8=int8)

        return self.cpu_encoder.weights((int8, state, n_silent_writes, watch.changes()), renewed, make)

    def _encode(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        batch: PackedBatch,
        inputs_embeds: Tensor | None = None,
        keep_states: bool = False,
    ) -> list[Tensor]:
        if batch.valid is None:
            ops.prepare_attention(batch, self.dtype, self.config.head_size, self.policy)
        if self.precision is not None and batch.valid is None:
            backend = quantized.choose(self)
            if backend != quantized.UNQUANTISED:
                ids = input_ids, token_type_ids, position_ids
                return quantized.encode(self, backend, batch, *ids, inputs_embeds, keep_states)
        inputs = input_ids, token_type_ids, position_ids, inputs_embeds
        if batch.valid is not None or torch.compiler.is_compiling():
            return self._run_encoder(self._embed(*inputs, batch), batch, keep_states)
        try:
            return self._run_encoder(self._embed(*inputs, batch), batch, keep_states)
        except RuntimeError as error:
            self._blame_dtypes(error)
            raise

    def _run_encoder(self, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor]:
        if not hooks.listened(self.encoder):
            return self.encoder(x, batch, self.policy, keep_states)
        return hooks.states_of_encoder(self.encoder, batch, self.policy, x, keep_states)

    def _encode_in_one_call(
        self, batch: PackedBatch, words: Tensor, types: Tensor | None, positions: Tensor
    ) -> Tensor | None:
        """The last hidden state (T, H), from a C++ kernel; None where the weights are not as it needs them."""
        try:
            weights = self._cpu_weights(False)
        except RuntimeError as error:
            self._blame_dtypes(error)
            raise
        if weights is None:
            return None
        if self.embeddings_project is None:
            return self.cpu_encoder.run(weights, batch, (words, types, positions))
        return self.cpu_encoder.run(weights, batch, None, self._embed(words, types, positions, None, batch))

    def _embed(
        self, ids: Tensor | None, types: Tensor | None, positions: Tensor, embeds: Tensor | None, batch: PackedBatch
    ) -> Tensor:  # -> (T, H)
        inputs = {"input_ids": ids, "token_type_ids": types, "position_ids": positions, "inputs_embeds": embeds}
        x = hooks.call_embeddings(self.embeddings, batch, self.policy, **inputs)
        return x if self.embeddings_project is None else dense(self.embeddings_project, x, self.policy, batch=batch)

    # CUDA graphs: see fastbert.engine.graphs.

    @property
    def cuda_graphs(self) -> bool:
        """Whether short batches are launched as CUDA graphs, on by default; the results are the same to the bit."""
        return self.graphs.enabled

    @cuda_graphs.setter
    def cuda_graphs(self, enabled: bool) -> None:
        self.graphs.enabled = bool(enabled)
        if not enabled:
            self.graphs.clear()

    def train(self, mode: bool = True) -> BertModel:
        self.cpu_encoder.clear()
        if mode:
            self.quantized_weights.clear()
            self.graphs.clear()
        else:
            self.quantized_weights.look_again()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> BertModel:
        self.graphs.clear()  # or their memory would stay where the model was
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None, "_addresses": (None, None)}

    def _replicate_for_data_parallel(self) -> BertModel:
        replica: Any = super()._replicate_for_data_parallel()
        replica.quantized_weights = quantized.QuantizedWeights()  # its parameters are others
        return replica

    def graph_obstacle(self) -> str | None:
        """Why no batch runs in the rows of a bucket, as a CUDA graph or as if it were one, at the moment; or None."""
        device = self.device
        if graphs.capturer(device) is None:
            return f"there are no CUDA graphs on {device}"
        if torch.is_grad_enabled():
            return "gradients are on (torch.no_grad or torch.inference_mode turns them off)"
        if self.graphs_refused() is not None:
            return self.graphs_refused()
        # A replica of DataParallel shares what it has with the others, and lasts for one call.
        if self.__dict__.get("_is_replica", False):
            return "the model is a replica of DataParallel"
        if (observer := graphs.observed(device)) is not None:
            return observer
        if not self._plain_modules():
            return "a module of the encoder is an adapter, has hooks or a forward of its own, or is in training mode"
        why_not = attention.obstacle(self.config.head_size, torch.empty(0, dtype=self.dtype, device=device))
        decision = dispatch.decide("attention", self.policy, device, why_not)
        return None if decision.backend == "triton" else f"the backend of attention is {decision.backend!r}"

    def _plain_modules(self) -> bool:
        """Whether nobody listens to a module of the encoder, or has put another in its place."""
        if self._watch is None or not self._watch.same_modules():
            parts = self.embeddings, self.embeddings_project, self.encoder
            self._watch = graphs.Watch([part for part in parts if part is not None], ENCODER_MODULES)
            self._n_silent_writes = 0
        return self._watch.plain() and not hooks.everywhere()

    def follow_weights(self) -> None:
        """Makes what is derived from weights anew where they were written to without PyTorch's count.

        On a GPU, where this waits for it, callers of `encode_packed` with check=False call it once for all batches. On
        a CPU it does nothing, since each use looks.
        """
        device = self.device
        if not silent_writes.waits(device) or torch.compiler.is_compiling() or graphs.observed(device):
            return
        self._plain_modules()  # which sees to `_watch`
        watch = self._watch
        assert watch is not None
        n_silent_writes = watch.silent_writes(watch.state())
        if n_silent_writes != self._n_silent_writes:
            self._n_silent_writes = n_silent_writes
            watch.look_again()
            self.quantized_weights.look_again()

    def _plain_parameters(self) -> bool:
        """Whether the encoder's parameters are tensors whose numbers are at their address. After `_plain_modules`."""
        assert self._watch is not None
        return self._watch.kinds() <= _KINDS

    def all_in_eval_mode(self) -> bool:
        """Whether every module is known to be in eval mode; False where that would have to be asked of each."""
        pooler = self.pooler
        return not self.training and (pooler is None or not pooler.training) and self._plain_modules()

    def _packs_weights(self) -> bool:
        """Whether the encoder's linears have packed weights, and nobody would see that they compute rows of padding."""
        if self.device.type != "cpu" or torch.is_grad_enabled() or tracing.observed() is not None:
            return False
        decision = dispatch.decide("linear", self.policy, self.device, None)
        usable = decision.backend == "cpu" and ops.packed_linear.unavailable(self.dtype) is None
        return usable and self._plain_modules() and self._plain_parameters()

    def cpu_encoder_obstacle(self, n_rows: int | None = None) -> str | None:
        """Why the encoder does not run in one call of a C++ kernel at the moment, on so many tokens; or None."""
        if torch.compiler.is_compiling():
            return tracing.observed()
        parameter = first_parameter(self)
        dtype, device = parameter.dtype, parameter.device
        why_not = cpu_encoder.obstacle(self.config, dtype, self.policy, device)
        if why_not is not None:
            return why_not
        choosy = not self.policy.batch_invariant  # that takes the same code for any number of rows
        hidden_size = self.config.hidden_size
        if choosy and n_rows is not None and not self.cpu_encoder.takes_rows(n_rows, dtype, hidden_size):
            return f"{n_rows} tokens are better run operation by operation"
        if self.precision is not None:
            decision = quantized.decide(self, self.policy, device, dtype)
            if decision.backend != quantized.UNQUANTISED:
                return f"precision={self.precision!r}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return "gradients are on (torch.no_grad or torch.inference_mode turns them off)"
        return self._unlike_one_call(device)

    def int8_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why precision="int8" does not run in the C++ kernels for CPUs on this device, in this dtype; or None."""
        if torch.compiler.is_compiling():
            return tracing.observed()
        why_not = cpu_encoder.int8_obstacle(self.config, dtype)
        if why_not is not None or self.device != device or self.dtype != dtype:
            return why_not
        why_not = self._unlike_one_call(device)
        if why_not is None and self._int8_weights() is None:
            return "the parameters are not of one dtype and contiguous, or the LayerNorms differ in eps"
        return why_not

    def _unlike_one_call(self, device: torch.device) -> str | None:
        """Why the operations could not run as one at the moment without a difference that somebody sees; or None."""
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if self.__dict__.get("_is_replica", False):
            return "the model is a replica of DataParallel"
        if (observer := graphs.observed(device)) is not None:
            return observer
        if not self._plain_modules():
            return "a module of the encoder is an adapter, has hooks or a forward of its own, or is in training mode"
        return None if self._plain_parameters() else "a parameter is a tensor of another kind"

    def graphs_refused(self) -> str | None:
        """Why no batch of this model would run as a CUDA graph on any device, or None."""
        return "the model is in training mode" if self.training else None

    def _encode_bucket(
        self, batch: PackedBatch, ids: tuple[Tensor, Tensor | None, Tensor], keep_states: bool
    ) -> list[Tensor]:
        config = self.config
        shape = graphs.Shape(batch.device, self.dtype, config.hidden_size, config.head_size, self.policy)
        if self.graphs.enabled and not keep_states:

            def encode_last(*inputs: Any) -> Tensor:
                return self._encode(*inputs)[-1]

            last = self.graphs.run(encode_last, batch, ids, shape, self._weights)  # None where it does not fit
            if last is not None:
                return [last]

        encode = functools.partial(self._encode, keep_states=keep_states)
        return [state[: batch.n_tokens] for state in graphs.plainly(encode, batch, ids, shape)]

    def _weights(self) -> Any:
        """Where the weights are that a graph reads, derived ones too, and how often they were written to."""
        assert self._watch is not None
        state = self._watch.state(), self.precision
        looked = silent_writes.waits(self.device)  # in `follow_weights`
        n_silent_writes = 0 if looked else self._watch.silent_writes(state[0])
        # Read before the addresses are: what changes meanwhile is looked at the next time.
        found = state, n_silent_writes, self._watch.changes(), self.quantized_weights.changes
        if found != self._addresses[0]:
            in_8_bits = self.precision is not None and quantized.choose(self) != quantized.UNQUANTISED
            derived = quantized.addresses(self) if in_8_bits else self._watch.derived()
            self._addresses = found, (state, derived)
        return self._addresses[1]

    def _check_ids(
        self, batch: PackedBatch, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> None:
        # An adapter in the place of the word embeddings need not have their attributes.
        n_words = getattr(self.embeddings.word_embeddings, "num_embeddings", self.config.vocab_size)
        n_positions = self.embeddings.position_embeddings.num_embeddings
        if position_ids is None and batch.padded_length > n_positions:
            position_ids = batch.position_ids
        ops.check_ids(
            input_ids=(input_ids, n_words),
            token_type_ids=(token_type_ids, self.embeddings.n_token_types),
            position_ids=(position_ids, n_positions),
        )

    def _check_embeds(self, embeds: Tensor | None) -> None:
        if embeds is None:
            return
        if embeds.dtype != self.dtype:
            raise TypeError(f"inputs_embeds: expected the model's dtype {self.dtype}, got {embeds.dtype}")
        if tracing.differ(embeds.shape[-1], self.config.embedding_width):
            came, expected = tuple(embeds.shape), self.config.embedding_width
            name = "hidden_size" if self.embeddings_project is None else "embedding_size"
            raise ValueError(f"inputs_embeds: expected {expected} ({name}) in the last dimension, got {came}")

    def _is_altered(self) -> bool:
        """Whether a module of the encoder is an adapter or has hooks, so that its parameters cannot stand for it."""
        parts: Any = self.embeddings, self.embeddings_project, self.encoder
        modules = (module for part in parts if part is not None for module in part.modules())
        return any(type(module) not in ENCODER_MODULES or hooks.listened(module) for module in modules)

    def _accept_reference(self) -> None:
        """Raises BackendError where nothing but a fused kernel may run; else logs once that none does."""
        backend, reason = self.policy.backend, "fused attention keeps no probabilities"
        if self.policy.strict:
            raise ops.BackendError(
                f"output_attentions: the backend {backend!r} cannot give them, and strict=True: {reason}"
            )
        _log_reference(backend, reason)

    def _encode_by_reference(self, batch: PackedBatch, keep_states: bool, *inputs: Tensor | None) -> Encoded:
        if self.training and (self.config.hidden_dropout_prob or self.config.attention_probs_dropout_prob):
            logger.warning("output_attentions takes the reference path, which applies no dropout")
        result = reference.bert(
            dict(self.named_parameters(remove_duplicate=False)), self.config, *inputs, dtype=self.dtype
        )
        states = [packing.pack(state, batch) for state in result.hidden_states]
        return Encoded(batch, states[-1], states if keep_states else None, result.attentions)


@functools.cache
def _log_reference(backend: str, reason: str) -> None:
    logger.warning("output_attentions: backend %r falls back to 'reference': %s", backend, reason)


def wants_dict(config: BertConfig, return_dict: bool | None) -> bool:
    """Whether to return an output class (the default) or a tuple."""
    return config.use_return_dict if return_dict is None else return_dict
