"""The embeddings of BERT's family are the normalised sum of rows from three tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.family import AFTER_PADDING
from fastbert.engine import EmbeddingTables, Norm
from fastbert.engine.listeners import is_bare, is_plain_norm
from fastbert.models import hooks
from fastbert.models.modules import call_dropout, call_module
from fastbert.ops import Policy, dispatch, embedding, tracing
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import EMBEDDINGS


class BertEmbeddings(nn.Module):
    """LayerNorm(word + token type + position)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.embedding_width  # E, which is H unless the family projects
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        # The position of a padding id is that id. No checkpoint trains it.
        unused_position = config.pad_token_id if config.family.positions == AFTER_PADDING else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, padding_idx=unused_position)
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
        if not self._is_plain():
            return self._by_modules(input_ids, token_type_ids, position_ids, inputs_embeds, batch, policy)
        input_ids, tables = self.tables(input_ids, inputs_embeds, policy, batch)
        return ops.embedding_layer_norm(
            input_ids,
            None if self.token_type_embeddings is None else token_type_ids,
            position_ids,
            tables.words,
            tables.token_types,
            tables.positions,
            *tables.norm.filled(tables.positions),
            tables.norm.eps,
            inputs_embeds=tables.words if input_ids is None else None,
            padding_idx=None if input_ids is None else self.word_embeddings.padding_idx,
            dropout=ops.dropout_of(self.dropout.p if self.training else 0.0, batch, EMBEDDINGS),
            policy=policy,
        )

    def tables(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        policy: Policy = ops.AUTO,
        batch: PackedBatch | None = None,
    ) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and the tables; or None, and tables with embeddings (T, E) as words, given or from the module."""
        words: Any = self.word_embeddings
        if input_ids is not None and not is_bare(words, nn.Embedding):
            input_ids, inputs_embeds = None, call_module(words, input_ids, policy, batch)
        token_types = self.token_type_embeddings
        return input_ids, EmbeddingTables(
            words=words.weight if inputs_embeds is None else inputs_embeds,
            token_types=None if token_types is None else _table(token_types),
            positions=_table(self.position_embeddings),
            norm=Norm.of(self.LayerNorm),
        )

    def runs_in_kernel(self, policy: Policy) -> bool:
        """Tells whether the Triton kernel computes them from ids, without gradients."""
        words = self.word_embeddings
        if not self._is_plain() or not is_bare(words, nn.Embedding):
            return False
        types, positions, norm = self.token_type_embeddings, self.position_embeddings, self.LayerNorm
        tables = words.weight, None if types is None else types.weight, positions.weight, norm.weight, norm.bias
        obstacle = embedding.triton_obstacle(words.weight.shape[1], *tables)
        return dispatch.decide("embedding", policy, words.weight.device, obstacle).backend == "triton"

    def _is_plain(self) -> bool:
        """Tells whether all modules here, except the words, may be computed without a call."""
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
        x = call_module(self.word_embeddings, input_ids, policy, batch) if inputs_embeds is None else inputs_embeds
        if self.token_type_embeddings is not None and token_type_ids is not None:
            x = x + call_module(self.token_type_embeddings, token_type_ids, policy, batch)
        x = x + call_module(self.position_embeddings, position_ids, policy, batch)
        return call_dropout(self.dropout, call_module(self.LayerNorm, x, policy, batch), batch)

    @property
    def n_token_types(self) -> int:
        """Returns the number of segments; it is one, without a table, in a model without segments."""
        table: Any = self._modules.get("token_type_embeddings")
        return 1 if table is None else table.num_embeddings


def _table(embedding: nn.Embedding) -> Tensor:
    """Returns the weight of an embedding; its padding_idx gets no gradient."""
    weight, padding_idx = embedding.weight, embedding.padding_idx
    if padding_idx is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    if not tracing.has_sizes():  # torch.jit.trace compares its graphs with and without gradients
        return weight
    unused = torch.arange(weight.shape[0], device=weight.device) == padding_idx
    return torch.where(unused[:, None], weight.detach(), weight)
