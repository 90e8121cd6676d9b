"""Heads on token vectors make sparse vectors over the vocabulary, or keep a vector for each token.

A head runs on the packed hidden states of a batch, (T, H), and returns an item for each of its B texts. Sparse items
are (places, numbers): the places of the nonzero values, ascending int64, and the values, in float32 at least.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.checks import one_of
from fastbert.models import hooks
from fastbert.models.tasks import BertForMaskedLM
from fastbert.ops import packing
from fastbert.ops.packing import PackedBatch
from fastbert.pipelines.expansion import QueryExpansion
from fastbert.pipelines.modules import Normalize, apply

SparseItem = tuple[Tensor, Tensor]

# The most logits in memory at once, and the most values of a batch's vectors before their zeros are dropped.
LOGITS = {"cpu": 2**23, "cuda": 2**27}
NUMBERS = {"cpu": 2**24, "cuda": 2**28}


class SpladeHead(nn.Module):
    """A SpladeHead pools log(1 + relu(logits)) of a masked-language model over the tokens of each text.

    pooling: "max" (Formal et al., "SPLADE v2", 2021) or "sum". activation: "relu", or "log1p_relu", which takes the
    logarithm twice. Logits exist for a block of tokens at a time, never for the whole batch.
    """

    def __init__(self, masked_lm: BertForMaskedLM, pooling: str = "max", activation: str = "relu") -> None:
        super().__init__()
        self.pooling = one_of("pooling_strategy", pooling, "max", "sum")
        self.activation = one_of("activation_function", activation, "relu", "log1p_relu")
        self.cls = masked_lm.cls
        self.__dict__["masked_lm"] = masked_lm  # no submodule: its encoder is the sentence encoder's own

    @property
    def dimension(self) -> int:
        """Returns the length of a vector, the size of the vocabulary."""
        return int(self.cls.predictions.decoder.out_features)

    def texts_in_batch(self, device: torch.device) -> int:
        """Returns how many texts may be in a batch, by the memory of their vectors."""
        return max(NUMBERS.get(device.type, NUMBERS["cuda"]) // self.dimension, 1)

    def items(self, model: Any, batch: PackedBatch, input_ids: Tensor, token_type_ids: Tensor) -> list[SparseItem]:
        """Returns an item for each text of a batch."""
        hidden = model.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]
        return sparse_rows(self.vectors(hidden, batch, model.policy))

    def vectors(self, hidden: Tensor, batch: PackedBatch, policy: ops.Policy = ops.AUTO) -> Tensor:
        """Pools the hidden states (T, H) of a batch to (B, V), in float32 at least."""
        offsets = batch.cu_seqlens_cpu.tolist()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        pooled = torch.zeros(len(offsets) - 1, self.dimension, dtype=dtype, device=hidden.device)
        n_rows = max(LOGITS.get(hidden.device.type, LOGITS["cuda"]) // self.dimension, 1)
        # The cuts of a sum must not depend on the neighbouring texts. A maximum is the same for all cuts.
        alone = self.pooling == "sum" and policy.batch_invariant
        for start, end, first, last in _blocks(offsets, n_rows, alone):
            lengths = [min(offsets[i + 1], end) - max(offsets[i], start) for i in range(first, last)]
            part = packing.from_lengths(lengths, hidden.device)
            logits = hooks.call(self.cls, part, policy, hidden[start:end])
            if self.pooling == "max":  # the zeros stand for relu, and the logarithm keeps the order
                highest = ops.pool(logits, part.cu_seqlens, "max", out_dtype=dtype, policy=policy)
                pooled[first:last] = torch.maximum(pooled[first:last], highest)
            else:
                numbers = self._logarithm(logits.to(dtype).relu(), policy)
                mean = ops.pool(numbers, part.cu_seqlens, "mean", out_dtype=dtype, policy=policy)
                pooled[first:last] += mean * part.cu_seqlens.diff()[:, None]
        return self._logarithm(pooled, policy) if self.pooling == "max" else pooled

    def _logarithm(self, x: Tensor, policy: ops.Policy) -> Tensor:
        x = ops.elementwise(torch.log1p, x, policy=policy)
        return ops.elementwise(torch.log1p, x, policy=policy) if self.activation == "log1p_relu" else x

    def settings(self) -> dict[str, Any]:
        """Returns the content of the config.json of sentence-transformers' SpladePooling."""
        return {
            "pooling_strategy": self.pooling,
            "activation_function": self.activation,
            "embedding_dimension": self.dimension,
        }


def _blocks(offsets: Sequence[int], n_rows: int, alone: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields (start, end, first, last): runs of at most n_rows tokens, and the texts with tokens in them.

    alone: whether a run has tokens of only one text.
    """
    if alone:
        for i in range(len(offsets) - 1):
            for start in range(offsets[i], offsets[i + 1], n_rows):
                yield start, min(start + n_rows, offsets[i + 1]), i, i + 1
        return
    for start in range(0, offsets[-1], n_rows):
        end = min(start + n_rows, offsets[-1])
        yield start, end, bisect_right(offsets, start) - 1, bisect_left(offsets, end)


def sparse_rows(vectors: Tensor) -> list[SparseItem]:
    """Returns the rows of a matrix (B, V) as sparse items."""
    rows, places = vectors.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=vectors.shape[0]).tolist()
    return list(zip(places.split(counts), vectors[rows, places].split(counts), strict=True))


class TokenWeights(nn.Module):
    """A TokenWeights gives each token of a text relu(w . h + b), as bge-m3 does (Chen et al., 2024).

    A token that occurs several times in a text gets its highest weight. unused: ids without a weight, which are those
    of the special tokens.
    """

    def __init__(self, linear: nn.Linear, unused: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        self.linear, self.dimension = linear, vocab_size
        self.unused = sorted(set(unused))

    def texts_in_batch(self, device: torch.device) -> int | None:
        """Returns None: the vectors are never dense."""
        return None

    def items(self, model: Any, batch: PackedBatch, input_ids: Tensor, token_type_ids: Tensor) -> list[SparseItem]:
        """Returns an item for each text of a batch."""
        hidden = model.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = _linear(self.linear, x, model.policy)[:, 0].relu()
        wanted = (weights > 0) & ~torch.isin(input_ids, torch.tensor(self.unused, device=input_ids.device))
        n_texts = batch.cu_seqlens.shape[0] - 1
        texts = torch.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(input_ids))[wanted]
        keys, places = torch.unique(texts * self.dimension + input_ids[wanted], return_inverse=True)
        highest = weights.new_zeros(len(keys)).scatter_reduce(0, places, weights[wanted], "amax")
        counts = torch.bincount(keys // self.dimension, minlength=n_texts).tolist()
        return list(zip((keys % self.dimension).split(counts), highest.split(counts), strict=True))


class TokenVectors(nn.Module):
    """A TokenVectors keeps a vector for each token: the output of the modules `tail` for its hidden state.

    skip: ids of tokens without a vector, in texts for one of skip_tasks; a text without a task counts as "document".
    without_first: the first token has none, as in bge-m3. expansion: the tokens that fill up a query. query_length,
    document_length: the most tokens of a text for these tasks.
    """

    def __init__(
        self,
        tail: Sequence[nn.Module],
        *,
        skip: Sequence[int] = (),
        skip_tasks: Sequence[str] = ("document",),
        without_first: bool = False,
        expansion: QueryExpansion | None = None,
        query_length: int | None = None,
        document_length: int | None = None,
    ) -> None:
        super().__init__()
        self.tail = nn.ModuleList(tail)
        self.skip, self.skip_tasks, self.without_first = sorted(set(skip)), tuple(skip_tasks), without_first
        self.expansion, self.query_length, self.document_length = expansion, query_length, document_length

    def limit(self, task: str | None, limit: int) -> int:
        """Returns the most tokens of a text for a task. limit: the value if the head has none."""
        own = {"query": self.query_length, "document": self.document_length}.get(task or "")
        if task == "query" and self.expansion is not None:
            fixed = self.expansion.strategy == "fixed"
            return self.expansion.length if fixed else max(own or limit, self.expansion.length)
        return min(own or limit, limit)

    def items(
        self,
        model: Any,
        batch: PackedBatch,
        input_ids: Tensor,
        token_type_ids: Tensor,
        task: str | None = None,
        normalize: bool = False,
    ) -> list[Tensor]:
        """Returns (tokens, dim) for each text of a batch, in float32 at least."""
        if task == "query" and self.expansion is not None:
            hidden, batch, input_ids = self.expansion.encode(model, batch, input_ids, token_type_ids)
        else:
            hidden = model.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        kept = torch.ones_like(input_ids, dtype=torch.bool)
        if self.without_first:
            kept[batch.cu_seqlens[:-1].long()] = False
        if self.skip and (task or "document") in self.skip_tasks:
            kept &= ~torch.isin(input_ids, torch.tensor(self.skip, device=input_ids.device))
        for module in self.tail:
            x = apply(module, x, model.policy)
        if normalize:
            x = apply(Normalize(), x, model.policy)
        counts = F.pad(kept.cumsum(0), (1, 0))[batch.cu_seqlens.long()].diff().tolist()
        return list(x[kept].split(counts))


def _linear(linear: nn.Linear, x: Tensor, policy: ops.Policy) -> Tensor:
    """Returns x @ weight^T + bias in the dtype of x, on batch-invariant kernels if the policy requires them."""
    bias = None if linear.bias is None else linear.bias.to(x)
    if policy.batch_invariant:
        return ops.linear(x, linear.weight.to(x), bias, policy=policy)
    return F.linear(x, linear.weight.to(x), bias)
