"""ColBERT fills queries up with mask tokens, whose vectors count as well (Khattab and Zaharia, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.checks import expect, one_of
from fastbert.engine.block import Block, Linear, Norm
from fastbert.engine.interface import PackedInputs
from fastbert.ops import packing
from fastbert.ops.packing import PackedBatch

# Features of layers that give no row to a token that is no key: DeBERTa masks queries as it masks keys.
_NO_ROWS_UNSEEN = {"distances", "convolution"}


@dataclass(frozen=True)
class QueryExpansion:
    """A QueryExpansion has the least number of tokens of a query, and the token that fills it up.

    length: tokens of a query. token_id: the token that fills it up. attend: whether other tokens attend to these
    tokens; if not, these tokens attend to the query's own tokens only, and no token attends to them. strategy: "fixed"
    cuts longer queries to length, "min" keeps them.
    """

    length: int
    token_id: int
    attend: bool = False
    strategy: str = "fixed"

    def __post_init__(self) -> None:
        one_of("query_expansion: strategy", self.strategy, "fixed", "min")
        expect(self.length >= 1, "query_expansion: length", self.length, "a positive whole number")

    def encode(
        self, model: Any, batch: PackedBatch, input_ids: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, PackedBatch, Tensor]:
        """Returns the hidden states of the filled queries (T', H), their batch, and their ids (T',)."""
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        filled = [max(n, self.length) for n in lengths]
        more = packing.from_lengths(filled, input_ids.device)
        own = more.position_ids < torch.repeat_interleave(
            batch.cu_seqlens.diff(), more.cu_seqlens.diff(), output_size=sum(filled)
        )
        ids = torch.full((sum(filled),), self.token_id, dtype=input_ids.dtype, device=input_ids.device)
        types = torch.zeros_like(ids)
        ids[own], types[own] = input_ids, token_type_ids
        if self.attend or filled == lengths:
            return model.encode_packed(more, ids, types, check=False)[-1], more, ids
        return _encode_unseen(model, more, ids, types, own), more, ids


def _encode_unseen(model: Any, batch: PackedBatch, ids: Tensor, types: Tensor, seen: Tensor) -> Tensor:
    """Returns the hidden states (T, H) of all tokens, if only the `seen` ones are keys of attention.

    No engine packs such attention. So the layers run here in plain PyTorch, on padded rows of a few short queries.
    """
    if model.policy.batch_invariant:
        raise ops.BackendError("query expansion with attend=False: does not support batch invariance")
    positions = batch.position_ids
    if model.counted_from is not None:
        positions = packing.positions_after_padding(ids, model.counted_from, batch)
    n_texts, longest = batch.batch_size, batch.padded_length
    texts = torch.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(ids))
    places = texts * longest + batch.position_ids

    def padded(rows: Tensor) -> Tensor:
        return rows.new_zeros(n_texts * longest, *rows.shape[1:]).index_put((places,), rows)

    mask, blocks = padded(seen).view(n_texts, longest), list(model.blocks())
    features = {each for block in blocks for each in block.features()}
    if features & _NO_ROWS_UNSEEN:
        raise ValueError(f"query expansion with attend=False: not for layers with {', '.join(sorted(features))}")
    if features:
        rows = packing.in_place(mask, mask)
        inputs = PackedInputs(padded(ids), padded(types), padded(positions))
        states: list[Tensor] = model.engine.run_traced(
            model, rows, inputs, False, "a query expansion with attend=False"
        )
        return states[-1][places]
    x = padded(model.embed(PackedInputs(ids, types, positions), batch)).view(n_texts, longest, -1)
    for block in blocks:
        x = _layer(block, x, mask[:, None, None])
    return x.flatten(0, 1)[places]


def _layer(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Computes one layer on padded rows, (B, S, H) -> (B, S, H)."""
    heads = (x.shape[0], x.shape[1], block.num_heads, block.head_size)
    query, key, value = (
        _linear(linear, x).view(heads).transpose(1, 2) for linear in (block.query, block.key, block.value)
    )
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).reshape(x.shape)
    x = _norm(block.norms[0], _linear(block.out, seen) + x)
    up = _linear(block.up, x)
    activated = ops.bias_gelu(up.flatten(0, 1), None, block.activation).view(up.shape)
    return _norm(block.output_norm, _linear(block.down, activated) + x)


def _linear(linear: Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm.filled(x), norm.eps)
