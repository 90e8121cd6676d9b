"""The embeddings of DeBERTa-v2 and -v3 are only words in most models; some have positions, segments or a projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.deberta import DebertaSettings
from fastbert.engine import EmbeddingTables, Norm
from fastbert.engine.listeners import is_bare, is_plain_norm
from fastbert.models import hooks
from fastbert.models.encoder import ANY_POSITION
from fastbert.models.modules import call_dropout
from fastbert.models.rotary import look_up, normalise, project
from fastbert.ops import Policy, dispatch, embedding
from fastbert.ops.packing import PackedBatch
from fastbert_kernels.masks import EMBEDDINGS


class DebertaEmbeddings(nn.Module):
    """LayerNorm(embed_proj(word + position + token type)); most models have only words."""

    def __init__(self, config: BertConfig, settings: DebertaSettings) -> None:
        super().__init__()
        width, n_types, size = config.embedding_width, config.type_vocab_size, config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width) if settings.positions else None
        self.token_type_embeddings = nn.Embedding(n_types, width) if n_types else None
        self.embed_proj = nn.Linear(width, size, bias=False) if width != size else None
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    without_bias = True

    @property
    def n_token_types(self) -> int:
        """Returns the number of segments. Without a table any number is allowed: the tokenizer gives some, and none is
        read.
        """
        return ANY_POSITION if self.token_type_embeddings is None else self.token_type_embeddings.num_embeddings

    def forward(
        self,
        input_ids: Tensor | None,  # (T,)
        token_type_ids: Tensor | None = None,  # (T,)
        position_ids: Tensor | None = None,  # (T,)
        inputs_embeds: Tensor | None = None,  # (T, E)
        batch: PackedBatch | None = None,
        policy: Policy = ops.AUTO,
    ) -> Tensor:  # (T, H)
        ids = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if ids is not None and ids.dim() == 2:
            padded = input_ids, token_type_ids, position_ids, inputs_embeds
            return hooks.on_packed(DebertaEmbeddings.forward, self, *padded)
        if self._backend(policy, inputs_embeds) == "triton":
            return self._in_kernel(input_ids, token_type_ids, position_ids, inputs_embeds, batch, policy)
        x = look_up(self.word_embeddings, input_ids, policy, batch) if inputs_embeds is None else inputs_embeds
        if self.position_embeddings is not None:
            x = x + look_up(self.position_embeddings, position_ids, policy, batch)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            x = x + look_up(self.token_type_embeddings, token_type_ids, policy, batch)
        if self.embed_proj is not None:
            x = project(self.embed_proj, x, policy, batch)
        return call_dropout(self.dropout, normalise(self.LayerNorm, x, policy, batch), batch, EMBEDDINGS)

    def _in_kernel(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        batch: PackedBatch | None,
        policy: Policy,
    ) -> Tensor:
        """Computes the sum of rows, the norm and dropout in one kernel."""
        words, types, norm = self.word_embeddings, self.token_type_embeddings, self.LayerNorm
        rows: Any = input_ids if inputs_embeds is None else inputs_embeds
        table = None if self.position_embeddings is None else self.position_embeddings.weight
        if types is not None and token_type_ids is None:
            token_type_ids = torch.zeros(rows.shape[0], dtype=torch.int64, device=words.weight.device)
        if table is None:
            position_ids = None
        elif position_ids is None:
            position_ids = torch.zeros(rows.shape[0], dtype=torch.int64, device=words.weight.device)
        return ops.embedding_layer_norm(
            input_ids if inputs_embeds is None else None, None if types is None else token_type_ids, position_ids,
            words.weight, None if types is None else types.weight, table, norm.weight, norm.bias, norm.eps,
            inputs_embeds=inputs_embeds, padding_idx=words.padding_idx if inputs_embeds is None else None,
            dropout=ops.dropout_of(self.dropout.p if self.training else 0.0, batch, EMBEDDINGS), policy=policy,
        )  # fmt: skip

    def tables(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, policy: Policy = ops.AUTO
    ) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and the tables if the model does not project them; else None, and embeddings, (T, E), as the
        words.
        """
        types, positions = self.token_type_embeddings, self.position_embeddings
        return None if inputs_embeds is not None else input_ids, EmbeddingTables(
            words=self.word_embeddings.weight if inputs_embeds is None else inputs_embeds,
            token_types=None if types is None else types.weight,
            positions=None if positions is None else positions.weight,
            norm=Norm.of(self.LayerNorm),
        )

    def _backend(self, policy: Policy, inputs_embeds: Tensor | None = None) -> str:
        """Names the backend of the embeddings as one operation."""
        words, norm = self.word_embeddings, self.LayerNorm
        tables = [table for table in (words, self.token_type_embeddings, self.position_embeddings) if table is not None]
        obstacle: str | None = "a module inside the embeddings is an adapter, has hooks, or projects"
        plain = self.embed_proj is None and is_plain_norm(norm, self.dropout)
        if plain and all(is_bare(table, nn.Embedding) for table in tables):
            weights = [table.weight for table in tables]
            obstacle = embedding.triton_obstacle(norm.weight.shape[0], *weights, norm.weight, inputs_embeds)
        return dispatch.decide("embedding", policy, norm.weight.device, obstacle).backend

    def runs_in_kernel(self, policy: Policy) -> bool:
        """Tells whether the Triton kernel computes them; it can note ids outside of their table."""
        return self._backend(policy) == "triton"
